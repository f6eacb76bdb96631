// Attention from a few queries of every sequence, as in a decode step. Memory bandwidth is the limit, so keys and
// values are read once for all queries that share them, and divided among threads (KV splits). Letters as in
// attention.py.
//
// With AVX-512 a query's output is the same to the last bit whatever other queries and masked keys are in the call.
// Draft tokens are verified many at a time, and must be accepted exactly as if they were computed one by one. So scores
// are summed over all SPLIT_KEYS keys in every case, in one function that is not inlined: compilers reorder sums
// differently in every place.

#pragma once

#include "layers.h"

constexpr int SPLIT_KEYS = 64;        // keys of a KV split, which one thread processes
constexpr bf16 HIDDEN = 0xff80;  // the bias of a key that a query does not see: minus infinity

// The largest of x (n,); n is a multiple of 16.
inline float largest(const float* x, int64_t n) {
#ifdef __AVX512BW__
    __m512 most = _mm512_loadu_ps(x);
    for (int64_t i = 16; i < n; i += 16) most = _mm512_max_ps(most, _mm512_loadu_ps(x + i));
    return _mm512_reduce_max_ps(most);
#else
    return *std::max_element(x, x + n);
#endif
}

// Replaces scores s (n,) by exp(s - top), where `top` is the largest score. Returns their sum.
__attribute__((noinline)) inline float exponentiate(float* s, float* top, int64_t n) {
    const float most = *top = largest(s, n);
    const float base = most == -INFINITY ? 0.0f : most;
#ifdef __AVX512BW__
    __m512 sum = _mm512_setzero_ps();
    for (int64_t j = 0; j < n; j += 16) {
        const __m512 weights = exponential_16(_mm512_sub_ps(_mm512_loadu_ps(s + j), _mm512_set1_ps(base)));
        _mm512_storeu_ps(s + j, weights);
        sum = _mm512_add_ps(sum, weights);
    }
    return _mm512_reduce_add_ps(sum);
#else
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; j++) {
        s[j] = exponential(s[j] - base);
        sum += s[j];
    }
    return sum;
#endif
}

inline float softcap(float score, float cap) {
    return cap * (1.0f - 2.0f / (1.0f + exponential(std::min(2.0f * score / cap, 80.0f))));
}

// Replaces products s of a query with n <= SPLIT_KEYS keys by exp(score - top), and by 0 after the last.
inline void weigh(float* s, const bf16* bias, int64_t n, float scale, float cap, float* top, float* total) {
    for (int64_t j = 0; j < n; j++) s[j] *= scale;
    if (cap > 0)
        for (int64_t j = 0; j < n; j++) s[j] = softcap(s[j], cap);
    if (bias)
        for (int64_t j = 0; j < n; j++) s[j] += widen(bias[j]);
    for (int64_t j = n; j < SPLIT_KEYS; j++) s[j] = -INFINITY;
    *total = exponentiate(s, top, SPLIT_KEYS);
}

// Weighted sums of n values for R queries, columns [d0, d0 + 16 V): out (R, D). The keys at `ahead` are prefetched.
#ifdef __AVX512BW__
template <int R, int V>
inline void add_values(const float (*weights)[SPLIT_KEYS], const bf16* ahead, int64_t k_stride, const bf16* v,
                       int64_t v_stride, int64_t n, int64_t D, int64_t d0, float* out) {
    __m512 sums[R][V];
    UNROLLED for (int r = 0; r < R; r++) UNROLLED for (int i = 0; i < V; i++) sums[r][i] = _mm512_setzero_ps();
    for (int64_t j = 0; j < n; j++) {
        __m512 values[V];
        prefetch(ahead + j * k_stride + d0, 32 * V);
        UNROLLED for (int i = 0; i < V; i++) values[i] = widen_16(v + j * v_stride + d0 + 16 * i);
        UNROLLED for (int r = 0; r < R; r++) {
            const __m512 weight = _mm512_set1_ps(weights[r][j]);
            UNROLLED for (int i = 0; i < V; i++) sums[r][i] = _mm512_fmadd_ps(weight, values[i], sums[r][i]);
        }
    }
    UNROLLED for (int r = 0; r < R; r++) UNROLLED for (int i = 0; i < V; i++)
        _mm512_storeu_ps(out + r * D + d0 + 16 * i, sums[r][i]);
}
#endif

// Attention from R queries over n <= SPLIT_KEYS keys: `top` the largest scores, `total` the sums of exponentials, and
// `out` the weighted sums of values.
template <int R, int D0>
void attend_keys(const bf16* q, const bf16* k, const bf16* v, const bf16* ahead, int64_t k_stride, int64_t v_stride,
                 const bf16* const* bias, int64_t n, int64_t any_D, float scale, float cap, float* top, float* total,
                 float* out) {
    const int64_t D = D0 ? D0 : any_D;
    float scores[R][SPLIT_KEYS];
    int64_t done = 0, d0 = 0;
#ifdef __AVX512BW__
    if (D % 32 == 0)
        for (; done < n; done += 16) {
            __m512 sums[R][16];
            for (int j = 0; j < 16; j++) {
                const bf16* key = k + std::min(done + j, n - 1) * k_stride;  // after the last one, it again
                prefetch(v + std::min(done + j, n - 1) * v_stride, D * 2);
                __m512 own[R];
                UNROLLED for (int r = 0; r < R; r++) own[r] = _mm512_setzero_ps();
                for (int64_t d = 0; d < D; d += 32) {
                    const __m512i keys = _mm512_loadu_si512(key + d);
                    UNROLLED for (int r = 0; r < R; r++) own[r] =
                        add_products(own[r], keys, _mm512_loadu_si512(q + r * D + d));
                }
                UNROLLED for (int r = 0; r < R; r++) sums[r][j] = own[r];
            }
            UNROLLED for (int r = 0; r < R; r++) _mm512_storeu_ps(scores[r] + done, sums_of_16(sums[r]));
        }
#endif
    for (int64_t j = done; j < n; j++)
        for (int r = 0; r < R; r++) {
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t d = 0; d < D; d++) sum += widen(k[j * k_stride + d]) * widen(q[r * D + d]);
            scores[r][j] = sum;
        }
    for (int r = 0; r < R; r++) weigh(scores[r], bias[r], n, scale, cap, top + r, total + r);
#ifdef __AVX512BW__
    for (; d0 + 64 <= D; d0 += 64) add_values<R, 4>(scores, ahead, k_stride, v, v_stride, n, D, d0, out);
    for (; d0 + 16 <= D; d0 += 16) add_values<R, 1>(scores, ahead, k_stride, v, v_stride, n, D, d0, out);
#endif
    for (int r = 0; d0 < D && r < R; r++) {
        float sums[MAX_D] = {};
        for (int64_t j = 0; j < n; j++)
#pragma omp simd
            for (int64_t d = d0; d < D; d++) sums[d] = multiply_add(scores[r][j], widen(v[j * v_stride + d]), sums[d]);
        std::copy(sums + d0, sums + D, out + r * D + d0);
    }
}

template <int R>
void attend_rows(const bf16* q, const bf16* k, const bf16* v, const bf16* ahead, int64_t k_stride, int64_t v_stride,
                 const bf16* const* bias, int64_t n, int64_t D, float scale, float cap, float* top, float* total,
                 float* out) {
    const auto run = D == 64 ? attend_keys<R, 64> : D == 128 ? attend_keys<R, 128> : attend_keys<R, 0>;
    run(q, k, v, ahead, k_stride, v_stride, bias, n, D, scale, cap, top, total, out);
}

// Products of R queries q (R, D) with n encoded keys: scores
template <int R, int KIND>
void multiply_encoded(const float* q, const Vectors& k, int64_t n, int64_t D, float (*scores)[SPLIT_KEYS]) {
    int64_t done = 0;
#ifdef __AVX512BW__
    if (D % 32 == 0)
        for (; done < n; done += 16) {
            __m512 sums[R][16];
            for (int j = 0; j < 16; j++) {
                const int64_t slot = std::min(done + j, n - 1);  // after the last one, it again
                const char* codes = k.codes_of(slot);
                const bf16* scales = k.scales_of(slot);
                __m512 own[R];
                UNROLLED for (int r = 0; r < R; r++) own[r] = _mm512_setzero_ps();
                for (int64_t d = 0; d < D; d += 32) {
                    __m512 low, high;
                    decode_32<KIND>(codes, scales, d, low, high);
                    UNROLLED for (int r = 0; r < R; r++) {
                        own[r] = _mm512_fmadd_ps(low, _mm512_loadu_ps(q + r * D + d), own[r]);
                        own[r] = _mm512_fmadd_ps(high, _mm512_loadu_ps(q + r * D + d + 16), own[r]);
                    }
                }
                UNROLLED for (int r = 0; r < R; r++) sums[r][j] = own[r];
            }
            UNROLLED for (int r = 0; r < R; r++) _mm512_storeu_ps(scores[r] + done, sums_of_16(sums[r]));
        }
#endif
    for (int64_t j = done; j < n; j++) {
        float x[MAX_D];
        decode_codes<KIND>(k.codes_of(j), k.scales_of(j), D, x);
        for (int r = 0; r < R; r++) {
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t d = 0; d < D; d++) sum += x[d] * q[r * D + d];
            scores[r][j] = sum;
        }
    }
    if (KIND == INT8)
        for (int64_t j = 0; j < n; j++) {
            const float scale = widen(*k.scales_of(j));
            for (int r = 0; r < R; r++) scores[r][j] *= scale;
        }
}

// Sums of n encoded values, as the weights of R queries say: out (R, D)
template <int R, int KIND>
void add_encoded(float (*weights)[SPLIT_KEYS], const Vectors& v, int64_t n, int64_t D, float* out) {
    if (KIND == INT8)
        for (int64_t j = 0; j < n; j++) {
            const float scale = widen(*v.scales_of(j));
            for (int r = 0; r < R; r++) weights[r][j] *= scale;
        }
    int64_t d0 = 0;
#ifdef __AVX512BW__
    const auto columns = [&](auto count) {
        constexpr int V = decltype(count)::value;  // times 32
        __m512 sums[R][2 * V];
        UNROLLED for (int r = 0; r < R; r++) UNROLLED for (int i = 0; i < 2 * V; i++) sums[r][i] = _mm512_setzero_ps();
        for (int64_t j = 0; j < n; j++) {
            const char* codes = v.codes_of(j);
            const bf16* scales = v.scales_of(j);
            __m512 values[2 * V];
            UNROLLED for (int i = 0; i < V; i++)
                decode_32<KIND>(codes, scales, d0 + 32 * i, values[2 * i], values[2 * i + 1]);
            UNROLLED for (int r = 0; r < R; r++) {
                const __m512 weight = _mm512_set1_ps(weights[r][j]);
                UNROLLED for (int i = 0; i < 2 * V; i++) sums[r][i] = _mm512_fmadd_ps(weight, values[i], sums[r][i]);
            }
        }
        UNROLLED for (int r = 0; r < R; r++) UNROLLED for (int i = 0; i < 2 * V; i++)
            _mm512_storeu_ps(out + r * D + d0 + 16 * i, sums[r][i]);
        d0 += 32 * V;
    };
    while (d0 + 64 <= D) columns(std::integral_constant<int, 2>());
    while (d0 + 32 <= D) columns(std::integral_constant<int, 1>());
#endif
    if (d0 == D) return;
    for (int r = 0; r < R; r++) std::fill(out + r * D + d0, out + r * D + D, 0.0f);
    for (int64_t j = 0; j < n; j++) {
        float x[MAX_D];
        decode_codes<KIND>(v.codes_of(j), v.scales_of(j), D, x);
        for (int r = 0; r < R; r++)
#pragma omp simd
            for (int64_t d = d0; d < D; d++) out[r * D + d] = multiply_add(weights[r][j], x[d], out[r * D + d]);
    }
}

// As `attend_keys`, with encoded keys and values; the keys `next_k` are prefetched.
template <int R>
void attend_encoded(const bf16* q, const Vectors& k, const Vectors& v, const Vectors& next_k, const bf16* const* bias, int64_t n, int64_t D, float scale, float cap, float* top, float* total,
                    float* out) {
    float scores[R][SPLIT_KEYS], queries[R * MAX_D];
    for (int64_t i = 0; i < R * D; i++) queries[i] = widen(q[i]);
    prefetch(v.codes, n * v.strides[2]);
    k.kind == INT8 ? multiply_encoded<R, INT8>(queries, k, n, D, scores)
                   : multiply_encoded<R, INT4>(queries, k, n, D, scores);
    for (int r = 0; r < R; r++) weigh(scores[r], bias[r], n, scale, cap, top + r, total + r);
    prefetch(next_k.codes, n * next_k.strides[2]);
    v.kind == INT8 ? add_encoded<R, INT8>(scores, v, n, D, out) : add_encoded<R, INT4>(scores, v, n, D, out);
}

// The KV splits of SPLIT_KEYS keys that at least one query of the row sees, by rows and query groups. In a ragged batch
// there are none beyond a row's own length.
struct KvSplits {
    struct Split {
        int64_t b, g, n0;
    };
    std::vector<Split> all;
    std::vector<int64_t> first;  // index of the first split of each row's group; and the end

    void find(int64_t B, int64_t G, int64_t T, int64_t N, const bf16* bias, const int64_t* bias_strides) {
        all.clear(), first.assign(1, 0);
        for (int64_t b = 0; b < B; b++) {
            std::vector<int64_t> seen;
            for (int64_t n0 = 0; n0 < N; n0 += SPLIT_KEYS) {
                const bf16* own = bias ? bias + b * bias_strides[0] + n0 : nullptr;
                if (is_seen(own, bias_strides[1], T, std::min<int64_t>(SPLIT_KEYS, N - n0))) seen.push_back(n0);
            }
            for (int64_t g = 0; g < G; g++) {
                for (int64_t n0 : seen) all.push_back({b, g, n0});
                first.push_back(int64_t(all.size()));
            }
        }
    }

private:
    static bool is_seen(const bf16* bias, int64_t stride, int64_t T, int64_t n) {
        for (int64_t t = 0; bias && t < T; t++)
            if (!std::all_of(bias + t * stride, bias + t * stride + n, [](bf16 x) { return x == HIDDEN; })) return true;
        return !bias;
    }
};

// Attention of one call, in the order in which a team of threads does it: `attend_splits`, then `combine`.
struct Attention {
    int64_t B, H, G, T, N, D;
    float scale, cap;
    const bf16 *k, *v;
    int64_t k_strides[3], v_strides[3];  // of rows, heads, slots
    const bf16* bias;
    int64_t bias_strides[2];  // of rows, queries
    const bf16* sinks;
    const KvSplits* splits;
    const int64_t* rows;          // rows of keys and values that the queries attend to (B,); null: the first B
    const Vectors* encoded;       // keys and values in fewer bits, in place of k and v; null: none
    float *sums, *tops, *totals;  // of each split, by the queries that share it
    bf16* queries;                // (B, H, T, D)

    int64_t shared() const { return H / G * T; }  // queries that attend to the same keys
    int64_t results() const { return int64_t(splits->all.size()) * shared(); }
    int64_t scratch_size() const { return results() * (D + 2) + (B * H * T * D + 1) / 2; }

    void use_scratch(float* scratch) {
        sums = scratch;
        tops = sums + results() * D;
        totals = tops + results();
        queries = (bf16*)(totals + results());
    }

    void attend_splits() const {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < int64_t(splits->all.size()); i++) attend_split(i);
    }

    // The first key or value of a split
    const bf16* start(const KvSplits::Split& p, const bf16* x, const int64_t* strides) const {
        return x + (rows ? rows[p.b] : p.b) * strides[0] + p.g * strides[1] + p.n0 * strides[2];
    }

    Vectors start(const KvSplits::Split& p, const Vectors& x) const {
        return x.at(rows ? rows[p.b] : p.b, p.g, p.n0);
    }

    // The rows of the mask for `count` of a group's queries from r on
    void bias_of(const KvSplits::Split& p, int64_t r, int count, const bf16** target) const {
        for (int c = 0; c < count; c++)
            target[c] = bias ? bias + p.b * bias_strides[0] + (r + c) % T * bias_strides[1] + p.n0 : nullptr;
    }

    void attend_encoded_split(int64_t i) const {
        const KvSplits::Split& p = splits->all[i];
        const int64_t n = std::min<int64_t>(SPLIT_KEYS, N - p.n0), group = p.b * G + p.g;
        const Vectors keys = start(p, encoded[0]), values = start(p, encoded[1]);
        const Vectors ahead = i + 1 < int64_t(splits->all.size()) ? start(splits->all[i + 1], encoded[0]) : keys;
        for (int64_t r = 0; r < shared(); r += 4) {
            const int count = int(std::min<int64_t>(4, shared() - r));
            const bf16* rows_bias[4];
            bias_of(p, r, count, rows_bias);
            const auto run = count == 1   ? attend_encoded<1>
                             : count == 2 ? attend_encoded<2>
                             : count == 3 ? attend_encoded<3>
                                          : attend_encoded<4>;
            const int64_t at = i * shared() + r;
            run(queries + (group * shared() + r) * D, keys, values, ahead, rows_bias, n, D, scale, cap, tops + at,
                totals + at, sums + at * D);
        }
    }

    // Attention of all queries of a group over one split
    void attend_split(int64_t i) const {
        if (encoded) return attend_encoded_split(i);
        const KvSplits::Split& p = splits->all[i];
        const int64_t n = std::min<int64_t>(SPLIT_KEYS, N - p.n0), group = p.b * G + p.g;
        const bf16 *keys = start(p, k, k_strides), *values = start(p, v, v_strides);
        const bf16* ahead = i + 1 < int64_t(splits->all.size()) ? start(splits->all[i + 1], k, k_strides) : keys;
        for (int64_t r = 0; r < shared(); r += 4) {
            const int count = int(std::min<int64_t>(4, shared() - r));
            const bf16* rows_bias[4];
            bias_of(p, r, count, rows_bias);
            const auto run = count == 1   ? attend_rows<1>
                             : count == 2 ? attend_rows<2>
                             : count == 3 ? attend_rows<3>
                                          : attend_rows<4>;
            const int64_t at = i * shared() + r;
            run(queries + (group * shared() + r) * D, keys, values, ahead, k_strides[2], v_strides[2], rows_bias, n, D,
                scale, cap, tops + at, totals + at, sums + at * D);
        }
    }

    void combine(bf16* y) const {  // (B, T, H, D)
#pragma omp for schedule(static)
        for (int64_t row = 0; row < B * H * T; row++) {
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
            for (int64_t d = 0; d < D; d++) y[((b * T + t) * H + h) * D + d] = narrow(out[d] / total);
        }
    }
};
