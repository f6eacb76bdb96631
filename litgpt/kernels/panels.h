// Parts of matrices in bfloat16, rearranged for `compute_block`: panels of 64 columns, pairs of their numbers one after the other.

#pragma once

#include "weights.h"

// Columns of a panel from `target` on, at most LANES, each of which has K numbers at `x`, by `stride`; zeros up to `size`, a
// multiple of 32, and in the columns after the `count` that there are.
INLINED void lay_out_columns(uint32_t* target, const bf16* x, int64_t stride, int64_t count, int64_t K, int64_t size) {
    for (int64_t k = 0; k < size; k += 2 * LANES) {
        Pairs part[LANES];
        for (int64_t i = 0; i < LANES; i++) {
            uint32_t padded[LANES] = {};
            const bf16* own = x + i * stride + k;
            const bool whole = i < count && k + 2 * LANES <= K;
            if (!whole && i < count && k < K) std::memcpy(padded, own, (K - k) * sizeof(bf16));
            part[i] = load_pairs(whole ? (const uint32_t*)own : padded);
        }
        transpose(part);
        for (int64_t p = 0; p < LANES; p++) store_pairs(target + (k / 2 + p) * BLOCK_TILE, part[p]);
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
        const bf16 *first = k < K ? x + k * stride : none, *second = k + 1 < K ? x + (k + 1) * stride : none;
        if (count == BLOCK_TILE) {
            pair_up(first, second, target, BLOCK_TILE);
        } else {
            pair_up(first, second, target, count);
            std::fill(target + count, target + BLOCK_TILE, 0);
        }
    }
}

// y (LANES, size), by `stride`, of columns of K rows at x, by `x_stride`: `count` columns at most, and zeros
INLINED void lay_out_transposed(Input* y, int64_t stride, const bf16* x, int64_t x_stride, int64_t count, int64_t K, int64_t size) {
    const bf16 none[LANES] = {};
    for (int64_t k = 0; k < size; k += 2 * LANES) {
        Pairs part[LANES];
        for (int64_t i = 0; i < LANES; i++) {
            uint32_t pairs[LANES] = {};
            const auto row = [&](int64_t k) { return k < K ? x + k * x_stride : none; };
            for (int64_t next : {0, 1}) __builtin_prefetch(row(k + 2 * LANES + 2 * i + next));
            if (count >= LANES)
                pair_up(row(k + 2 * i), row(k + 2 * i + 1), pairs, LANES);
            else
                pair_up(row(k + 2 * i), row(k + 2 * i + 1), pairs, count);
            part[i] = load_pairs(pairs);
        }
        transpose(part);
        for (int64_t i = 0; i < std::min<int64_t>(count, LANES); i++) {
            if constexpr (std::is_same_v<Input, bf16>) {
                store_pairs((uint32_t*)(y + i * stride + k), part[i]);
            } else {
                bf16 row[2 * LANES];
                store_pairs((uint32_t*)row, part[i]);
                for (int64_t j = 0; j < 2 * LANES; j++) y[i * stride + k + j] = widen(row[j]);
            }
        }
    }
}
