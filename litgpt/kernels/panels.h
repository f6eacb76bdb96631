// Parts of matrices in bfloat16, rearranged for `compute_block`: panels of 64 columns, pairs of their numbers one after the other.

#pragma once

#include "weights.h"

// Columns of a panel from `target` on, at most LANES, each of which has K numbers at `x`, by `stride`; zeros up to `size`, a
// multiple of 32, and in the columns after the `count` that there are.
INLINED void lay_out_columns(uint32_t* target, const bf16* x, int64_t stride, int64_t count, int64_t K, int64_t size) {
    for (int64_t k = 0; k < size; k += 2 * LANES) {
        Pairs part[LANES];
        if (count >= LANES && k + 2 * LANES <= K) {
            UNROLLED for (int64_t i = 0; i < LANES; i++) part[i] = load_pairs((const uint32_t*)(x + i * stride + k));
        } else {
            for (int64_t i = 0; i < LANES; i++) {
                uint32_t padded[LANES] = {};
                if (i < count && k < K) std::memcpy(padded, x + i * stride + k, std::min<int64_t>(2 * LANES, K - k) * sizeof(bf16));
                part[i] = load_pairs(padded);
            }
        }
        transpose(part);
        UNROLLED for (int64_t p = 0; p < LANES; p++) store_pairs(target + (k / 2 + p) * BLOCK_TILE, part[p]);
    }
}

// y (n,) = pairs of the numbers of a and b
INLINED void pair_up(const bf16* a, const bf16* b, uint32_t* y, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) y[i] = uint32_t(a[i]) | uint32_t(b[i]) << 16;
}

// A panel whose K rows of `count` numbers lie at `x`, by `stride`; zeros up to `size` rows and 64 columns
inline void lay_out_rows(uint32_t* target, const bf16* x, int64_t stride, int64_t count, int64_t K, int64_t size) {
    const bf16 none[BLOCK_TILE] = {};
    for (int64_t k = 0; k < size; k += 2, target += BLOCK_TILE) {
        for (int64_t ahead = k + 32; ahead < k + 34; ahead++)
            __builtin_prefetch(x + ahead * stride), __builtin_prefetch(x + ahead * stride + BLOCK_TILE / 2);
        const bf16 *first = k < K ? x + k * stride : none, *second = k + 1 < K ? x + (k + 1) * stride : none;
        if (count == BLOCK_TILE) {
            pair_up(first, second, target, BLOCK_TILE);
        } else {
            pair_up(first, second, target, count);
            std::fill(target + count, target + BLOCK_TILE, 0);
        }
    }
}

// y (BLOCK_TILE, size), by `stride`, of columns of K rows at x, by `x_stride`: `count` columns, and zeros
INLINED void lay_out_transposed(Input* y, int64_t stride, const bf16* x, int64_t x_stride, int64_t count, int64_t K, int64_t size) {
    constexpr int64_t PART = 8 * LANES;  // rows at a time: read long after they were written, or loads would wait for stores
    uint32_t panel[PART / 2 * BLOCK_TILE];
    for (int64_t k0 = 0; k0 < size; k0 += PART) {
        const int64_t rows = std::min(PART, size - k0);
        lay_out_rows(panel, x + k0 * x_stride, x_stride, count, K - k0, rows);
        for (int64_t j = 0; j < count; j += LANES)
            for (int64_t k = 0; k < rows; k += 2 * LANES) {
                Pairs part[LANES];
                for (int64_t i = 0; i < LANES; i++) part[i] = load_pairs(panel + (k / 2 + i) * BLOCK_TILE + j);
                transpose(part);
                for (int64_t i = 0; i < std::min<int64_t>(count - j, LANES); i++) {
                    Input* to = y + (j + i) * stride + k0 + k;
                    if constexpr (std::is_same_v<Input, bf16>) {
                        store_pairs((uint32_t*)to, part[i]);
                    } else {
                        bf16 row[2 * LANES];
                        store_pairs((uint32_t*)row, part[i]);
                        for (int64_t j = 0; j < 2 * LANES; j++) to[j] = widen(row[j]);
                    }
                }
            }
    }
}
