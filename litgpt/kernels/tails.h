// Many tokens that enter a cache whose policy scores tokens by attention weights: tail after tail attends, is looked at, and some
// tokens leave. Rows and heads of keys are independent, so a thread runs all tails of one. Outputs, scores and evictions are to the
// last bit those of single calls.

#pragma once

#include "attention.h"
#include "scored_cache.h"

struct TailStep {
    int64_t T, looks;  // new tokens, and whether the policy looks before them
    Boundary boundary;  // of that look, or else the slots in use before them
};

struct Tails {
    static constexpr int64_t FEW = 16;  // queries that get bitwise the outputs of single ones; in float all do

    ScoredCache cache;
    int64_t B, T, n_steps;
    const Real *q, *k, *v;                             // of the new tokens
    const int64_t *q_strides, *k_strides, *v_strides;  // of rows, heads, tokens
    const int64_t *rows, *held, *shift;  // of the cache (null: the first ones); slots with noted positions, and what others are ahead
    const TailStep* steps;
    Real* y;       // (B, T, H, D)
    int32_t* log;  // (n_steps, B, G, C), the positions in all slots in use as the new tokens find them; null: not wanted

    void run_all() const {
#pragma omp parallel for num_threads(Team::mine().threads()) schedule(dynamic)
        for (int64_t i = 0; i < B * cache.G; i++) run(i / cache.G, i % cache.G);
    }

    // All tails of a row of the call and a head of keys
    void run(int64_t b, int64_t g) const {
        const int64_t G = cache.G, C = cache.C, D = cache.D, heads = cache.heads(), max_queries = cache.max_queries;
        const int64_t row = rows ? rows[b] : b, group = row * G + g;
        Real *own_keys = (Real*)cache.slots[0].start + group * C * D, *own_values = (Real*)cache.slots[1].start + group * C * D;
        Real* own_queries = cache.queries ? cache.queries + (row * cache.H + g * heads) * max_queries * D : nullptr;
        std::vector<int64_t> at(C);
        int64_t first = 0, in_note = held[b], ahead = shift[b];
        for (int64_t s = 0; s < n_steps; s++) {
            const TailStep& step = steps[s];
            int64_t filled = step.boundary.filled;
            cache.find_positions(row, g, filled, in_note, ahead, at.data());
            if (step.looks) {
                cache.look(row, g, step.boundary, at.data(), filled + ahead);
                if (step.boundary.evicts) {
                    ahead += filled - cache.kept, filled = in_note = cache.kept;
                    cache.find_positions(row, g, filled, in_note, ahead, at.data());
                }
            }
            if (log) std::copy_n(at.data(), filled, log + ((s * B + b) * G + g) * C);
            for (int64_t t = 0; t < step.T; t++) {
                const Real* key = k + b * k_strides[0] + g * k_strides[1] + (first + t) * k_strides[2];
                const Real* value = v + b * v_strides[0] + g * v_strides[1] + (first + t) * v_strides[2];
                std::memcpy(own_keys + (filled + t) * D, key, D * sizeof(Real));
                std::memcpy(own_values + (filled + t) * D, value, D * sizeof(Real));
            }
            const int64_t stop = filled + step.T;
            attend(b, g, first, step.T, stop, own_keys, own_values);
            for (int64_t t = step.T - std::min(step.T, max_queries); t < step.T; t++)
                for (int64_t h = 0; h < heads; h++)
                    std::memcpy(own_queries + (h * max_queries + (filled + ahead + t) % max_queries) * D,
                                query(b, g * heads + h, first + t), D * sizeof(Real));
            first += step.T;
        }
    }

private:
    const Real* query(int64_t b, int64_t h, int64_t t) const {
        return q + b * q_strides[0] + h * q_strides[1] + t * q_strides[2];
    }

    // Outputs of tokens [first, first + n), which are the last of N in the cache
    void attend(int64_t b, int64_t g, int64_t first, int64_t n, int64_t N, const Real* own_keys, const Real* own_values) const {
#ifdef LITGPT_FLOAT32
        for (int64_t t = 0, end; t < n; t = end) {
            end = std::min(n, t + FEW);
            attend_few(b, g, first + t, end - t, N - n + end, own_keys, own_values);
        }
#else
        if (n <= FEW) return attend_few(b, g, first, n, N, own_keys, own_values);
        const int64_t D = cache.D;
        std::vector<Real> out(n * cache.heads() * D);
        const CausalAttention a{cache.heads(), 1, n, N, D, N, cache.scale, cache.cap, query(b, g * cache.heads(), first), own_keys,
                                own_values, sinks_of(g), {q_strides[1], q_strides[2]}, {0, D}, {0, D}, out.data()};
        for (int64_t i = 0; i < a.tasks(); i++) a.run(i);
        put(b, g, first, out);
#endif
    }

    const Real* sinks_of(int64_t g) const { return cache.sinks ? cache.sinks + g * cache.heads() : nullptr; }

    void attend_few(int64_t b, int64_t g, int64_t first, int64_t n, int64_t N, const Real* own_keys, const Real* own_values) const {
        const int64_t heads = cache.heads(), D = cache.D;
        static thread_local Scratch<float> scratch;
        static thread_local KvSplits splits;
        std::vector<Real> bias(n * N, Real(0)), out(n * heads * D);
        for (int64_t t = 0; t < n; t++) std::fill(bias.begin() + t * N + N - n + t + 1, bias.begin() + (t + 1) * N, HIDDEN);
        const int64_t bias_strides[] = {0, N};
        splits.find(1, 1, n, N, n > 1 ? bias.data() : nullptr, bias_strides);
        Attention a{1, heads, 1, n, N, D, cache.scale, cache.cap, own_keys, own_values, {0, 0, D}, {0, 0, D},
                    n > 1 ? bias.data() : nullptr, {0, N}, sinks_of(g), &splits, nullptr, nullptr, nullptr, 0};
        a.use_scratch(scratch.get(a.scratch_size()));
        for (int64_t i = 0; i < heads * n; i++) {
            Real own[MAX_D];
            std::memcpy(own, query(b, g * heads + i / n, first + i % n), D * sizeof(Real));
            a.set_query(i, own);
        }
        for (int64_t i = 0; i < int64_t(splits.all.size()); i++) a.attend_split(i);
        for (int64_t i = 0; i < heads * n; i++) a.combine_row(i, out.data());
        put(b, g, first, out);
    }

    // Outputs (n, heads, D) from token `first` on
    void put(int64_t b, int64_t g, int64_t first, const std::vector<Real>& out) const {
        const int64_t size = cache.heads() * cache.D;
        for (int64_t t = 0; t < int64_t(out.size()) / size; t++)
            std::copy_n(out.data() + t * size, size, y + ((b * T + first + t) * cache.H * cache.D + g * size));
    }
};
