// Attention from a few queries over the encoded keys of a KV split. Compiled in splits.cpp only.

#pragma once

#include "attention.h"
#include "encoded.h"

// Products of R queries q (R, D) with n encoded keys: scores. As many codes `ahead` are prefetched.
template <int R, int KIND>
void multiply_encoded(const float* q, const Vectors& k, const Vectors& ahead, int64_t n, int64_t D,
                      float (*scores)[SPLIT_KEYS]) {
#ifdef __AVX512BW__
    if (D % GROUP == 0) {  // in integers: queries have 16 bits
        for (int r = 0; r < R; r++) std::fill(scores[r], scores[r] + SPLIT_KEYS, 0.0f);
        for (int64_t d = 0; d < D; d += GROUP) {
            const int64_t ahead_bytes = GROUP * ahead.strides[2] / D, ahead_at = d / GROUP * ahead_bytes;
            __m512i queries[R][2];
            float units[R], totals[R];
            for (int r = 0; r < R; r++) {
                int16_t numbers[GROUP], ordered[GROUP];
                units[r] = to_integers(q + r * D + d, numbers);
                for (int i = 0; i < 4; i++)
                    std::memcpy(ordered + 16 * i, numbers + 16 * block_of_codes<KIND>(i), 16 * sizeof(int16_t));
                queries[r][0] = _mm512_loadu_si512(ordered), queries[r][1] = _mm512_loadu_si512(ordered + 32);
                totals[r] = 0;
                for (int i = 0; i < GROUP; i++) totals[r] += q[r * D + d + i];
            }
            float scale[SPLIT_KEYS], least[SPLIT_KEYS] = {};
            load_scales<KIND>(k, d, n, scale, least);
            for (int64_t j0 = 0; j0 < n; j0 += 16) {
                __m512 sums[R][16];
                for (int j = 0; j < 16; j++) {
                    __m512i first, second;
                    const int64_t slot = std::min(j0 + j, n - 1);  // after the last one, it again
                    prefetch(ahead.codes_of(slot) + ahead_at, ahead_bytes);
                    widen_codes<KIND>(k.codes_of(slot), D, d, first, second);
                    UNROLLED for (int r = 0; r < R; r++) {
                        const __m512i own = add_integer_products(_mm512_setzero_si512(), first, queries[r][0]);
                        sums[r][j] = _mm512_cvtepi32_ps(add_integer_products(own, second, queries[r][1]));
                    }
                }
                UNROLLED for (int r = 0; r < R; r++) {
                    const __m512 products = _mm512_mul_ps(sums_of_all(sums[r]), _mm512_set1_ps(units[r]));
                    const __m512 before = _mm512_fmadd_ps(_mm512_loadu_ps(least + j0), _mm512_set1_ps(totals[r]),
                                                          _mm512_loadu_ps(scores[r] + j0));
                    _mm512_storeu_ps(scores[r] + j0, _mm512_fmadd_ps(products, _mm512_loadu_ps(scale + j0), before));
                }
            }
        }
        return;
    }
#endif
    for (int64_t j = 0; j < n; j++) {
        float x[MAX_D];
        decode_codes<KIND>(k.codes_of(j), k.scales_of(j), D, x);
        const float scale = KIND == INT8 ? widen(*k.scales_of(j)) : 1.0f;
        for (int r = 0; r < R; r++) {
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t d = 0; d < D; d++) sum += x[d] * q[r * D + d];
            scores[r][j] = sum * scale;
        }
    }
}

#ifdef __AVX512BW__
// Codes of numbers [d, d + 64) of two values of D numbers, in pairs of 16 bits, one of each
template <int KIND>
inline void pair_codes(const char* a, const char* b, int64_t D, int64_t d, __m512i* pairs) {
    __m512i first[2], second[2];
    widen_codes<KIND>(a, D, d, first[0], first[1]);
    widen_codes<KIND>(b, D, d, second[0], second[1]);
    for (int i = 0; i < 2; i++) {
        pairs[2 * i] = _mm512_unpacklo_epi16(first[i], second[i]);
        pairs[2 * i + 1] = _mm512_unpackhi_epi16(first[i], second[i]);
    }
}
#endif

// Sums of n encoded values, as the weights (0 after the last) of R queries say: out (R, D). As many codes `ahead` are
// prefetched.
template <int R, int KIND>
void add_encoded(const float (*weights)[SPLIT_KEYS], const Vectors& v, const Vectors& ahead, int64_t n, int64_t D, float* out) {
#ifdef __AVX512BW__
    if (D % GROUP == 0) {  // in integers: weights have 16 bits
        for (int64_t d = 0; d < D; d += GROUP) {
            const int64_t ahead_bytes = GROUP * ahead.strides[2] / D, ahead_at = d / GROUP * ahead_bytes;
            float scale[SPLIT_KEYS] = {}, least[SPLIT_KEYS] = {};
            load_scales<KIND>(v, d, n, scale, least);
            int16_t numbers[R][SPLIT_KEYS];
            float units[R], bases[R];
            for (int r = 0; r < R; r++) {
                float scaled[SPLIT_KEYS], base = 0;
                for (int j = 0; j < SPLIT_KEYS; j++) scaled[j] = weights[r][j] * scale[j];
                for (int j = 0; j < SPLIT_KEYS; j++) base += weights[r][j] * least[j];
                units[r] = to_integers(scaled, numbers[r]), bases[r] = base;
            }
            __m512i sums[R][4];
            UNROLLED for (int r = 0; r < R; r++) UNROLLED for (int i = 0; i < 4; i++) sums[r][i] = _mm512_setzero_si512();
            for (int64_t j = 0; j < n; j += 2) {
                __m512i pairs[4];
                prefetch(ahead.codes_of(j) + ahead_at, ahead_bytes);
                prefetch(ahead.codes_of(j + 1) + ahead_at, ahead_bytes);
                pair_codes<KIND>(v.codes_of(j), v.codes_of(std::min(j + 1, n - 1)), D, d, pairs);
                UNROLLED for (int r = 0; r < R; r++) {
                    int32_t both;
                    std::memcpy(&both, numbers[r] + j, 4);
                    const __m512i weight = _mm512_set1_epi32(both);
                    UNROLLED for (int i = 0; i < 4; i++) sums[r][i] = add_integer_products(sums[r][i], pairs[i], weight);
                }
            }
            for (int r = 0; r < R; r++) {
                const __m512i even = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
                const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(8));
                UNROLLED for (int i = 0; i < 4; i++) {  // blocks of 16 codes; `unpack` has divided them by fours
                    const __m512i codes = _mm512_permutex2var_epi32(sums[r][i / 2 * 2], i % 2 ? odd : even, sums[r][i / 2 * 2 + 1]);
                    const __m512 values = _mm512_fmadd_ps(_mm512_cvtepi32_ps(codes), _mm512_set1_ps(units[r]), _mm512_set1_ps(bases[r]));
                    _mm512_storeu_ps(out + r * D + d + 16 * block_of_codes<KIND>(i), values);
                }
            }
        }
        return;
    }
#endif
    std::fill(out, out + R * D, 0.0f);
    for (int64_t j = 0; j < n; j++) {
        float x[MAX_D];
        decode_codes<KIND>(v.codes_of(j), v.scales_of(j), D, x);
        const float scale = KIND == INT8 ? widen(*v.scales_of(j)) : 1.0f;
        for (int r = 0; r < R; r++) {
            const float weight = weights[r][j] * scale;
#pragma omp simd
            for (int64_t d = 0; d < D; d++) out[r * D + d] = multiply_add(weight, x[d], out[r * D + d]);
        }
    }
}

// As `attend_rows`, with encoded keys and values; the keys `next_k` are prefetched.
template <int R>
void attend_encoded(const SplitQueries& x, const Vectors& k, const Vectors& v, const Vectors& next_k) {
    float scores[R][SPLIT_KEYS], queries[R * MAX_D];
    for (int64_t i = 0; i < R * x.D; i++) queries[i] = widen(x.q[i]);
    prefetch(v.scales, x.n * v.scale_strides[2] * int64_t(sizeof(bf16)));
    with_kind(k, [&](auto kind) { multiply_encoded<R, decltype(kind)::value>(queries, k, v, x.n, x.D, scores); });
    for (int r = 0; r < R; r++) weigh(scores[r], x.bias[r], x.n, x.scale, x.cap, x.top + r, x.total + r);
    prefetch(next_k.scales, x.n * next_k.scale_strides[2] * int64_t(sizeof(bf16)));
    with_kind(v, [&](auto kind) { add_encoded<R, decltype(kind)::value>(scores, v, next_k, x.n, x.D, x.out); });
}
