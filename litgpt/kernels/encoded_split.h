// Attention from a few queries over the encoded keys of a KV split. Compiled in splits.cpp only.
//
// Products are those of integers: codes in 8 bits, four at a time, and queries or weights in 15 bits. Keys are transposed, so that
// each of LANES sums is a score.

#pragma once

#include "attention.h"
#include "encoded.h"

constexpr int QUADS = GROUP / 4;
constexpr int CHUNK = 4 * LANES;  // numbers of a vector `Quads`

// Numbers [d, d + CHUNK) of a vector of D: codes without signs
template <int KIND>
inline Quads load_codes(const char* codes, int64_t D, int64_t d) {
    if constexpr (KIND == INT8) return load_quads((const int8_t*)codes + d);
    const Quads low = load_nibbles((const uint8_t*)codes, d);
    if constexpr (KIND == INT5) return add_fifth_bits(low, codes + D / 2 + d / 8);
    return low;
}

// 64 integers of up to 14 bits and a sign, as what quads are multiplied with
struct Factors {
    static constexpr float LARGEST = 16319;  // 127 * 128 + 63
    int32_t first[QUADS], second[QUADS];

    // x (64,), divided by the largest of them; returns what 1 stands for, and the sum of the integers
    NOT_INLINED float set(const float* x, float* total) {
        Floats most = zeros();
        for (int i = 0; i < GROUP; i += LANES) most = greater(most, greater(load(x + i), zeros() - load(x + i)));
        const float largest_one = largest(most);
        const Floats factor = all(largest_one > 0 ? LARGEST / largest_one : 0.0f);
        int16_t y[GROUP];
        for (int i = 0; i < GROUP; i += LANES) store_rounded(y + i, load(x + i) * factor);
        int32_t sum = 0;
        for (int i = 0; i < GROUP; i++) sum += y[i];
        *total = float(sum);
#ifdef LITGPT_BYTE_PRODUCTS
        int8_t *high = (int8_t*)first, *low = (int8_t*)second;
        for (int i = 0; i < GROUP; i++) {
            const int16_t upper = int16_t((y[i] + 64) >> 7);
            high[i] = int8_t(upper), low[i] = int8_t(y[i] - upper * 128);
        }
#else
        int16_t *even = (int16_t*)first, *odd = (int16_t*)second;
        for (int i = 0; i < GROUP / 2; i++) even[i] = y[2 * i], odd[i] = y[2 * i + 1];
#endif
        return largest_one / LARGEST;
    }
};

#ifdef LITGPT_BYTE_PRODUCTS
// Sums of products of quads with factors
struct QuadSums {
    Integers high = no_products(), low = no_products();

    Floats floats() const { return to_floats(sum_of(shifted_left(high, 7), low)); }
};

using Multiplied = Quads;

inline Multiplied multiplied(Quads x) { return x; }

inline void add_quad_products(QuadSums& sums, Multiplied x, const Factors& factors, int i) {
    sums.high = add_byte_products(sums.high, x, factors.first[i]);
    sums.low = add_byte_products(sums.low, x, factors.second[i]);
}
#else
struct QuadSums {
    Integers all = no_products();

    Floats floats() const { return to_floats(all); }
};

struct Multiplied {
    Shorts even, odd;
};

inline Multiplied multiplied(Quads x) { return {even_numbers(x), odd_numbers(x)}; }

inline void add_quad_products(QuadSums& sums, const Multiplied& x, const Factors& factors, int i) {
    sums.all = add_integer_products(sums.all, x.even, all_pairs(factors.first[i]));
    sums.all = add_integer_products(sums.all, x.odd, all_pairs(factors.second[i]));
}
#endif

// Scales of numbers [d, d + 64) of SPLIT_KEYS vectors of which there are n, and what the code 0 stands for; 0 after the last
template <int KIND>
inline void load_scales(const Vectors& v, int64_t d, int64_t n, float* scale, float* least) {
    const int64_t stride = v.scale_strides[2];
    if constexpr (KIND == INT8) {
        bf16 own[SPLIT_KEYS] = {};
        if (stride == 1)
            std::memcpy(own, v.scales, n * sizeof(bf16));
        else
            for (int64_t j = 0; j < n; j++) own[j] = v.scales[j * stride];
        for (int64_t j = 0; j < SPLIT_KEYS; j += LANES) {
            store(scale + j, load(own + j)), store(least + j, load(own + j) * all(-128.0f));
        }
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
        for (int64_t d = 0; d < D; d += GROUP) {
            const int64_t ahead_bytes = GROUP * ahead.strides[2] / D, ahead_at = d / GROUP * ahead_bytes;
            Factors factors[R];
            float units[R], totals[R];
            for (int r = 0; r < R; r++) units[r] = factors[r].set(q + r * D + d, totals + r), totals[r] *= units[r];
            float scale[SPLIT_KEYS], least[SPLIT_KEYS];
            load_scales<KIND>(k, d, n, scale, least);
            for (int64_t j0 = 0; j0 < n; j0 += LANES) {
#ifdef LITGPT_BYTE_PRODUCTS
                asm volatile("" : : "r"(factors) : "memory");  // else GCC keeps LANES copies of each factor in memory
#endif
                const char* keys[LANES];
                UNROLLED for (int j = 0; j < LANES; j++) {
                    const int64_t slot = std::min(j0 + j, n - 1);  // after the last one, it again
                    prefetch(ahead.codes_of(slot) + ahead_at, ahead_bytes);
                    keys[j] = k.codes_of(slot);
                }
                QuadSums sums[R];
                UNROLLED for (int i = 0; i < GROUP; i += CHUNK) {
                    Quads quads[LANES];
                    UNROLLED for (int j = 0; j < LANES; j++) quads[j] = load_codes<KIND>(keys[j], D, d + i);
                    transpose(quads);
                    UNROLLED for (int j = 0; j < LANES; j++) {
                        const Multiplied codes = multiplied(quads[j]);
                        UNROLLED for (int r = 0; r < R; r++) add_quad_products(sums[r], codes, factors[r], i / 4 + j);
                    }
                }
                UNROLLED for (int r = 0; r < R; r++) {
                    const Floats products = sums[r].floats() * all(units[r]);
                    const Floats before = d ? load(scores[r] + j0) : zeros();
                    const Floats base = multiply_add(load(least + j0), all(totals[r]), before);
                    store(scores[r] + j0, multiply_add(products, load(scale + j0), base));
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

// Sums of numbers [d, d + CHUNK) of n values times factors, out of order; vectors from FIRST
template <int R, int KIND, int FIRST, int COUNT>
inline void add_part(const Factors* factors, const Vectors& v, const Vectors& ahead, int64_t ahead_at, int64_t ahead_bytes,
                     int64_t n, int64_t D, int64_t d, Floats (*out)[4]) {
    QuadSums sums[R][COUNT];
    for (int64_t j = 0; j < n; j += 4) {  // four values at a time
        Quads values[4], quads[4];
        UNROLLED for (int i = 0; i < 4; i++) {
            const int64_t slot = std::min(j + i, n - 1);
            if (FIRST == 0) prefetch(ahead.codes_of(slot) + ahead_at, ahead_bytes);
            values[i] = load_codes<KIND>(v.codes_of(slot), D, d);
        }
        if (FIRST == 0) interleave<false>(values, quads[0], quads[1]);
        if (FIRST + COUNT == 4) interleave<true>(values, quads[2], quads[3]);
        Multiplied codes[COUNT];
        UNROLLED for (int p = 0; p < COUNT; p++) codes[p] = multiplied(quads[FIRST + p]);
        UNROLLED for (int r = 0; r < R; r++) UNROLLED for (int p = 0; p < COUNT; p++)
            add_quad_products(sums[r][p], codes[p], factors[r], int(j / 4));
    }
    UNROLLED for (int r = 0; r < R; r++) UNROLLED for (int p = 0; p < COUNT; p++) out[r][FIRST + p] = sums[r][p].floats();
}

// Sums of n encoded values, as the weights (0 after the last) of R queries say: out (R, D). As many codes `ahead` are
// prefetched.
template <int R, int KIND>
void add_encoded(const float (*weights)[SPLIT_KEYS], const Vectors& v, const Vectors& ahead, int64_t n, int64_t D, float* out) {
    if (D % GROUP == 0) {
        for (int64_t d = 0; d < D; d += GROUP) {
            const int64_t ahead_bytes = GROUP * ahead.strides[2] / D, ahead_at = d / GROUP * ahead_bytes;
            float scale[SPLIT_KEYS], least[SPLIT_KEYS] = {};
            load_scales<KIND>(v, d, n, scale, least);
            Factors factors[R];
            float units[R], bases[R];
            for (int r = 0; r < R; r++) {
                float scaled[SPLIT_KEYS], total;
                Floats base = zeros();
                for (int j = 0; j < SPLIT_KEYS; j += LANES) {
                    const Floats weight = load(weights[r] + j);
                    store(scaled + j, weight * load(scale + j));
                    base = multiply_add(weight, load(least + j), base);
                }
                units[r] = factors[r].set(scaled, &total);
                bases[r] = KIND == INT8 ? -128.0f * total * units[r] : sum(base);  // of the rounded weights
            }
            for (int i = 0; i < GROUP; i += CHUNK) {
                Floats sums[R][4];
                const int64_t bytes = i == 0 ? ahead_bytes : 0;
                if constexpr (4 * R <= QUAD_SUMS) {
                    add_part<R, KIND, 0, 4>(factors, v, ahead, ahead_at, bytes, n, D, d + i, sums);
                } else {
                    add_part<R, KIND, 0, 2>(factors, v, ahead, ahead_at, bytes, n, D, d + i, sums);
                    add_part<R, KIND, 2, 2>(factors, v, ahead, ahead_at, 0, n, D, d + i, sums);
                }
                for (int r = 0; r < R; r++) {
                    UNROLLED for (int p = 0; p < 4; p++) sums[r][p] = multiply_add(sums[r][p], all(units[r]), all(bases[r]));
                    store_in_order(out + r * D + d + i, sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
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
    int64_t at = 0;
    for (; at + LANES <= R * x.D; at += LANES) store(queries + at, load(x.q + at));
    for (; at < R * x.D; at++) queries[at] = widen(x.q[at]);
    prefetch(v.scales, x.n * v.scale_strides[2] * int64_t(sizeof(bf16)));
    with_kind(k, [&](auto kind) { multiply_encoded<R, decltype(kind)::value>(queries, k, v, x.n, x.D, scores); });
    for (int r = 0; r < R; r++) weigh(scores[r], x.bias[r], x.n, x.scale, x.cap, x.top + r, x.total + r);
    prefetch(next_k.scales, x.n * next_k.scale_strides[2] * int64_t(sizeof(bf16)));
    with_kind(v, [&](auto kind) { add_encoded<R, decltype(kind)::value>(scores, v, next_k, x.n, x.D, x.out); });
}
