// Products of matrices in bfloat16 as they lie in memory, for weights that change or that two products read in two ways.
//
// C (M, N) = A (M, K) B (K, N), and a bias for each column. Each thread rearranges panels of B right before it multiplies many
// rows with them: that takes a few percent of the time, and no memory.

#pragma once

#include "panels.h"

struct Matrix {
    const bf16* data;
    int64_t row, column;  // strides, one of which is 1

    const bf16* at(int64_t i, int64_t j) const { return data + i * row + j * column; }
};

struct MatrixProduct {
    static constexpr int64_t ROW_BLOCK = 2048;    // rows of A that are rearranged at a time
    static constexpr int64_t INPUT_BLOCK = 2048;  // inputs of a panel: it stays in the cache

    Matrix a, b;
    const bf16* bias;
    bf16* c;
    int64_t M, K, N;
    bool adds;  // to what C is

    void run() const {
        static thread_local Scratch<Input> a_scratch;
        const int64_t size = padded(K);
        const bool as_is = std::is_same_v<Input, bf16> && a.column == 1 && size == K;
        Input* inputs = as_is ? nullptr : a_scratch.get(std::min(M, ROW_BLOCK) * size);
#pragma omp parallel
        for (int64_t m0 = 0; m0 < M; m0 += ROW_BLOCK) {
            const int64_t rows = std::min(ROW_BLOCK, M - m0);
            if (!as_is) rearrange(m0, rows, inputs, size);
            const Rows x = as_is ? Rows{(const char*)a.at(m0, 0), a.row * int64_t(sizeof(bf16))}
                                 : Rows{(const char*)inputs, size * int64_t(sizeof(Input))};
            const int64_t passes = (rows + ROWS - 1) / ROWS, parts = panels() * passes, threads = omp_get_num_threads();
#pragma omp for schedule(static)
            for (int64_t t = 0; t < threads; t++)
                for (int64_t i = parts * t / threads, next; i < parts * (t + 1) / threads; i = next) {
                    const int64_t u = i / passes, first = u * passes;
                    next = std::min(parts * (t + 1) / threads, first + passes);
                    multiply(u, x, rows * (i - first) / passes, rows * (next - first) / passes, m0);
                }
        }
    }

private:
    static int64_t padded(int64_t K) { return (K + 31) / 32 * 32; }
    int64_t panels() const { return (N + BLOCK_TILE - 1) / BLOCK_TILE; }
    int64_t columns(int64_t u) const { return std::min<int64_t>(BLOCK_TILE, N - u * BLOCK_TILE); }

    // Rows [begin, end) of x, which are those from m0 on of A, by panel u of B
    void multiply(int64_t u, const Rows& x, int64_t begin, int64_t end, int64_t m0) const {
        static thread_local Scratch<uint32_t> panel_scratch;
        static thread_local Scratch<float> sum_scratch;
        uint32_t* panel = panel_scratch.get(padded(std::min(K, INPUT_BLOCK)) / 2 * BLOCK_TILE);
        float part[ROWS * BLOCK_TILE], *sums = K > INPUT_BLOCK ? sum_scratch.get((end - begin) * BLOCK_TILE) : nullptr;
        const int64_t first = u * BLOCK_TILE, count = columns(u), passes = (end - begin + ROWS - 1) / ROWS;
        for (int64_t k0 = 0, k1; k0 < K; k0 = k1) {
            k1 = std::min(K, k0 + INPUT_BLOCK);
            lay_out(panel, u, k0, k1);
            for (int64_t pass = 0; pass < passes; pass++) {
                const int64_t m = begin + (end - begin) * pass / passes, n = begin + (end - begin) * (pass + 1) / passes - m;
                bf16* y = c + (m0 + m) * N + first;
                if (k1 < K)
                    prefetch_panel(u, k1, std::min(K, k1 + INPUT_BLOCK), pass, passes);
                else
                    prefetch_panel(u + 1, 0, std::min(K, INPUT_BLOCK), pass, passes);
                for (int64_t i = 0; i < n; i++) __builtin_prefetch(y + i * N, 1), __builtin_prefetch(y + i * N + count - 1, 1);
                compute_block(panel, padded(k1 - k0), {x.start + m * x.stride + k0 * int64_t(sizeof(Input)), x.stride}, int(n), part);
                for (int64_t i = 0; i < n; i++) {
                    float *values = part + i * BLOCK_TILE, *before = sums + (m + i - begin) * BLOCK_TILE;
                    for (int64_t j = 0; k0 && j < BLOCK_TILE; j += LANES) store(values + j, load(values + j) + load(before + j));
                    if (k1 < K)
                        std::copy_n(values, BLOCK_TILE, before);
                    else
                        store_values(values, first, count, y + i * N);
                }
            }
        }
    }

    // Rows [k0, k1) of panel u of B, as they are multiplied
    NOT_INLINED void lay_out(uint32_t* panel, int64_t u, int64_t k0, int64_t k1) const {
        const int64_t count = columns(u), n = k1 - k0;
        if (b.column == 1)
            lay_out_rows(panel, b.at(k0, u * BLOCK_TILE), b.row, count, n, padded(n));
        else
            for (int64_t j = 0; j < BLOCK_TILE; j += LANES)
                lay_out_columns(panel + j, b.at(k0, u * BLOCK_TILE + std::min(j, count - 1)), b.column, count - j, n, padded(n));
    }

    // Asks for one of `parts` of them, if there is such a panel. Inlined, or GCC leaves it out: it has no result.
    INLINED void prefetch_panel(int64_t u, int64_t k0, int64_t k1, int64_t part, int64_t parts) const {
        const bool by_row = b.column == 1;
        const int64_t n = u == panels() ? 0 : by_row ? k1 - k0 : columns(u);
        const int64_t bytes = (by_row ? columns(u) : k1 - k0) * int64_t(sizeof(bf16));
        for (int64_t i = n * part / parts; i < n * (part + 1) / parts; i++) {
            const bf16* line = by_row ? b.at(k0 + i, u * BLOCK_TILE) : b.at(k0, u * BLOCK_TILE + i);
            for (int64_t j = 0; j < bytes; j += 64) __builtin_prefetch((const char*)line + j);
        }
    }

    // Rows [m0, m0 + rows) of A, by all threads of a team
    void rearrange(int64_t m0, int64_t rows, Input* inputs, int64_t size) const {
#pragma omp for schedule(static)
        for (int64_t m = 0; m < rows; m += BLOCK_TILE) {
            const int64_t count = std::min<int64_t>(BLOCK_TILE, rows - m);
            Input* own = inputs + m * size;
            if (a.column == 1)
                for (int64_t i = 0; i < count; i++)
                    prepare_inputs(a.at(m0 + m + i, 0), K, (char*)(own + i * size), size * sizeof(Input));
            else
                lay_out_transposed(own, size, a.at(m0 + m, 0), a.column, count, K, size);
        }
    }

    void store_values(float* values, int64_t first, int64_t count, bf16* y) const {
        if (bias)
            for (int64_t j = 0; j < count; j++) values[j] += widen(bias[first + j]);
        int64_t j = 0;
        for (; j + LANES <= count; j += LANES) store(y + j, adds ? load(y + j) + load(values + j) : load(values + j));
        for (; j < count; j++) y[j] = narrow(adds ? widen(y[j]) + values[j] : values[j]);
    }
};
