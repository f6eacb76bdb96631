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

// B by its panels
class Panels final : public Tiles {
    Matrix b;
    uint32_t* panel;
    mutable int64_t current = -1;

public:
    static constexpr int64_t padded(int64_t K) { return (K + 31) / 32 * 32; }

    Panels(Matrix b, int64_t K, int64_t N, Scratch<uint32_t>& scratch)
        : Tiles(K, N, BLOCK_TILE, ROWS, 0), b(b), panel(scratch.get(padded(K) / 2 * BLOCK_TILE)) {}

    void prepare(const Real*, char*) const override {}
    const void* at(int64_t u) const override { return b.at(0, u * BLOCK_TILE); }

    void compute(int64_t u, const Rows& x, int64_t m, int rows, float* y, Prefetch) const override {
        if (current != u) lay_out(u);
        current = u;
        compute_block(panel, padded(K), {x.start + m * x.stride, x.stride}, rows, y);
    }

private:
    int64_t columns(int64_t u) const { return std::min<int64_t>(BLOCK_TILE, N - u * BLOCK_TILE); }

    NOT_INLINED void lay_out(int64_t u) const {
        const int64_t count = columns(u);
        if (b.column == 1)
            lay_out_rows(panel, b.at(0, u * BLOCK_TILE), b.row, count, K, padded(K));
        else
            for (int64_t j = 0; j < BLOCK_TILE; j += LANES)
                lay_out_columns(panel + j, b.at(0, u * BLOCK_TILE + std::min(j, count - 1)), b.column, count - j, K, padded(K));
    }
};

struct MatrixProduct {
    static constexpr int64_t ROW_BLOCK = 2048;  // rows of A that are rearranged at a time

    Matrix a, b;
    const bf16* bias;
    bf16* c;
    int64_t M, K, N;
    bool adds;  // to what C is

    void run() const {
        static thread_local Scratch<Input> a_scratch;
        const int64_t size = Panels::padded(K), most = std::min(M, ROW_BLOCK);
        const bool as_is = std::is_same_v<Input, bf16> && a.column == 1 && size == K;
        Input* inputs = as_is ? nullptr : a_scratch.get(most * size);
#pragma omp parallel
        {
            static thread_local Scratch<uint32_t> scratch;
            const Panels panels(b, K, N, scratch);
            for (int64_t m0 = 0; m0 < M; m0 += as_is ? M : ROW_BLOCK) {
                const int64_t rows = as_is ? M : std::min(ROW_BLOCK, M - m0);
                if (!as_is) rearrange(m0, rows, inputs, size);
                const Rows x = as_is ? Rows{(const char*)a.data, a.row * int64_t(sizeof(bf16))}
                                     : Rows{(const char*)inputs, size * int64_t(sizeof(Input))};
                in_passes(panels, rows, [&](int64_t u, int64_t m, int n, int, int) {
                    float values[ROWS * BLOCK_TILE];
                    const int64_t first = u * BLOCK_TILE, count = std::min<int64_t>(BLOCK_TILE, N - first);
                    bf16* y = c + (m0 + m) * N + first;
                    for (int i = 0; i < n; i++) __builtin_prefetch(y + i * N, 1), __builtin_prefetch(y + i * N + count - 1, 1);
                    panels.compute(u, x, m, n, values, {});
                    for (int i = 0; i < n; i++) store_values(values + i * BLOCK_TILE, first, count, y + i * N);
                });
            }
        }
    }

private:
    // Rows [m0, m0 + rows) of A, by all threads of a team
    void rearrange(int64_t m0, int64_t rows, Input* inputs, int64_t size) const {
#pragma omp for schedule(static)
        for (int64_t m = 0; m < rows; m += LANES) {
            const int64_t count = std::min<int64_t>(LANES, rows - m);
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
