// Attention from a few queries of every sequence, as in a decode step. Memory bandwidth is the limit, so keys and
// values are read once for all queries that share them, and divided among threads (KV splits). Letters as in
// attention.py.
//
// With AVX-512 a query's output is the same to the last bit whatever other queries and masked keys are in the call.
// Draft tokens are verified many at a time, and must be accepted exactly as if they were computed one by one. So scores
// are summed over all SPLIT_KEYS keys in every case, in one function that is not inlined: compilers reorder sums
// differently in every place.
#pragma once

#include "factors.h"
#include "layers.h"
#include "scores.h"

// Attention from `count` <= 4 queries q (count, D) over n <= SPLIT_KEYS keys: `top` the largest scores, `total` the sums of
// exponentials, and `out` the weighted sums of values. The keys at `ahead` are prefetched. In splits.cpp; where keys are encoded, by
// a function of another library.
struct SplitQueries {
    int count;
    const Real* q;
    const QueryFactors* factors;  // (count, D / GROUP), of encoded keys
    const Real* bias[4];
    int64_t n, D;
    float scale, cap, *top, *total, *out;

    void attend(const Real* k, const Real* v, const Real* ahead, int64_t k_stride, int64_t v_stride) const;
    void attend(const Vectors& k, const Vectors& v, const Vectors& ahead) const;
};

// The KV splits of SPLIT_KEYS keys that at least one query of the row sees, by rows and query groups. In a ragged batch
// there are none beyond a row's own length.
struct KvSplits {
    struct Split {
        int64_t b, g, n0;
    };
    std::vector<Split> all;
    std::vector<int64_t> first;  // index of the first split of each row's group; and the end

    // Of one row whose heads have so many keys more than N
    void find(int64_t G, int64_t N, const int64_t* extra) {
        all.clear(), first.assign(1, 0);
        for (int64_t g = 0; g < G; g++) {
            for (int64_t n0 = 0; n0 < N + extra[g]; n0 += SPLIT_KEYS) all.push_back({0, g, n0});
            first.push_back(int64_t(all.size()));
        }
    }

    void find(int64_t B, int64_t G, int64_t T, int64_t N, const Real* bias, const int64_t* bias_strides) {
        all.clear(), first.assign(1, 0);
        for (int64_t b = 0; b < B; b++) {
            std::vector<int64_t> seen;
            for (int64_t n0 = 0; n0 < N; n0 += SPLIT_KEYS) {
                const Real* own = bias ? bias + b * bias_strides[0] + n0 : nullptr;
                if (is_seen(own, bias_strides[1], T, std::min<int64_t>(SPLIT_KEYS, N - n0))) seen.push_back(n0);
            }
            for (int64_t g = 0; g < G; g++) {
                for (int64_t n0 : seen) all.push_back({b, g, n0});
                first.push_back(int64_t(all.size()));
            }
        }
    }

private:
    static bool is_seen(const Real* bias, int64_t stride, int64_t T, int64_t n) {
        for (int64_t t = 0; bias && t < T; t++)
            if (!std::all_of(bias + t * stride, bias + t * stride + n, [](Real x) { return x == HIDDEN; })) return true;
        return !bias;
    }
};

// Attention of one call, in the order in which a team of threads does it: `attend_splits`, then `combine`.
struct Attention {
    int64_t B, H, G, T, N, D;
    float scale, cap;
    const Real *k, *v;
    int64_t k_strides[3], v_strides[3];  // of rows, heads, slots
    const Real* bias;
    int64_t bias_strides[2];  // of rows, queries
    const Real* sinks;
    const KvSplits* splits;
    const int64_t* rows;          // rows of keys and values that the queries attend to (B,); null: the first B
    const Vectors* encoded;       // keys and values in fewer bits, in place of k and v; null: none
    const int64_t* sealed;        // only so many of the first keys of each row are encoded (B,); null: all
    int64_t newest;               // where not all are: the others are in k and v, that at p in slot p % newest
    const int64_t *first_slots, *extra_slots;  // of heads of keys, as in `Layer`
    float *sums, *tops, *totals;  // of each split, by the queries that share it
    Real* queries;                // (B, H, T, D)
    QueryFactors* factors;        // of queries to encoded keys, if GROUP divides D

    int64_t shared() const { return H / G * T; }  // queries that attend to the same keys
    int64_t results() const { return int64_t(splits->all.size()) * shared(); }
    int64_t n_factors() const { return encoded && encoded[0].by_vector() && D % GROUP == 0 ? D / GROUP : 0; }  // of a query
    int64_t scratch_size() const {
        return results() * (D + 2) + B * H * T * (D + n_factors() * int64_t(sizeof(QueryFactors) / sizeof(float)));
    }

    void use_scratch(float* scratch) {
        sums = scratch;
        tops = sums + results() * D;
        totals = tops + results();
        factors = (QueryFactors*)(totals + results());
        queries = (Real*)(factors + B * H * T * n_factors());
    }

    // Query i of (B, H, T), which is lost
    void set_query(int64_t i, Real* query) const {
        if (encoded && encoded[0].rotated) rotate_vector(query, D);
        std::memcpy(queries + i * D, query, D * sizeof(Real));
        if (n_factors()) set_factors(query, D, factors + i * n_factors());
    }

    void attend_splits() const {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < int64_t(splits->all.size()); i++) attend_split(i);
    }

    int64_t first_slot(const KvSplits::Split& p) const { return first_slots ? first_slots[p.g] + p.n0 : p.n0; }

    bool is_encoded(const KvSplits::Split& p) const { return encoded && (!sealed || p.n0 < sealed[p.b]); }

    // The first key or value of a split
    const Real* start(const KvSplits::Split& p, const Real* x, const int64_t* strides) const {
        const int64_t slot = sealed ? p.n0 % newest : first_slot(p);
        return x + (rows ? rows[p.b] : p.b) * strides[0] + p.g * strides[1] + slot * strides[2];
    }

    Vectors start(const KvSplits::Split& p, const Vectors& x) const {
        return x.at(rows ? rows[p.b] : p.b, p.g, first_slot(p));
    }

    // A query's mask for a split of n keys of a head, in which all but the T new tokens are seen
    const Real* mask_in_head(const Real* of_query, const KvSplits::Split& p, int64_t n, Real* mask) const {
        const int64_t extra = extra_slots[p.g], old = std::max<int64_t>(0, std::min(n, N - T + extra - p.n0));
        std::fill_n(mask, old, Real{});
        for (int64_t i = old; i < n; i++) mask[i] = of_query[p.n0 + i - extra];
        return mask;
    }

    // Attention of all queries of a group over one split
    void attend_split(int64_t i) const {
        const KvSplits::Split& p = splits->all[i];
        const KvSplits::Split& next = splits->all[std::min<int64_t>(i + 1, splits->all.size() - 1)];
        const int64_t keys = extra_slots ? N + extra_slots[p.g] : N;
        const int64_t n = std::min<int64_t>(SPLIT_KEYS, keys - p.n0), group = p.b * G + p.g;
        for (int64_t r = 0; r < shared(); r += 4) {
            const int64_t at = i * shared() + r;
            const int64_t first = group * shared() + r;
            SplitQueries own{int(std::min<int64_t>(4, shared() - r)), queries + first * D, factors + first * n_factors(), {}, n,
                             D, scale, cap, tops + at, totals + at, sums + at * D};
            Real masks[4 * SPLIT_KEYS];
            for (int c = 0; bias && c < own.count; c++) {
                const Real* of_query = bias + p.b * bias_strides[0] + (r + c) % T * bias_strides[1];
                own.bias[c] = extra_slots ? mask_in_head(of_query, p, n, masks + c * SPLIT_KEYS) : of_query + p.n0;
            }
            const bool coded = is_encoded(p);
            const KvSplits::Split& ahead = is_encoded(next) == coded ? next : p;
            if constexpr (std::is_same_v<Real, bf16>)  // caches of models in float have no codes
                if (coded) {
                    own.attend(start(p, encoded[0]), start(p, encoded[1]), start(ahead, encoded[0]));
                    continue;
                }
            own.attend(start(p, k, k_strides), start(p, v, v_strides), start(ahead, k, k_strides), k_strides[2],
                       v_strides[2]);
        }
    }

    void combine(Real* y) const {  // (B, T, H, D)
#pragma omp for schedule(static)
        for (int64_t row = 0; row < B * H * T; row++) combine_row(row, y);
    }

    void combine_row(int64_t row, Real* y) const {
        const int64_t group = row / shared(), r = row % shared(), b = group / G, h = row / T % H, t = row % T;
        const int64_t begin = splits->first[group] * shared() + r, end = splits->first[group + 1] * shared();
        float most = sinks ? widen(sinks[h]) : -INFINITY, out[MAX_D];
        for (int64_t at = begin; at < end; at += shared()) most = std::max(most, tops[at]);
        float total = sinks ? exponential(widen(sinks[h]) - most) : 0.0f;
        std::fill_n(out, D, 0.0f);
        for (int64_t at = begin; at < end; at += shared()) {
            if (totals[at] == 0) continue;
            const float factor = exponential(tops[at] - most);
            total += factor * totals[at];
            for (int64_t d = 0; d < D; d++) out[d] += factor * sums[at * D + d];
        }
        if (encoded && encoded[1].rotated) rotate_vector(out, D);
        for (int64_t d = 0; d < D; d++) y[((b * T + t) * H + h) * D + d] = as_real(out[d] / total);
    }
};
