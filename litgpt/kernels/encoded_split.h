// Attention from a few queries over the encoded keys of a KV split. Compiled in splits.cpp only.
//
// Products are those of integers: codes, and queries or weights in 16 bits. Codes are widened in chunks of two vectors.

#pragma once

#include "attention.h"
#include "encoded.h"

constexpr int CHUNK = 2 * SHORTS;  // numbers

// The codes of a chunk: numbers [d, d + CHUNK) of a vector of D in the order of `number_of`
template <int KIND>
inline void widen_codes(const char* codes, int64_t D, int64_t d, Shorts& first, Shorts& second) {
    if constexpr (KIND == INT8) {
        first = load_shorts((const int8_t*)codes + d), second = load_shorts((const int8_t*)codes + d + SHORTS);
        return;
    }
    split_nibbles((const uint8_t*)codes + d / 2, first, second);
    if constexpr (KIND == INT5) {
        uint64_t fifth;  // bits of all numbers of the group
        std::memcpy(&fifth, codes + D / 2 + d / GROUP * 8, 8);
        const int64_t byte = d % GROUP / 2, at = byte / 16 * UNIT + byte % 16;
        const auto bits = [&](int64_t from) {
            const uint64_t next = SHORTS > 16 ? fifth >> (from + UNIT) % 64 << 16 : 0;
            return uint32_t(SHORTS > 16 ? (fifth >> from & 0xffff) | next : fifth >> from);
        };
        first = add_fifth_bits(first, bits(at)), second = add_fifth_bits(second, bits(at + UNIT / 2));
    }
}

// The number of a group whose code comes i-th
template <int KIND>
constexpr int number_of(int i) {
    if (KIND == INT8) return i;
    const int byte = i / CHUNK * SHORTS + i % SHORTS, half = i / SHORTS % 2;
    return byte / 16 * int(UNIT) + byte % 16 + half * 16;
}

// x (64,) as integers of 16 bits: returns what 1 stands for
inline float to_integers(const float* x, int16_t* y) {
    Floats most = zeros();
    for (int i = 0; i < GROUP; i += LANES) most = greater(most, greater(load(x + i), zeros() - load(x + i)));
    const float largest_one = largest(most);
    const Floats factor = all(largest_one > 0 ? 32767.0f / largest_one : 0.0f);
    for (int i = 0; i < GROUP; i += LANES) store_rounded(y + i, load(x + i) * factor);
    return largest_one / 32767.0f;
}

// Scales, and least numbers but in 8 bits, of numbers [d, d + 64) of SPLIT_KEYS vectors of which there are n; 0 after the last
template <int KIND>
inline void load_scales(const Vectors& v, int64_t d, int64_t n, float* scale, float* least) {
    const int64_t stride = v.scale_strides[2];
    if constexpr (KIND == INT8) {
        for (int64_t j = 0; j < n; j++) scale[j] = widen(v.scales[j * stride]);
        std::fill(scale + n, scale + SPLIT_KEYS, 0.0f);
    } else {
        for (int64_t j = 0; j < SPLIT_KEYS; j += LANES) {
            const Pairs both = load_pairs(v.scales + j * stride + d / GROUP * 2, stride, n - j);
            store(scale + j, firsts(both)), store(least + j, seconds(both));
        }
    }
}

// Products of R queries q (R, D) with n encoded keys: scores. As many codes `ahead` are prefetched.
template <int R, int KIND>
void multiply_encoded(const float* q, const Vectors& k, const Vectors& ahead, int64_t n, int64_t D,
                      float (*scores)[SPLIT_KEYS]) {
    if (D % GROUP == 0) {
        for (int r = 0; r < R; r++) std::fill(scores[r], scores[r] + SPLIT_KEYS, 0.0f);
        for (int64_t d = 0; d < D; d += GROUP) {
            const int64_t ahead_bytes = GROUP * ahead.strides[2] / D, ahead_at = d / GROUP * ahead_bytes;
            int16_t queries[R][GROUP];
            float units[R], totals[R];
            for (int r = 0; r < R; r++) {
                int16_t numbers[GROUP];
                units[r] = to_integers(q + r * D + d, numbers);
                for (int i = 0; i < GROUP; i++) queries[r][i] = numbers[number_of<KIND>(i)];
                totals[r] = 0;
                for (int i = 0; i < GROUP; i++) totals[r] += q[r * D + d + i];
            }
            float scale[SPLIT_KEYS], least[SPLIT_KEYS] = {};
            load_scales<KIND>(k, d, n, scale, least);
            for (int64_t j0 = 0; j0 < n; j0 += LANES) {
                Floats sums[R][LANES];
                for (int j = 0; j < LANES; j++) {
                    const int64_t slot = std::min(j0 + j, n - 1);  // after the last one, it again
                    prefetch(ahead.codes_of(slot) + ahead_at, ahead_bytes);
                    Integers own[R];
                    UNROLLED for (int r = 0; r < R; r++) own[r] = no_products();
                    UNROLLED for (int i = 0; i < GROUP; i += CHUNK) {
                        Shorts first, second;
                        widen_codes<KIND>(k.codes_of(slot), D, d + i, first, second);
                        UNROLLED for (int r = 0; r < R; r++) {
                            own[r] = add_integer_products(own[r], first, load_shorts(queries[r] + i));
                            own[r] = add_integer_products(own[r], second, load_shorts(queries[r] + i + SHORTS));
                        }
                    }
                    UNROLLED for (int r = 0; r < R; r++) sums[r][j] = to_floats(own[r]);
                }
                UNROLLED for (int r = 0; r < R; r++) {
                    const Floats products = sums_of_all(sums[r]) * all(units[r]);
                    const Floats before = multiply_add(load(least + j0), all(totals[r]), load(scores[r] + j0));
                    store(scores[r] + j0, multiply_add(products, load(scale + j0), before));
                }
            }
        }
        return;
    }
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

// Sums of n encoded values, as the weights (0 after the last) of R queries say: out (R, D). As many codes `ahead` are
// prefetched.
template <int R, int KIND>
void add_encoded(const float (*weights)[SPLIT_KEYS], const Vectors& v, const Vectors& ahead, int64_t n, int64_t D, float* out) {
    if (D % GROUP == 0) {
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
            for (int i = 0; i < GROUP; i += CHUNK) {
                Integers sums[R][4];
                UNROLLED for (int r = 0; r < R; r++) UNROLLED for (int p = 0; p < 4; p++) sums[r][p] = no_products();
                for (int64_t j = 0; j < n; j += 2) {  // two values at a time
                    const int64_t next = std::min(j + 1, n - 1);
                    if (i == 0) {
                        prefetch(ahead.codes_of(j) + ahead_at, ahead_bytes);
                        prefetch(ahead.codes_of(next) + ahead_at, ahead_bytes);
                    }
                    Shorts a[2], b[2], pairs[4];
                    widen_codes<KIND>(v.codes_of(j), D, d + i, a[0], a[1]);
                    widen_codes<KIND>(v.codes_of(next), D, d + i, b[0], b[1]);
                    pair_up(a[0], b[0], pairs[0], pairs[1]);
                    pair_up(a[1], b[1], pairs[2], pairs[3]);
                    UNROLLED for (int r = 0; r < R; r++) {
                        int32_t both;
                        std::memcpy(&both, numbers[r] + j, 4);
                        const Shorts weight = all_pairs(both);
                        UNROLLED for (int p = 0; p < 4; p++) sums[r][p] = add_integer_products(sums[r][p], pairs[p], weight);
                    }
                }
                for (int r = 0; r < R; r++) {
                    in_order(sums[r][0], sums[r][1]);
                    in_order(sums[r][2], sums[r][3]);
                    UNROLLED for (int p = 0; p < 4; p++)
                        store(out + r * D + d + number_of<KIND>(i + p * LANES),
                              multiply_add(to_floats(sums[r][p]), all(units[r]), all(bases[r])));
                }
            }
        }
        return;
    }
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
