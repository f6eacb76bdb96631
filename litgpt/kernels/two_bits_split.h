// Attention from a few queries over keys of a KV split in 2 bits. Compiled in two_bits_splits.cpp only.
//
// The scales of keys belong to channels and a block of tokens: they are factors of the query, and so keys are plain integers. Of
// four keys, or of four numbers of a key, codes lie in one byte each of 32 bits, shifted apart: quads without any rearrangement.

#pragma once

#include "attention.h"
#include "two_bits.h"

// Products of R queries q (R, D) with SPLIT_KEYS keys: scores
template <int R>
void multiply_two_bits(const float* q, const Vectors& k, int64_t D, float (*scores)[SPLIT_KEYS]) {
    for (int64_t n0 = 0; n0 < SPLIT_KEYS; n0 += k.unit)
        for (int64_t d0 = 0; d0 < D; d0 += GROUP) {
            const Vectors block = k.at(0, 0, n0);
            const int64_t size = std::min(GROUP, D - d0);
            const uint32_t* codes = (const uint32_t*)block.codes + d0 / WORD * k.unit;
            float scale[GROUP] = {}, least[GROUP] = {};
            if (size == GROUP)
                for (int64_t d = 0; d < GROUP; d += LANES) {
                    store(scale + d, load(block.scales + d0 + d)), store(least + d, load(block.scales + D + d0 + d));
                }
            else
                for (int64_t d = 0; d < size; d++)
                    scale[d] = widen(block.scales[d0 + d]), least[d] = widen(block.scales[D + d0 + d]);
            Factors<GROUP> factors[R];
            float bases[R];
            for (int r = 0; r < R; r++) bases[r] = factors[r].set_scaled(q + r * MAX_D + d0, scale, least);
            for (int64_t j = 0; j < k.unit; j += LANES) {
                QuadSums sums[R];
                UNROLLED for (int r = 0; r < R; r++) sums[r].clear();
                UNROLLED for (int w = 0; w < GROUP / WORD; w++) {
                    if (w * WORD >= size) break;
                    const Pairs own = load_pairs(codes + w * k.unit + j);
                    UNROLLED for (int s = 0; s < 4; s++) {
                        const Multiplied quads = multiplied(two_bits(own, s));
                        UNROLLED for (int r = 0; r < R; r++) add_quad_products(sums[r], quads, factors[r], 4 * w + s);
                    }
                }
                UNROLLED for (int r = 0; r < R; r++) {
                    const Floats before = d0 ? load(scores[r] + n0 + j) : zeros();
                    store(scores[r] + n0 + j, multiply_add(sums[r].floats(), all(factors[r].unit), all(bases[r]) + before));
                }
            }
        }
}

// Sums of SPLIT_KEYS values as the weights of R queries say: out (R, D)
template <int R>
void add_two_bits(const float (*weights)[SPLIT_KEYS], const Vectors& v, int64_t D, float* out) {
    const int64_t width = words(D) * WORD;
    for (int64_t d0 = 0; d0 < D; d0 += v.group) {
        const bf16* scales = v.scales + d0 / v.group * 2 * v.unit;
        Factors<SPLIT_KEYS> factors[R];
        float bases[R];
        for (int r = 0; r < R; r++) bases[r] = factors[r].set_scaled(weights[r], scales, scales + v.unit);
        const int64_t end = std::min(d0 + v.group, D);
        for (int64_t d = d0; d < end; d += LANES) {
            QuadSums sums[R];
            UNROLLED for (int r = 0; r < R; r++) sums[r].clear();
            UNROLLED for (int i = 0; i < SPLIT_KEYS / WORD; i++) {
                const Pairs own = load_pairs((const uint32_t*)v.codes + i * width + d);
                UNROLLED for (int s = 0; s < 4; s++) {
                    const Multiplied quads = multiplied(two_bits(own, s));
                    UNROLLED for (int r = 0; r < R; r++) add_quad_products(sums[r], quads, factors[r], 4 * i + s);
                }
            }
            UNROLLED for (int r = 0; r < R; r++) {
                const Floats y = multiply_add(sums[r].floats(), all(factors[r].unit), all(bases[r]));
                if (d + LANES <= end) {
                    store(out + r * D + d, y);
                } else {
                    float part[LANES];
                    store(part, y);
                    std::copy(part, part + end - d, out + r * D + d);
                }
            }
        }
    }
}

// As `attend_encoded`, over SPLIT_KEYS keys in 2 bits
template <int R>
void attend_two_bits(const SplitQueries& x, const Vectors& k, const Vectors& v, const Vectors& next_k) {
    float scores[R][SPLIT_KEYS], queries[R * MAX_D];
    const int64_t padded = (x.D + GROUP - 1) / GROUP * GROUP;
    for (int r = 0; r < R; r++) {
        for (int64_t d = 0; d < x.D; d++) queries[r * MAX_D + d] = widen(x.q[r * x.D + d]);
        std::fill(queries + r * MAX_D + x.D, queries + r * MAX_D + padded, 0.0f);
    }
    const auto ahead = [](const Vectors& own) {
        const int64_t blocks = SPLIT_KEYS / own.unit;
        prefetch(own.codes, blocks * own.strides[2]);
        prefetch(own.scales, blocks * own.scale_strides[2] * int64_t(sizeof(bf16)));
    };
    ahead(v);
    multiply_two_bits<R>(queries, k, x.D, scores);
    for (int r = 0; r < R; r++) weigh(scores[r], x.bias[r], x.n, x.scale, x.cap, x.top + r, x.total + r);
    ahead(next_k);
    add_two_bits<R>(scores, v, x.D, x.out);
}
