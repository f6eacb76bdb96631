// Attention from a few queries over the encoded keys of a KV split. Compiled in encoded_splits.cpp only.
//
// Products are those of integers: codes in 8 bits, four at a time, and queries or weights in 15 bits (factors.h). Each of LANES
// sums of products with keys is a score.

#pragma once

#include "attention.h"

// Scales of numbers [d, d + 64) of LANES vectors of D, the first of which is vector j, and what the code 0 stands for
template <int KIND>
inline void load_scales(const bf16* scales, int64_t D, int64_t d, int64_t j, Floats& scale, Floats& least) {
    if constexpr (KIND == INT8) {
        scale = load(scales + j), least = scale * all(-128.0f);
    } else {
        const int64_t stride = scale_count(KIND, D);
        const bf16* own = scales + j * stride + d / GROUP * 2;
        const Pairs both = stride == 2 ? load_pairs((const uint32_t*)own) : load_pairs(own, stride, LANES);
        scale = firsts(both), least = seconds(both);
    }
}

// Products of R queries with SPLIT_KEYS encoded keys: scores. As many codes `ahead` are prefetched.
//
// A vector has 16 numbers of each of LANES / 4 keys, so 4 vectors of sums are of LANES keys.
template <int R, int KIND, int D0>
void multiply_encoded(const QueryFactors* queries, const Vectors& k, const Vectors& ahead, int64_t any_D,
                      float (*scores)[SPLIT_KEYS]) {
    constexpr int PARTS = LANES / 4, VECTORS = GROUP / (4 * LANES);
    constexpr int SHARED = LANES == 16 ? 4 : 1;  // vectors that factors are loaded for once: as many as there are registers for
    const int64_t D = D0 ? D0 : any_D, stride = code_bytes(KIND, D), ahead_bytes = LANES * GROUP * ahead.strides[2] / D;
    for (int64_t d = 0; d < D; d += GROUP)
        for (int64_t j = 0; j < SPLIT_KEYS; j += LANES) {
            prefetch(ahead.codes_of(j) + d / GROUP * ahead_bytes, ahead_bytes);
            Integers sums[R][4];
            UNROLLED for (int i0 = 0; i0 < 4; i0 += SHARED) {
                Multiplied codes[VECTORS * PARTS][SHARED];
                UNROLLED for (int i = 0; i < SHARED; i++) UNROLLED for (int v = 0; v < VECTORS; v++) {
                    Quads own[PARTS];
                    UNROLLED for (int p = 0; p < PARTS; p++)
                        own[p] = load_codes<KIND>(k.codes + (j + 4 * p + i0 + i) * stride, D, d + v * 4 * LANES);
                    transpose_parts(own);
                    UNROLLED for (int p = 0; p < PARTS; p++) codes[v * PARTS + p][i] = multiplied(own[p]);
                }
                UNROLLED for (int r = 0; r < R; r++) {
                    const QueryFactors& factors = queries[(r * D + d) / GROUP];
                    QuadSums own[SHARED];
                    UNROLLED for (int i = 0; i < SHARED; i++) own[i].clear();
                    UNROLLED for (int p = 0; p < VECTORS * PARTS; p++) {
                        const Shorts first = four_pairs(factors.first + 4 * p), second = four_pairs(factors.second + 4 * p);
                        UNROLLED for (int i = 0; i < SHARED; i++) add_products_of(own[i], codes[p][i], first, second);
                    }
                    UNROLLED for (int i = 0; i < SHARED; i++) sums[r][i0 + i] = own[i].integers();
                }
            }
            Floats scale, least;
            load_scales<KIND>(k.scales, D, d, j, scale, least);
            UNROLLED for (int r = 0; r < R; r++) {
                const QueryFactors& factors = queries[(r * D + d) / GROUP];
                const Floats products = to_floats(sums_of_parts(sums[r][0], sums[r][1], sums[r][2], sums[r][3])) * all(factors.unit);
                const Floats before = d ? load(scores[r] + j) : zeros();
                const Floats base = multiply_add(least, all(factors.total), before);
                store(scores[r] + j, multiply_add(products, scale, base));
            }
        }
}

// Sums of numbers [d, d + 4 LANES) of SPLIT_KEYS values times factors, out of order; vectors from FIRST
template <int R, int KIND, int FIRST, int COUNT>
inline void add_part(const Factors<SPLIT_KEYS>* factors, const Vectors& v, const char* ahead, int64_t ahead_bytes, int64_t D, int64_t d,
                     Floats (*out)[4]) {
    QuadSums sums[R][COUNT];
    UNROLLED for (int r = 0; r < R; r++) UNROLLED for (int p = 0; p < COUNT; p++) sums[r][p].clear();
    const char* codes = v.codes;
    for (int64_t j = 0; j < SPLIT_KEYS; j += 4) {  // four values at a time
        Quads values[4], quads[4];
        prefetch(ahead, ahead_bytes), ahead += ahead_bytes;
        UNROLLED for (int i = 0; i < 4; i++) values[i] = load_codes<KIND>(codes, D, d), codes += code_bytes(KIND, D);
        if (FIRST == 0) interleave<false>(values, quads[0], quads[1]);
        if (FIRST + COUNT == 4) interleave<true>(values, quads[2], quads[3]);
        Multiplied own[COUNT];
        UNROLLED for (int p = 0; p < COUNT; p++) own[p] = multiplied(quads[FIRST + p]);
        UNROLLED for (int r = 0; r < R; r++) UNROLLED for (int p = 0; p < COUNT; p++)
            add_quad_products(sums[r][p], own[p], factors[r], int(j / 4));
    }
    UNROLLED for (int r = 0; r < R; r++) UNROLLED for (int p = 0; p < COUNT; p++) out[r][FIRST + p] = sums[r][p].floats();
}

// Sums of SPLIT_KEYS encoded values, as the weights of R queries say: out (R, D). As many codes `ahead` are prefetched.
template <int R, int KIND>
void add_encoded(const float (*weights)[SPLIT_KEYS], const Vectors& v, const Vectors& ahead, int64_t D, float* out) {
    for (int64_t d = 0; d < D; d += GROUP) {
        float scale[SPLIT_KEYS], least[SPLIT_KEYS];
        for (int64_t j = 0; j < SPLIT_KEYS; j += LANES) {
            Floats own, base;
            load_scales<KIND>(v.scales, D, d, j, own, base);
            store(scale + j, own), store(least + j, base);
        }
        Factors<SPLIT_KEYS> factors[R];
        float bases[R];
        for (int r = 0; r < R; r++) {
            bases[r] = factors[r].set_scaled(weights[r], scale, KIND == INT8 ? nullptr : least);
            if (KIND == INT8) bases[r] = -128.0f * factors[r].total;  // of the rounded weights
        }
        const int64_t ahead_bytes = 4 * ahead.strides[2] * (4 * LANES) / D;
        for (int i = 0; i < GROUP; i += 4 * LANES) {
            const char* own_ahead = ahead.codes + (d + i) / (4 * LANES) * (SPLIT_KEYS / 4) * ahead_bytes;
            Floats sums[R][4];
            if constexpr (4 * R <= QUAD_SUMS) {
                add_part<R, KIND, 0, 4>(factors, v, own_ahead, ahead_bytes, D, d + i, sums);
            } else {
                add_part<R, KIND, 0, 2>(factors, v, own_ahead, ahead_bytes, D, d + i, sums);
                add_part<R, KIND, 2, 2>(factors, v, own_ahead, 0, D, d + i, sums);
            }
            UNROLLED for (int r = 0; r < R; r++) {
                UNROLLED for (int p = 0; p < 4; p++)
                    sums[r][p] = multiply_add(sums[r][p], all(factors[r].unit), all(bases[r]));
                store_in_order(out + r * D + d + i, sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
            }
        }
    }
}

// The same for head sizes that are no multiple of GROUP, number by number: scores of n keys
template <int KIND>
void multiply_decoded(const SplitQueries& x, const Vectors& k, float (*scores)[SPLIT_KEYS]) {
    for (int64_t j = 0; j < x.n; j++) {
        float key[MAX_D];
        decode_codes<KIND>(k.codes_of(j), k.scales_of(j), x.D, key);
        const float scale = KIND == INT8 ? widen(*k.scales_of(j)) : 1.0f;
        for (int r = 0; r < x.count; r++) {
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t d = 0; d < x.D; d++) sum += key[d] * widen(x.q[r * x.D + d]);
            scores[r][j] = sum * scale;
        }
    }
}

template <int KIND>
void add_decoded(const SplitQueries& x, const float (*weights)[SPLIT_KEYS], const Vectors& v) {
    std::fill_n(x.out, x.count * x.D, 0.0f);
    for (int64_t j = 0; j < x.n; j++) {
        float value[MAX_D];
        decode_codes<KIND>(v.codes_of(j), v.scales_of(j), x.D, value);
        const float scale = KIND == INT8 ? widen(*v.scales_of(j)) : 1.0f;
        for (int r = 0; r < x.count; r++) {
            const float weight = weights[r][j] * scale;
#pragma omp simd
            for (int64_t d = 0; d < x.D; d++) x.out[r * x.D + d] = multiply_add(weight, value[d], x.out[r * x.D + d]);
        }
    }
}

// SPLIT_KEYS vectors that lie one after the other: themselves, or the n that there are copied to `room`, and after them
// codes whose scales are 0
struct WholeSplit {
    char codes[SPLIT_KEYS * MAX_D];
    bf16 scales[SPLIT_KEYS * 2 * (MAX_D / GROUP)];
};

inline Vectors whole_split(const Vectors& v, int64_t n, int64_t D, WholeSplit& room) {
    const int64_t bytes = code_bytes(v.kind, D), count = scale_count(v.kind, D);
    if (n == SPLIT_KEYS && v.strides[2] == bytes && v.scale_strides[2] == count) return v;
    std::memset(room.scales + n * count, 0, (SPLIT_KEYS - n) * count * sizeof(bf16));
    for (int64_t j = 0; j < n; j++) {
        std::memcpy(room.codes + j * bytes, v.codes_of(j), bytes);
        std::memcpy(room.scales + j * count, v.scales_of(j), count * sizeof(bf16));
    }
    Vectors whole = v;
    whole.codes = room.codes, whole.scales = room.scales, whole.strides[2] = bytes, whole.scale_strides[2] = count;
    return whole;
}

// As `attend_rows`, with encoded keys and values; the keys `next_k` are prefetched.
template <int R>
void attend_encoded(const SplitQueries& x, const Vectors& k, const Vectors& v, const Vectors& next_k) {
    static thread_local WholeSplit rooms[2];
    const bool in_groups = x.D % GROUP == 0;
    const Vectors keys = in_groups ? whole_split(k, x.n, x.D, rooms[0]) : k;
    const Vectors values = in_groups ? whole_split(v, x.n, x.D, rooms[1]) : v;
    float scores[R][SPLIT_KEYS];
    prefetch(values.scales, x.n * values.scale_strides[2] * int64_t(sizeof(bf16)));
    with_kind(k, [&](auto kind) {
        constexpr int KIND = decltype(kind)::value;
        if (x.D == 64)
            multiply_encoded<R, KIND, 64>(x.factors, keys, values, 64, scores);
        else if (in_groups)
            multiply_encoded<R, KIND, 0>(x.factors, keys, values, x.D, scores);
        else
            multiply_decoded<KIND>(x, k, scores);
    });
    for (int r = 0; r < R; r++) weigh(scores[r], x.bias[r], x.n, x.scale, x.cap, x.top + r, x.total + r);
    prefetch(next_k.scales, x.n * next_k.scale_strides[2] * int64_t(sizeof(bf16)));
    with_kind(v, [&](auto kind) {
        constexpr int KIND = decltype(kind)::value;
        if (in_groups)
            add_encoded<R, KIND>(scores, values, next_k, x.D, x.out);
        else
            add_decoded<KIND>(x, scores, v);
    });
}
