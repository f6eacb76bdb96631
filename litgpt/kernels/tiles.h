// Tiles of products for each kind of weight. Compiled in products.cpp only.

#pragma once

#include "by_row.h"

// bfloat16 in oneDNN's order for such CPUs: blocks of 64 outputs, within them pairs of inputs, K padded to 32
struct Blocked {
    static constexpr int TILE = BLOCK_TILE, PASS = ROWS;
    const uint32_t* w;
    int64_t K, N;

    Blocked(const void* w, int64_t K, int64_t N) : w((const uint32_t*)w), K(K), N(N) {}
    explicit Blocked(const Weight& x) : Blocked(x.w, x.K, x.N) {}

    int64_t pairs() const { return (K + 31) / 32 * 16; }
    int64_t row_bytes() const { return padded_row_bytes(pairs() * 2, K); }
    void prepare(const bf16* x, char* row) const { prepare_inputs(x, K, row, row_bytes()); }
    const void* at(int64_t u) const { return w + u * pairs() * TILE; }

    template <int M>
    NOT_INLINED void compute_tile(int64_t u, const char* x, int64_t stride, float* y, Prefetch ahead) const {
        constexpr int V = output_vectors(M);
        UNROLLED for (int j = 0; j < TILE; j += V * LANES) compute_columns<M, V>(u, j, x, stride, y, ahead);
    }

    // Half of a tile for one row: see `Tiles`
    NOT_INLINED void compute_half(int64_t u, int from, const char* x, float* y) const {
        constexpr int V = std::min(output_vectors(1), TILE / 2 / LANES);
        UNROLLED for (int j = 0; j < TILE / 2; j += V * LANES) compute_columns<1, V>(u, from + j, x, 0, y, {nullptr, 0, 0});
    }

private:
    // Outputs [j, j + V * LANES) of a tile
    template <int M, int V>
    INLINED void compute_columns(int64_t u, int j, const char* x, int64_t stride, float* y, Prefetch ahead) const {
        const int64_t n = pairs();
        const uint32_t* block = w + u * n * TILE + j;
        Floats sums[M][V];
        UNROLLED for (int m = 0; m < M; m++) UNROLLED for (int v = 0; v < V; v++) sums[m][v] = zeros();
        int countdown = ahead.pass;
        for (int64_t p = 0; p < n; p++, block += TILE) {
            if (ahead.start && countdown-- == 0) {
                prefetch((const uint32_t*)ahead.start + p * TILE + j, V * LANES * 4);
                countdown = ahead.passes - 1;
            }
            add_pairs<M, V>(sums, block, x + 2 * p * int64_t(sizeof(Input)), stride);
        }
        UNROLLED for (int m = 0; m < M; m++) UNROLLED for (int v = 0; v < V; v++)
            store(y + m * TILE + j + LANES * v, sums[m][v]);
    }
};

// 8-bit integers row by row, and a factor for every row: bfloat16 holds the integers exactly
struct Int8 : ByRow<Int8> {
    static constexpr int SIZE = 1;
    const int8_t* w;
    const float* scale;
    int64_t K, N;

    Int8(const int8_t* w, const float* scale, int64_t K, int64_t N) : w(w), scale(scale), K(K), N(N) {}
    explicit Int8(const Weight& x) : Int8((const int8_t*)x.w, (const float*)x.scale, x.K, x.N) {}

    static constexpr bool HAS_FACTORS = true;
    float factor(int64_t n) const { return scale[n]; }

    // LANES pairs of integers of row n from column k on, in bfloat16; zeros after the last
    Pairs pairs(int64_t n, int64_t k) const {
        if (k + 2 * LANES <= K) return int8_pairs(w + n * K + k);
        int8_t padded[2 * LANES] = {};
        if (k < K) std::memcpy(padded, w + n * K + k, K - k);
        return int8_pairs(padded);
    }
    static Numbers numbers(const char* row, int64_t k, int64_t n) { return load_numbers((const int8_t*)row + k, n); }
};

// Pairs of 4-bit integers row by row, even columns in the low halves, with a scale and a minimum (float16) for each
// group of columns, of which K is a multiple
template <int GROUP>
struct Int4 : ByRow<Int4<GROUP>> {
    static constexpr int TILE = ROW_TILE, PASS = INT4_ROWS;
    const uint8_t* w;
    const uint16_t *scale, *minimum;
    int64_t K, N;

    explicit Int4(const Weight& x)
        : w((const uint8_t*)x.w),
          scale((const uint16_t*)x.scale),
          minimum((const uint16_t*)x.minimum),
          K(x.K),
          N(x.N) {}

    int64_t groups() const { return K / GROUP; }
    int64_t weight_bytes() const { return K / 2; }
    int64_t row_bytes() const { return int4_row_bytes(K, groups()); }
    void prepare(const bf16* x, char* row) const { prepare_int4<GROUP>(x, K, row); }

    static constexpr bool HAS_FACTORS = false;
    float factor(int64_t) const { return 1.0f; }

    // LANES pairs of numbers of row n from column k on, in bfloat16; zeros after the last
    Pairs pairs(int64_t n, int64_t k) const {
        static_assert(GROUP % (2 * LANES) == 0);
        if (k >= K) return load_pairs(std::array<uint32_t, LANES>{}.data());
        const int64_t at = n * groups() + k / GROUP;
        return nibble_pairs(w + (n * K + k) / 2, nibble_values(from_half(scale[at]), from_half(minimum[at])));
    }

    template <int M>
    NOT_INLINED void four_outputs(const int64_t* n, const char* x, int64_t stride, float* y, const char* ahead) const {
        const uint8_t* rows[4];
        const uint16_t *scales[4], *minima[4];
        UNROLLED for (int r = 0; r < 4; r++)
            rows[r] = w + n[r] * (K / 2), scales[r] = scale + n[r] * groups(), minima[r] = minimum + n[r] * groups();
        int4_products<GROUP, M>(rows, scales, minima, K, x, stride, y, TILE, ahead);
    }
};

// Integers. Each tile is widened to bfloat16 once, and then multiplied with many rows.
template <class W>
struct Widened {
    static constexpr int TILE = Blocked::TILE, PASS = Blocked::PASS;
    W w;
    int64_t K, N;
    uint32_t* tile;
    mutable int64_t current = -1;  // index of the tile

    Widened(const Weight& x, Scratch<uint32_t>& scratch)
        : w(x), K(x.K), N(x.N), tile(scratch.get(TILE * blocked().pairs())) {}

    Blocked blocked() const { return Blocked(tile, K, TILE); }
    int64_t row_bytes() const { return blocked().row_bytes(); }
    void prepare(const bf16* x, char* row) const { blocked().prepare(x, row); }
    const void* at(int64_t u) const { return w.row(u * TILE); }

    void compute(int64_t u, const Rows& x, int64_t m0, int rows, float* y) const {
        if (current != u) widen_tile(u);
        current = u;
        compute_tile(blocked(), 0, x, m0, rows, y, {nullptr, 0, 0});
        if constexpr (W::HAS_FACTORS) {
            float factors[TILE];
            for (int j = 0; j < TILE; j++) factors[j] = w.factor(std::min(u * TILE + j, N - 1));
            for (int m = 0; m < rows; m++)
                for (int j = 0; j < TILE; j++) y[m * TILE + j] *= factors[j];
        }
    }

private:
    NOT_INLINED void widen_tile(int64_t u) const {
        for (int64_t i = 0; i < TILE; i += LANES)
            for (int64_t p = 0; p < blocked().pairs(); p += LANES) {
                Pairs part[LANES];
                for (int64_t j = 0; j < LANES; j++)  // after the last output, it again
                    part[j] = w.pairs(std::min(u * TILE + i + j, N - 1), 2 * p);
                transpose(part);
                for (int64_t j = 0; j < LANES; j++) store_pairs(tile + (p + j) * TILE + i, part[j]);
            }
    }
};

template <class W>
void compute_tile(const Widened<W>& w, int64_t u, const Rows& x, int64_t m, int rows, float* y, Prefetch) {
    w.compute(u, x, m, rows, y);
}

template <class W>
void compute_half_tile(const Widened<W>& w, int64_t u, int, const Rows& x, float* y) {
    w.compute(u, x, 0, 1, y);  // and the other half, which is widened with it
}
