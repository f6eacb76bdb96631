// Products of matrices in bfloat16 as they lie in memory, for weights that change or that two products read in two ways.
//
// C (M, N) = A (M, K) B (K, N), and a bias for each column. Each thread has rows of its own: it rearranges panels of B right before
// it multiplies them with these, and where A lies column by column, its rows before all panels. That takes a few percent of the
// time, little memory, and no thread waits for another's caches.

#pragma once

#include "panels.h"

struct Matrix {
    const bf16* data;
    int64_t row, column;  // strides, one of which is 1

    const bf16* at(int64_t i, int64_t j) const { return data + i * row + j * column; }
};

struct MatrixProduct {
    static constexpr int64_t LEAST_ROWS = 96;         // of a block, for which rearranging a panel pays
    static constexpr int64_t BLOCK_BYTES = 800 << 10;  // of a block that is rearranged, at most: it stays in the cache
    static constexpr int64_t INPUT_BLOCK = 2048;      // inputs of a panel, at most, and of those in several
    static constexpr int64_t SUM_BYTES = 1 << 20;     // where there are several for an output

    Matrix a, b;
    const bf16 *bias, *added;  // (N,), and (M, N), which may be C: what is added; null: nothing
    bf16* c;
    int64_t M, K, N;

    void run() const {
#pragma omp parallel
        {
            const int64_t threads = omp_get_num_threads(), n = blocks(threads), size = panels() * passes_of((M + n - 1) / n);
#pragma omp for schedule(static)
            for (int64_t t = 0; t < threads; t++)
                for (int64_t i = n * size * t / threads, end = n * size * (t + 1) / threads, next; i < end; i = next) {
                    const int64_t block = i / size, m0 = M * block / n;
                    next = std::min(end, (block + 1) * size);
                    Share{*this, m0, M * (block + 1) / n - m0, size / panels(), i - block * size, next - block * size}.multiply();
                }
        }
    }

private:
    static int64_t padded(int64_t K) { return (K + 31) / 32 * 32; }
    static int64_t passes_of(int64_t rows) { return (rows + ROWS - 1) / ROWS; }
    int64_t panels() const { return (N + BLOCK_TILE - 1) / BLOCK_TILE; }
    int64_t columns(int64_t u) const { return std::min<int64_t>(BLOCK_TILE, N - u * BLOCK_TILE); }
    int64_t depth() const { return std::min(K, INPUT_BLOCK); }  // inputs at a time
    bool is_as_multiplied() const { return std::is_same_v<Input, bf16> && a.column == 1 && (K % 32 == 0); }

    // Of rows
    int64_t blocks(int64_t threads) const {
        const int64_t bytes = is_as_multiplied() ? 0 : M * padded(depth()) * int64_t(sizeof(Input));
        return std::max({std::min(M / LEAST_ROWS, threads), (bytes + BLOCK_BYTES - 1) / BLOCK_BYTES, int64_t(1)});
    }

    // A thread's part of the products of a block of `rows` rows from m0 on with all panels, `passes` with each
    struct Share {
        const MatrixProduct& of;
        int64_t m0, rows, passes, from, to;

        int64_t begin(int64_t u) const { return rows * std::max<int64_t>(0, from - u * passes) / passes; }
        int64_t end(int64_t u) const { return rows * std::min(passes, to - u * passes) / passes; }

        void multiply() const {
            static thread_local Scratch<uint32_t> panel_scratch;
            static thread_local Scratch<Input> input_scratch;
            static thread_local Scratch<float> sum_scratch;
            const int64_t K = of.K, depth = of.depth(), last = (to + passes - 1) / passes, size = padded(depth);
            const int64_t group = depth == K ? last : std::max<int64_t>(1, SUM_BYTES / 4 / BLOCK_TILE / rows);
            uint32_t* panel = panel_scratch.get(size / 2 * BLOCK_TILE);
            Input* inputs = of.is_as_multiplied() ? nullptr : input_scratch.get(rows * size);
            float* sums = depth == K ? nullptr : sum_scratch.get(std::min(group, last) * rows * BLOCK_TILE);
            for (int64_t u0 = from / passes, u1; u0 < last; u0 = u1) {
                u1 = std::min(last, u0 + group);
                for (int64_t k0 = 0, k1; k0 < K; k0 = k1) {
                    k1 = std::min(K, k0 + depth);
                    if (inputs) of.rearrange(m0, rows, k0, k1, inputs, size);
                    const Rows x = inputs ? Rows{(const char*)inputs, size * int64_t(sizeof(Input))}
                                          : Rows{(const char*)of.a.at(m0, k0), of.a.row * int64_t(sizeof(bf16))};
                    for (int64_t u = u0; u < u1; u++) {
                        of.lay_out(panel, u, k0, k1);
                        const Panel next = u + 1 < u1 ? Panel{u + 1, k0, k1} : k1 < K ? Panel{u0, k1, std::min(K, k1 + depth)}
                                                                                    : Panel{u1, 0, u1 < last ? depth : 0};
                        of.multiply(panel, {u, k0, k1}, x, m0, begin(u), end(u), sums + (u - u0) * rows * BLOCK_TILE, next);
                    }
                }
            }
        }
    };

    struct Panel {  // rows [k0, k1) of panel u
        int64_t u, k0, k1;
    };

    // Rows [begin, end) of x, which are those from m0 on of A, by a panel; sums: of the panels before, if there are more
    void multiply(const uint32_t* panel, const Panel& p, const Rows& x, int64_t m0, int64_t begin, int64_t end, float* sums,
                  const Panel& next) const {
        const int64_t first = p.u * BLOCK_TILE, count = columns(p.u), size = padded(p.k1 - p.k0), passes = passes_of(end - begin);
        const bool is_first = p.k0 == 0, is_last = p.k1 == K, is_plain = count == BLOCK_TILE && !bias;
        float part[ROWS * BLOCK_TILE];
        for (int64_t pass = 0, m = begin, m1; pass < passes; pass++, m = m1) {
            m1 = m + (end - m) / (passes - pass);
            bf16* y = c + (m0 + m) * N + first;
            const bf16* more = added ? added + (m0 + m) * N + first : nullptr;
            prefetch_panel(next, pass, passes);
            for (int64_t i = 0; is_last && i < m1 - m; i++) {
                __builtin_prefetch(y + i * N, 1), __builtin_prefetch(y + i * N + count - 1, 1);
                if (more != y && more) __builtin_prefetch(more + i * N), __builtin_prefetch(more + i * N + count - 1);
            }
            compute_block(panel, size, {x.start + m * x.stride, x.stride}, int(m1 - m), part);
            for (int64_t i = 0; i < m1 - m; i++, y += N, more += more ? N : 0) {
                float *values = part + i * BLOCK_TILE, *before = sums + (m + i) * BLOCK_TILE;
                if (!is_first) store_sums(values, before, values);
                if (!is_last)
                    std::copy_n(values, BLOCK_TILE, before);
                else if (is_plain && more)
                    store_sums(values, more, y);
                else if (is_plain)
                    UNROLLED for (int j = 0; j < BLOCK_TILE; j += LANES) store(y + j, load(values + j));
                else
                    store_values(values, first, count, more, y);
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

    // Asks for one of `parts` of a panel, if there is such a panel. Inlined, or GCC leaves it out: it has no result.
    INLINED void prefetch_panel(const Panel& p, int64_t part, int64_t parts) const {
        const bool by_row = b.column == 1;
        if (p.k0 == p.k1 || p.u == panels()) return;
        const int64_t n = by_row ? p.k1 - p.k0 : columns(p.u);
        const int64_t bytes = (by_row ? columns(p.u) : p.k1 - p.k0) * int64_t(sizeof(bf16));
        for (int64_t i = n * part / parts; i < n * (part + 1) / parts; i++) {
            const bf16* line = by_row ? b.at(p.k0 + i, p.u * BLOCK_TILE) : b.at(p.k0, p.u * BLOCK_TILE + i);
            for (int64_t j = 0; j < bytes; j += 64) __builtin_prefetch((const char*)line + j);
        }
    }

    // Inputs [k0, k1) of rows [m0, m0 + rows) of A
    NOT_INLINED void rearrange(int64_t m0, int64_t rows, int64_t k0, int64_t k1, Input* inputs, int64_t size) const {
        for (int64_t m = 0; m < rows; m += BLOCK_TILE) {
            const int64_t count = std::min<int64_t>(BLOCK_TILE, rows - m);
            Input* own = inputs + m * size;
            if (a.column == 1)
                for (int64_t i = 0; i < count; i++)
                    prepare_inputs(a.at(m0 + m + i, k0), k1 - k0, (char*)(own + i * size), size * sizeof(Input));
            else
                lay_out_transposed(own, size, a.at(m0 + m, k0), a.column, count, k1 - k0, padded(k1 - k0));
        }
    }

    // y = a + b for a row of a panel
    template <class T>
    INLINED static void store_sums(const float* a, const T* b, T* y) {
        UNROLLED for (int j = 0; j < BLOCK_TILE; j += LANES) store(y + j, load(a + j) + load(b + j));
    }

    void store_values(float* values, int64_t first, int64_t count, const bf16* more, bf16* y) const {
        if (bias)
            for (int64_t j = 0; j < count; j++) values[j] += widen(bias[first + j]);
        int64_t j = 0;
        for (; j + LANES <= count; j += LANES) store(y + j, more ? load(more + j) + load(values + j) : load(values + j));
        for (; j < count; j++) y[j] = narrow(more ? widen(more[j]) + values[j] : values[j]);
    }
};
