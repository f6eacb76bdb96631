// Products of rows with large weights. For a few rows memory bandwidth is the limit: all threads read weights in order,
// and prefetch. For many rows arithmetic is the limit: a tile of the weights stays in the processor's cache.
//
// Letters: M rows, K inputs, N outputs. Each kind of weight computes TILE outputs at a time for up to ROWS rows. It may
// rearrange rows first (`prepare`; `row_bytes` is 0 where it takes them as they are). The output of a row does not
// depend on the other rows, to the last bit.

#pragma once

#include "simd/simd.h"
#include "team.h"

constexpr int BLOCK_TILE = 64;  // outputs of a tile in oneDNN's order

enum WeightKind { BLOCKED = 0, INT8_ROWS = 1, INT4_PAIRS = 2, PLAIN_ROWS = 3 };

// A weight: bfloat16 in oneDNN's order for such CPUs (blocks of 64 outputs, within them pairs of inputs, K padded to 32),
// int8, int4 with its group size, or bfloat16 row by row
struct Weight {
    int64_t kind, K, N, group;
    const void *w, *scale, *minimum;
    const Real* bias;
    // Decode steps add (x a^T) b, two small matrices (rank, K) and (rank, N); rank 0: there are none
    int64_t rank;
    const Real* a;
    const float* b;
};

// What the small matrices of a weight add to its outputs; each thread has all of x a^T (M, rank) for itself
class LowRank {
    const Weight& w;
    const float* inner = nullptr;

public:
    LowRank(const Weight& w, const Real* x, int64_t M, Scratch<float>& scratch) : w(w) {
        if (!w.rank) return;
        float* sums = scratch.get(M * w.rank);
        for (int64_t i = 0; i < M * w.rank; i++) sums[i] = dot(x + i / w.rank * w.K, w.a + i % w.rank * w.K, w.K);
        inner = sums;
    }

    // to outputs [first, first + size) of row m
    void add(int64_t m, int64_t first, int64_t size, float* values) const {
        for (int64_t r = 0; r < w.rank; r++) {
            const float factor = inner[m * w.rank + r], *row = w.b + r * w.N + first;
#pragma omp simd
            for (int64_t j = 0; j < size; j++) values[j] += factor * row[j];
        }
    }

private:
    NOT_INLINED static float dot(const Real* x, const Real* y, int64_t n) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < n; i++) sum += widen(x[i]) * widen(y[i]);
        return sum;
    }
};

// The weights of the next tile, which are prefetched while this one is computed: a share in each of its `passes`.
struct Prefetch {
    const void* start;  // null: there are none
    int pass, passes;   // 0 passes: nothing to prefetch
};

// Rows prepared for a weight, with a stride in bytes
struct Rows {
    const char* start;
    int64_t stride;
};

// Outputs [from, to) of tile u, all of it or half, for some rows from row m on: one of `passes` over the tile
struct Part {
    int64_t u, m;
    int rows, pass, passes, from, to;
};

// A weight of any kind, by tiles of its outputs
struct Tiles {
    int64_t K, N;
    int tile, pass;     // outputs of a tile, most rows of a pass
    int64_t row_bytes;  // of prepared rows; 0: rows are used as they are

    Tiles(int64_t K, int64_t N, int tile, int pass, int64_t row_bytes) : K(K), N(N), tile(tile), pass(pass), row_bytes(row_bytes) {}
    virtual void prepare(const Real* x, char* row) const = 0;
    virtual const void* at(int64_t u) const = 0;  // the weights of tile u
    // Outputs of tile u for some rows from row m on: y (rows, tile)
    virtual void compute(int64_t u, const Rows& x, int64_t m, int rows, float* y, Prefetch ahead) const = 0;
    // At least half of them, from output `from` of the tile on, for one row: at their places in y (tile,)
    virtual void compute_half(int64_t u, int, const Rows& x, float* y) const { compute(u, x, 0, 1, y, {nullptr, 0, 1}); }

    void compute(const Part& p, const Rows& x, float* y) const {
        if (p.to - p.from == tile)
            compute(p.u, x, p.m, p.rows, y, next(p.u, p.pass, p.passes));
        else
            compute_half(p.u, p.from, x, y);
    }
    int64_t first(const Part& p) const { return p.u * tile + p.from; }
    int64_t size(const Part& p) const { return std::min<int64_t>(p.to, N - p.u * tile) - p.from; }  // of outputs that there are

    int64_t n_tiles() const { return (N + tile - 1) / tile; }
    int64_t stride() const { return row_bytes ? (row_bytes + 63) / 64 * 64 : K * int64_t(sizeof(Real)); }

    // What to prefetch in a pass over tile u
    Prefetch next(int64_t u, int pass, int passes) const {
        return {passes > 1 && u + 1 < n_tiles() ? at(u + 1) : nullptr, pass, passes};
    }
};

// The tiles of a weight; with `scratch`, for many rows: tiles of integers are widened there to bfloat16, once for all rows.
class TilesOf {
    alignas(16) char place[sizeof(Tiles) + 80];
    const Tiles* tiles;

public:
    explicit TilesOf(const Weight& w, Scratch<uint32_t>* scratch = nullptr);  // in products.cpp
    TilesOf(const TilesOf&) = delete;
    const Tiles& operator*() const { return *tiles; }
};

// One tile of 64 outputs in oneDNN's order, whose K is a multiple of 32: y (rows, 64). In products.cpp.
void compute_block(const uint32_t* w, int64_t K, const Rows& x, int rows, float* y);

NOT_INLINED inline void prepare_inputs(const Real* x, int64_t K, char* row, int64_t bytes) {
    std::memset(row + K * sizeof(Input), 0, bytes - K * sizeof(Input));
    if constexpr (std::is_same_v<Input, Real>)
        std::memcpy(row, x, K * sizeof(Real));
    else
        for (int64_t k = 0; k < K; k++) ((float*)row)[k] = widen(x[k]);
}

inline Rows rows_for(const Tiles& w, const Real* x, int64_t M, Scratch<char>& scratch) {
    const int64_t stride = w.stride();
    if (w.row_bytes == 0) return {(const char*)x, stride};
    char* start = scratch.get(M * stride);
    for (int64_t m = 0; m < M; m++) w.prepare(x + m * w.K, start + m * stride);
    return {start, stride};
}

// Calls f(u, m, rows, pass, passes) for all tiles u and passes over M rows, which have about the same size; called by
// all threads of a team.
template <class F>
void in_passes(const Tiles& w, int64_t M, F f) {
    const int64_t passes = (M + w.pass - 1) / w.pass;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < w.n_tiles() * passes; i++) {
        const int64_t pass = i % passes, m = M * pass / passes;
        f(i / passes, m, int(M * (pass + 1) / passes - m), int(pass), int(passes));
    }
}

// The same with parts of tiles: of one row also halves, so that all threads have as much to do
template <class F>
void in_parts(const Tiles& w, int64_t M, F f) {
    if (M > 1)
        return in_passes(w, M, [&](int64_t u, int64_t m, int rows, int pass, int passes) { f(Part{u, m, rows, pass, passes, 0, w.tile}); });
    const int64_t threads = omp_get_num_threads(), halves = 2 * w.n_tiles();
#pragma omp for schedule(static)
    for (int64_t t = 0; t < threads; t++) {
        const int64_t end = halves * (t + 1) / threads;
        for (int64_t i = halves * t / threads, n; i < end; i += n) {
            n = i % 2 || i + 1 == end ? 1 : 2;
            f(Part{i / 2, 0, 1, 0, 1, int(i % 2) * w.tile / 2, int(i % 2 + n) * w.tile / 2});
        }
    }
}

// y (n,) = values + bias
NOT_INLINED inline void store_row(const float* values, const Real* bias, Real* y, int64_t n) {
    if (bias)
        for (int64_t j = 0; j < n; j++) y[j] = as_real(values[j] + widen(bias[j]));
    else
        for (int64_t j = 0; j < n; j++) y[j] = as_real(values[j]);
}

// x (M, K) w^T, called by all threads of a team: f(m, first, size, values) gets outputs [first, first + size) of row m.
template <class F>
void product(const Tiles& w, const Rows& x, int64_t M, F f) {
    in_parts(w, M, [&](const Part& p) {
        float values[ROWS * BLOCK_TILE];
        w.compute(p, x, values);
        for (int m = 0; m < p.rows; m++) f(p.m + m, w.first(p), w.size(p), values + m * w.tile + p.from);
    });
}

// y (M, N) = x (M, K) w^T + bias, called by all threads of a team
inline void product(const Tiles& w, const Rows& x, const Real* bias, Real* y, int64_t M) {
    product(w, x, M, [&](int64_t m, int64_t first, int64_t size, const float* values) {
        store_row(values, bias ? bias + first : nullptr, y + m * w.N + first, size);
    });
}

inline void linear(const Weight& weight, const Real* x, Real* y, int64_t M) {
    static thread_local Scratch<char> scratch;
    const TilesOf w(weight);
    const Rows rows = rows_for(*w, x, M, scratch);
#pragma omp parallel num_threads(Team::mine().threads())
    product(*w, rows, weight.bias, y, M);
}

// y (n,) = activation(gates) * ups
NOT_INLINED inline void activate_row(const float* gates, const float* ups, Real* y, int64_t n, int kind) {
    const auto all = [&](auto activation) {
#pragma omp simd
        for (int64_t j = 0; j < n; j++) y[j] = as_real(activation(gates[j]) * ups[j]);
    };
    if (kind == SILU) all([](float x) { return activate(x, SILU); });
    if (kind == GELU) all([](float x) { return activate(x, GELU); });
    if (kind == GELU_TANH) all([](float x) { return activate(x, GELU_TANH); });
}

// inner (M, I) = activation(x gate^T) * (x up^T), called by all threads of a team, with what `low_gate` and `low_up` add
inline void gated(const Tiles& gate, const Tiles& up, const Rows& x, Real* inner, int64_t M, int kind,
                  const LowRank* low_gate = nullptr, const LowRank* low_up = nullptr) {
    in_parts(gate, M, [&](const Part& p) {
        float gates[ROWS * BLOCK_TILE], ups[ROWS * BLOCK_TILE];
        gate.compute(p, x, gates);
        up.compute(p, x, ups);
        const int64_t first = gate.first(p), size = gate.size(p);
        for (int m = 0; m < p.rows; m++) {
            float *own_gates = gates + m * gate.tile + p.from, *own_ups = ups + m * gate.tile + p.from;
            if (low_gate) low_gate->add(p.m + m, first, size, own_gates);
            if (low_up) low_up->add(p.m + m, first, size, own_ups);
            activate_row(own_gates, own_ups, inner + (p.m + m) * gate.N + first, size, kind);
        }
    });
}
