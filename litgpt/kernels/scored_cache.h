// A cache whose policy scores tokens by attention weights: its policy looks at the tokens of a row, and some leave. As
// litgpt/kvcache/score.py does it, to the last bit.

#pragma once

#include "looks.h"

struct Boundary {
    int64_t filled, observed;  // slots in use, and of how many the policy has sums already
    int64_t n_queries;         // the last ones, which the policy looks at
    int64_t evicts;            // whether tokens leave
};

// Of what a cache stores
struct SlotBuffer {
    char* start;
    int64_t bytes;  // of a slot
};

struct ScoredCache {
    int64_t H, G, D, C;
    int64_t n_sink, recent, kept, pool, max_queries;  // of the policy; `max_queries` is the number of slots for queries
    float scale, cap;
    const Real* sinks;
    Real* queries;        // (row, H, max_queries, D)
    int32_t* positions;   // (row, G, C), noted of tokens that stayed
    float* sums;          // (row, G, C), of all queries so far; null: scores are those of the last queries
    SlotBuffer slots[4];  // (row, G, C, bytes): keys and values, or their codes and scales; else null
    Vectors encoded;      // keys, if they are

    int64_t heads() const { return H / G; }

    // Positions in the `filled` slots of a head of a row. Of the first `held` they are noted, others are `ahead` of their slots.
    void find_positions(int64_t row, int64_t g, int64_t filled, int64_t held, int64_t ahead, int64_t* at) const {
        const int32_t* noted = positions + (row * G + g) * C;
        for (int64_t j = 0; j < filled; j++) at[j] = j < held ? noted[j] : j + ahead;
    }

    // The policy looks at a head's tokens at positions `at`, which `length` tokens of the row have left.
    void look(int64_t row, int64_t g, const Boundary& boundary, const int64_t* at, int64_t length) const {
        const int64_t N = boundary.filled, n = boundary.n_queries, group = row * G + g;
        const Real* own_queries = queries + (row * H + g * heads()) * max_queries * D;
        float* own_sums = sums ? sums + group * C : nullptr;
        static thread_local Scratch<Real> scratch;
        Real* asked = scratch.get(heads() * n * D);
        std::vector<int64_t> ends(n);
        for (int64_t i = 0; i < n; i++) {
            const int64_t position = length - n + i;
            ends[i] = std::upper_bound(at, at + N, position) - at;
            for (int64_t h = 0; h < heads(); h++)
                std::copy_n(own_queries + (h * max_queries + position % max_queries) * D, D, asked + (h * n + i) * D);
        }
        const int64_t of_queries[] = {0, n * D, D}, of_keys[] = {0, 0, D};
        const Vectors codes = encoded.kind ? encoded.at(row, g, 0) : encoded;
        const SeenWeights seen{1, heads(), 1, n, N, D, scale, cap, asked, (const Real*)slots[0].start + group * C * D,
                               sinks ? sinks + g * heads() : nullptr, codes.kind ? &codes : nullptr, of_queries, of_keys, ends.data(),
                               false};
        std::vector<float> scores(N);
        seen.of_group(0, 0, scores.data());
        for (int64_t j = 0; own_sums && j < boundary.observed; j++) scores[j] = own_sums[j] + scores[j];
        if (!boundary.evicts) {
            if (own_sums) std::copy_n(scores.data(), N, own_sums);
            return;
        }
        const std::vector<int64_t> stays = best(own_sums ? scores : pooled(scores));
        int32_t* noted = positions + group * C;
        for (int64_t j = 0; j < kept; j++) {  // ascending: none is overwritten before it moves
            noted[j] = int32_t(at[stays[j]]);
            if (own_sums) own_sums[j] = scores[stays[j]];
        }
        for (const SlotBuffer& buffer : slots)
            if (buffer.start) move(buffer, group, stays);
    }

private:
    void move(const SlotBuffer& buffer, int64_t group, const std::vector<int64_t>& stays) const {
        char* own = buffer.start + group * C * buffer.bytes;
        for (int64_t j = 0, next; j < kept; j = next) {
            for (next = j + 1; next < kept && stays[next] == stays[j] + next - j;) next++;
            if (stays[j] != j) std::memmove(own + j * buffer.bytes, own + stays[j] * buffer.bytes, (next - j) * buffer.bytes);
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

    std::vector<int64_t> best(const std::vector<float>& scores) const {
        std::vector<int64_t> stays(kept);
        find_best(scores.data(), int64_t(scores.size()), n_sink, recent, kept, stays.data());
        return stays;
    }
};

// A look at rows of a cache
struct Look {
    ScoredCache cache;
    int64_t B;
    const int64_t *rows, *held, *shift;  // (B,), see `Tails`
    Boundary boundary;

    void run(int64_t b, int64_t g) const {
        const int64_t row = rows ? rows[b] : b, N = boundary.filled;
        std::vector<int64_t> at(N);
        cache.find_positions(row, g, N, held[b], shift[b], at.data());
        cache.look(row, g, boundary, at.data(), N + shift[b]);
    }
};

inline void run_all_looks(const Look* looks, int64_t count) {
    std::vector<int64_t> ends;  // of their tasks
    for (int64_t i = 0; i < count; i++) ends.push_back((i ? ends.back() : 0) + looks[i].B * looks[i].cache.G);
    const int64_t n_tasks = ends.empty() ? 0 : ends.back();
#pragma omp parallel for num_threads(Team::mine().threads()) schedule(dynamic)
    for (int64_t task = 0; task < n_tasks; task++) {
        const int64_t i = std::upper_bound(ends.begin(), ends.end(), task) - ends.begin(), own = task - (i ? ends[i - 1] : 0);
        looks[i].run(own / looks[i].cache.G, own % looks[i].cache.G);
    }
}
