// Many tokens that enter a cache whose policy scores tokens by attention weights: tail after tail attends, is looked at, and some
// tokens leave. Rows and heads of keys are independent, so a thread runs all tails of one. Outputs, scores and evictions are to the
// last bit those of single calls.

#pragma once

#include "attention.h"
#include "looks.h"

struct TailStep {
    int64_t T, filled;                        // new tokens, and slots in use before them and before a look
    int64_t looks, observed, n_queries, evicts;  // whether the policy looks before them, as in `Boundary`
};

struct Tails {
    static constexpr int64_t FEW = 16;  // queries that get bitwise the outputs of single ones

    int64_t B, H, G, T, D, C, n_steps;
    int64_t n_sink, recent, kept, pool, max_queries;  // of the policy; `max_queries` is the number of slots for queries
    float scale, cap;
    const bf16 *q, *k, *v, *sinks;                     // of the new tokens
    const int64_t *q_strides, *k_strides, *v_strides;  // of rows, heads, tokens
    const int64_t *rows, *held, *shift;  // of the cache (null: the first ones); slots with noted positions, and what others are ahead
    bf16 *keys, *values, *queries;       // (row, G, C, D) of the cache, (row, H, max_queries, D)
    int32_t* positions;                  // (row, G, C)
    float* sums;                         // (row, G, C), of all queries so far; null: scores are those of the last queries
    const TailStep* steps;
    bf16* y;       // (B, T, H, D)
    int32_t* log;  // (n_steps, B, G, C), the positions in all slots in use as the new tokens find them; null: not wanted

    int64_t heads() const { return H / G; }

    void run_all() const {
#pragma omp parallel for num_threads(Team::mine().threads()) schedule(dynamic)
        for (int64_t i = 0; i < B * G; i++) run(i / G, i % G);
    }

    // All tails of a row of the call and a head of keys
    void run(int64_t b, int64_t g) const {
        const int64_t row = rows ? rows[b] : b, group = row * G + g;
        bf16 *own_keys = keys + group * C * D, *own_values = values + group * C * D;
        bf16* own_queries = queries ? queries + (row * H + g * heads()) * max_queries * D : nullptr;
        int32_t* noted = positions + group * C;
        float* own_sums = sums ? sums + group * C : nullptr;
        std::vector<int64_t> at(C);
        int64_t first = 0, in_note = held[b], ahead = shift[b];
        for (int64_t s = 0; s < n_steps; s++) {
            const TailStep& step = steps[s];
            int64_t filled = step.filled;
            const auto note = [&] {
                for (int64_t j = 0; j < filled; j++) at[j] = j < in_note ? noted[j] : j + ahead;
            };
            note();
            if (step.looks) {
                look(step, g, own_keys, own_values, own_queries, noted, own_sums, at.data(), filled + ahead);
                if (step.evicts) {
                    ahead += filled - kept, filled = in_note = kept;
                    note();
                }
            }
            if (log) std::copy_n(at.data(), filled, log + ((s * B + b) * G + g) * C);
            for (int64_t t = 0; t < step.T; t++) {
                const bf16* key = k + b * k_strides[0] + g * k_strides[1] + (first + t) * k_strides[2];
                const bf16* value = v + b * v_strides[0] + g * v_strides[1] + (first + t) * v_strides[2];
                std::memcpy(own_keys + (filled + t) * D, key, D * sizeof(bf16));
                std::memcpy(own_values + (filled + t) * D, value, D * sizeof(bf16));
            }
            const int64_t stop = filled + step.T;
            attend(b, g, first, step.T, stop, own_keys, own_values);
            for (int64_t t = step.T - std::min(step.T, max_queries); t < step.T; t++)
                for (int64_t h = 0; h < heads(); h++)
                    std::memcpy(own_queries + (h * max_queries + (filled + ahead + t) % max_queries) * D,
                                query(b, g * heads() + h, first + t), D * sizeof(bf16));
            first += step.T;
        }
    }

private:
    const bf16* query(int64_t b, int64_t h, int64_t t) const {
        return q + b * q_strides[0] + h * q_strides[1] + t * q_strides[2];
    }

    // The policy looks at the `step.filled` tokens at positions `at`, which `length` tokens of the row have left.
    void look(const TailStep& step, int64_t g, bf16* own_keys, bf16* own_values, const bf16* own_queries, int32_t* noted,
              float* own_sums, const int64_t* at, int64_t length) const {
        const int64_t N = step.filled, n = step.n_queries;
        std::vector<bf16> asked(heads() * n * D);
        std::vector<int64_t> ends(n);
        for (int64_t i = 0; i < n; i++) {
            const int64_t position = length - n + i;
            ends[i] = std::upper_bound(at, at + N, position) - at;
            for (int64_t h = 0; h < heads(); h++)
                std::copy_n(own_queries + (h * max_queries + position % max_queries) * D, D, asked.data() + (h * n + i) * D);
        }
        const int64_t of_queries[] = {0, n * D, D}, of_keys[] = {0, 0, D};
        const SeenWeights seen{1, heads(), 1, n, N, D, scale, cap, asked.data(), own_keys,
                               sinks ? sinks + g * heads() : nullptr, nullptr, of_queries, of_keys, ends.data(), false};
        std::vector<float> scores(N), of_head(N);
        for (int64_t h = 0; h < heads(); h++) {
            seen.of_head(0, h, h ? of_head.data() : scores.data());
            for (int64_t j = 0; h && j < N; j++) scores[j] += of_head[j];
        }
        for (int64_t j = 0; own_sums && j < step.observed; j++) scores[j] = own_sums[j] + scores[j];
        if (!step.evicts) {
            if (own_sums) std::copy_n(scores.data(), N, own_sums);
            return;
        }
        const std::vector<int64_t> stays = best(own_sums ? scores : pooled(scores));
        for (int64_t j = 0; j < kept; j++) {  // ascending: none is overwritten before it moves
            const int64_t from = stays[j];
            noted[j] = int32_t(at[from]);
            if (own_sums) own_sums[j] = scores[from];
            if (from == j) continue;
            std::memcpy(own_keys + j * D, own_keys + from * D, D * sizeof(bf16));
            std::memcpy(own_values + j * D, own_values + from * D, D * sizeof(bf16));
        }
    }

    // Means over `pool` neighbours among all but the newest tokens, which stay in any case
    std::vector<float> pooled(const std::vector<float>& scores) const {
        const int64_t n = int64_t(scores.size()) - recent;
        std::vector<float> means(scores);
        for (int64_t j = 0; j < n; j++) {
            float sum = 0.0f;
            const int64_t end = std::min(n, j + pool / 2 + 1);
            for (int64_t i = std::max<int64_t>(0, j - pool / 2); i < end; i++) sum += scores[i];
            means[j] = sum / float(pool);
        }
        return means;
    }

    // Slots of the tokens that stay, ascending: see `ScorePolicy.best`
    std::vector<int64_t> best(const std::vector<float>& scores) const {
        const int64_t N = int64_t(scores.size());
        std::vector<int64_t> order(N);
        for (int64_t j = 0; j < N; j++) {
            const float score = scores[j] + 0.0f;
            int32_t bits;
            std::memcpy(&bits, &score, sizeof(bits));
            const int32_t size = bits & 0x7fffffff;
            if (size > 0x7f800000) bits = int32_t(0xff800000);                      // no number: the least
            if (size == 0x7f800000) bits = (bits & int32_t(0x80000000)) | 0x7f7fffff;  // not as much as what has to stay
            if (j < n_sink || j >= N - recent) bits = 0x7f800000;
            order[j] = int64_t(bits < 0 ? bits ^ 0x7fffffff : bits) * (int64_t(1) << 32) | j;
        }
        std::nth_element(order.begin(), order.begin() + kept, order.end(), std::greater<int64_t>());
        order.resize(kept);
        for (int64_t& x : order) x &= 0xffffffff;
        std::sort(order.begin(), order.end());
        return order;
    }

    // Outputs of tokens [first, first + n), which are the last of N in the cache
    void attend(int64_t b, int64_t g, int64_t first, int64_t n, int64_t N, const bf16* own_keys, const bf16* own_values) const {
        const bf16* own_sinks = sinks ? sinks + g * heads() : nullptr;
        std::vector<bf16> out(n * heads() * D);
        if (n > FEW) {
            const CausalAttention a{heads(), 1, n, N, D, N, scale, cap, query(b, g * heads(), first), own_keys, own_values,
                                    own_sinks, {q_strides[1], q_strides[2]}, {0, D}, {0, D}, out.data()};
            for (int64_t i = 0; i < a.tasks(); i++) a.run(i);
        } else {
            static thread_local Scratch<float> scratch;
            static thread_local KvSplits splits;
            std::vector<bf16> bias(n * N, bf16(0));
            for (int64_t t = 0; t < n; t++) std::fill(bias.begin() + t * N + N - n + t + 1, bias.begin() + (t + 1) * N, HIDDEN);
            const int64_t bias_strides[] = {0, N};
            splits.find(1, 1, n, N, n > 1 ? bias.data() : nullptr, bias_strides);
            Attention a{1, heads(), 1, n, N, D, scale, cap, own_keys, own_values, {0, 0, D}, {0, 0, D},
                        n > 1 ? bias.data() : nullptr, {0, N}, own_sinks, &splits, nullptr, nullptr, nullptr, 0};
            a.use_scratch(scratch.get(a.scratch_size()));
            for (int64_t i = 0; i < heads() * n; i++) {
                bf16 own[MAX_D];
                std::memcpy(own, query(b, g * heads() + i / n, first + i % n), D * sizeof(bf16));
                a.set_query(i, own);
            }
            for (int64_t i = 0; i < int64_t(splits.all.size()); i++) a.attend_split(i);
            for (int64_t i = 0; i < heads() * n; i++) a.combine_row(i, out.data());
        }
        for (int64_t t = 0; t < n; t++)
            std::copy_n(out.data() + t * heads() * D, heads() * D, y + ((b * T + first + t) * H + g * heads()) * D);
    }
};
