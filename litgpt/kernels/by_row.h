// Tiles of products where weights lie row by row in the type of the inputs. Compiled in products.cpp and float32.cpp only.

#pragma once

#include "weights.h"

constexpr int ROW_TILE = 32;  // outputs of a tile, where weights lie row by row

// Bytes of a row of `size` inputs, of which K are there; 0 where rows are used as they are
inline int64_t padded_row_bytes(int64_t size, int64_t K) {
    return std::is_same_v<Input, Real> && size == K ? 0 : size * int64_t(sizeof(Input));
}

// Weights that lie row by row. Four outputs are computed at a time; at the end the last one is repeated. A subclass has
// SIZE bytes for each number, `numbers` (those of a row from k on) and `factor` (of a row).
template <class W>
struct ByRow {
    static constexpr int TILE = ROW_TILE, PASS = ROWS;
    static constexpr int PREFETCH_ROWS = 16;  // distance

    const W& self() const { return *static_cast<const W*>(this); }
    const char* row(int64_t n) const { return (const char*)self().w + n * self().weight_bytes(); }
    const void* at(int64_t u) const { return row(u * TILE); }
    int64_t weight_bytes() const { return self().K * W::SIZE; }
    int64_t row_bytes() const { return padded_row_bytes(self().K, self().K); }
    void prepare(const Real* x, char* row) const { prepare_inputs(x, self().K, row, row_bytes()); }

    template <int M>
    NOT_INLINED void compute_tile(int64_t u, const char* x, int64_t stride, float* y, Prefetch ahead) const {
        compute_rows<M>(u, 0, TILE, x, stride, y, ahead);
    }

    // Half of a tile for one row: see `Tiles`
    void compute_half(int64_t u, int from, const char* x, float* y) const {
        compute_rows<1>(u, from, from + TILE / 2, x, 0, y, {nullptr, 0, 1});
    }

    // Outputs [from, to) of tile u
    template <int M>
    INLINED void compute_rows(int64_t u, int from, int to, const char* x, int64_t stride, float* y, Prefetch ahead) const {
        for (int64_t i = from; i < to && u * TILE + i < self().N; i += 4) {
            int64_t rows[4];
            for (int r = 0; r < 4; r++) rows[r] = std::min(u * TILE + i + r, self().N - 1);
            const char* next = ahead.passes ? row(u * TILE + i + PREFETCH_ROWS) : nullptr;
            if (ahead.start && ahead.pass == 1) next = (const char*)ahead.start + i * self().weight_bytes();
            self().template four_outputs<M>(rows, x, stride, y + i, next);
        }
    }

    template <int M>
    NOT_INLINED void four_outputs(const int64_t* n, const char* x, int64_t stride, float* y, const char* ahead) const {
        const char* rows[4] = {row(n[0]), row(n[1]), row(n[2]), row(n[3])};
        float totals[M][4];
        if constexpr (outputs_by_row(M) == 4) {
            Floats sums[M][4];
            add_rows<M, 4>(rows, x, stride, ahead, sums);
            UNROLLED for (int m = 0; m < M; m++)
                store_sums(totals[m], sums[m][0], sums[m][1], sums[m][2], sums[m][3]);
        } else {
            Floats first[M][2], last[M][2];
            add_rows<M, 2>(rows, x, stride, ahead, first);
            add_rows<M, 2>(rows + 2, x, stride, nullptr, last);
            UNROLLED for (int m = 0; m < M; m++)
                store_sums(totals[m], first[m][0], first[m][1], last[m][0], last[m][1]);
        }
        for (int m = 0; m < M; m++)
            for (int r = 0; r < 4; r++) y[m * TILE + r] = totals[m][r] * self().factor(n[r]);
    }

private:
    // Products of R weights with M rows, as partial sums
    template <int M, int R>
    void add_rows(const char* const* rows, const char* x, int64_t stride, const char* ahead, Floats (&sums)[M][R]) const {
        const int64_t K = self().K;
        UNROLLED for (int m = 0; m < M; m++) UNROLLED for (int r = 0; r < R; r++) sums[m][r] = zeros();
        const auto add = [&](int64_t k, int64_t n) {
            Numbers weights[R];
            UNROLLED for (int r = 0; r < R; r++) weights[r] = W::numbers(rows[r], k, n);
            UNROLLED for (int m = 0; m < M; m++) {
                const Numbers inputs = load_numbers((const Input*)(x + m * stride) + k, n);
                UNROLLED for (int r = 0; r < R; r++) sums[m][r] = add_products(sums[m][r], weights[r], inputs);
            }
        };
        int64_t k = 0;
        for (; k + NUMBERS <= K; k += NUMBERS) {
            if (ahead) prefetch(ahead + 4 * W::SIZE * k, 4 * W::SIZE * NUMBERS);
            add(k, NUMBERS);
        }
        if (k < K) add(k, K - k);
    }
};

// Numbers row by row
struct Plain : ByRow<Plain> {
    static constexpr int SIZE = sizeof(Real);
    const Real* w;
    int64_t K, N;

    explicit Plain(const Weight& x) : w((const Real*)x.w), K(x.K), N(x.N) {}

    float factor(int64_t) const { return 1.0f; }
    static Numbers numbers(const char* row, int64_t k, int64_t n) { return load_numbers((const Real*)row + k, n); }
};

// Outputs of tile u for up to PASS rows from row m on
template <class W>
NOT_INLINED void compute_tile(const W& w, int64_t u, const Rows& x, int64_t m, int rows, float* y, Prefetch ahead) {
    const char* start = x.start + m * x.stride;
    if (rows == 1) return w.template compute_tile<1>(u, start, x.stride, y, ahead);
    if (rows == 2) return w.template compute_tile<2>(u, start, x.stride, y, ahead);
    if (rows == 3) return w.template compute_tile<3>(u, start, x.stride, y, ahead);
    if (rows == 4) return w.template compute_tile<4>(u, start, x.stride, y, ahead);
    if constexpr (W::PASS >= 5)
        if (rows == 5) return w.template compute_tile<5>(u, start, x.stride, y, ahead);
    if constexpr (W::PASS >= 6)
        if (rows == 6) return w.template compute_tile<6>(u, start, x.stride, y, ahead);
}

template <class W>
void compute_half_tile(const W& w, int64_t u, int from, const Rows& x, float* y) {
    w.compute_half(u, from, x.start, y);
}

// What algorithms know of a weight
template <class W>
struct Kind final : Tiles {
    W w;

    explicit Kind(const W& w) : Tiles(w.K, w.N, W::TILE, W::PASS, w.row_bytes()), w(w) {}

    void prepare(const Real* x, char* row) const override { w.prepare(x, row); }
    const void* at(int64_t u) const override { return w.at(u); }
    void compute(int64_t u, const Rows& x, int64_t m, int rows, float* y, Prefetch ahead) const override {
        compute_tile(w, u, x, m, rows, y, ahead);
    }
    void compute_half(int64_t u, int from, const Rows& x, float* y) const override { compute_half_tile(w, u, from, x, y); }
};
