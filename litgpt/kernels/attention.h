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

// Replaces scores s (n,) by exp(s - top), where `top` is the largest score. Returns their sum.
NOT_INLINED inline float exponentiate(float* s, float* top, int64_t n) {
    const float most = *top = largest(s, n);
    return exponentiate_to(s, s, most == -INFINITY ? 0.0f : most, n);
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

// Weighted sums of n values for R queries, columns [d0, d0 + V LANES): out (R, D). The keys at `ahead` are prefetched.
template <int R, int V>
inline void add_values(const float (*weights)[SPLIT_KEYS], const bf16* ahead, int64_t k_stride, const bf16* v,
                       int64_t v_stride, int64_t n, int64_t D, int64_t d0, float* out) {
    Floats sums[R][V];
    UNROLLED for (int r = 0; r < R; r++) UNROLLED for (int i = 0; i < V; i++) sums[r][i] = zeros();
    for (int64_t j = 0; j < n; j++) {
        Floats values[V];
        prefetch(ahead + j * k_stride + d0, 2 * LANES * V);
        UNROLLED for (int i = 0; i < V; i++) values[i] = load(v + j * v_stride + d0 + LANES * i);
        UNROLLED for (int r = 0; r < R; r++) {
            const Floats weight = all(weights[r][j]);
            UNROLLED for (int i = 0; i < V; i++) sums[r][i] = multiply_add(weight, values[i], sums[r][i]);
        }
    }
    UNROLLED for (int r = 0; r < R; r++) UNROLLED for (int i = 0; i < V; i++)
        store(out + r * D + d0 + LANES * i, sums[r][i]);
}

// x (n,) in the type in which it is multiplied: itself, or in `room`
inline const bf16* as_inputs(const bf16* x, int64_t, bf16*) { return x; }
inline const float* as_inputs(const bf16* x, int64_t n, float* room) {
    for (int64_t i = 0; i < n; i++) room[i] = widen(x[i]);
    return room;
}

// Attention from R queries over n <= SPLIT_KEYS keys: `top` the largest scores, `total` the sums of exponentials, and
// `out` the weighted sums of values.
template <int R, int D0>
void attend_keys(const bf16* q, const bf16* k, const bf16* v, const bf16* ahead, int64_t k_stride, int64_t v_stride,
                 const bf16* const* bias, int64_t n, int64_t any_D, float scale, float cap, float* top, float* total,
                 float* out) {
    const int64_t D = D0 ? D0 : any_D;
    float scores[R][SPLIT_KEYS];
    int64_t done = 0, d0 = 0;
    if (D % NUMBERS == 0) {
        Input inputs[std::is_same_v<Input, bf16> ? 1 : R * MAX_D];
        const Input* queries = as_inputs(q, R * D, inputs);
        for (; done < n; done += LANES) {
            Floats sums[R][LANES];
            for (int j = 0; j < LANES; j++) {
                const bf16* key = k + std::min(done + j, n - 1) * k_stride;  // after the last one, it again
                prefetch(v + std::min(done + j, n - 1) * v_stride, D * 2);
                Floats own[R];
                UNROLLED for (int r = 0; r < R; r++) own[r] = zeros();
                for (int64_t d = 0; d < D; d += NUMBERS) {
                    const Numbers keys = load_numbers(key + d);
                    UNROLLED for (int r = 0; r < R; r++) own[r] =
                        add_products(own[r], keys, load_numbers(queries + r * D + d));
                }
                UNROLLED for (int r = 0; r < R; r++) sums[r][j] = own[r];
            }
            UNROLLED for (int r = 0; r < R; r++) store(scores[r] + done, sums_of_all(sums[r]));
        }
    }
    for (int64_t j = done; j < n; j++)
        for (int r = 0; r < R; r++) {
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t d = 0; d < D; d++) sum += widen(k[j * k_stride + d]) * widen(q[r * D + d]);
            scores[r][j] = sum;
        }
    for (int r = 0; r < R; r++) weigh(scores[r], bias[r], n, scale, cap, top + r, total + r);
    constexpr int V = output_vectors(std::max(R, 4));  // sums in registers
    for (; d0 + V * LANES <= D; d0 += V * LANES) add_values<R, V>(scores, ahead, k_stride, v, v_stride, n, D, d0, out);
    for (; d0 + LANES <= D; d0 += LANES) add_values<R, 1>(scores, ahead, k_stride, v, v_stride, n, D, d0, out);
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

// Products of R queries q (R, D) with n encoded keys: scores. As many codes `ahead` are prefetched.
template <int R, int KIND>
void multiply_encoded(const float* q, const Vectors& k, const Vectors& ahead, int64_t n, int64_t D,
                      float (*scores)[SPLIT_KEYS]) {
#ifdef __AVX512BW__
    if (D % GROUP == 0) {  // in integers: queries have 16 bits
        for (int r = 0; r < R; r++) std::fill(scores[r], scores[r] + SPLIT_KEYS, 0.0f);
        for (int64_t d = 0; d < D; d += GROUP) {
            const int64_t ahead_bytes = GROUP * ahead.strides[2] / D, ahead_at = d / GROUP * ahead_bytes;
            __m512i queries[R][2];
            float units[R], totals[R];
            for (int r = 0; r < R; r++) {
                int16_t numbers[GROUP], ordered[GROUP];
                units[r] = to_integers(q + r * D + d, numbers);
                for (int i = 0; i < 4; i++)
                    std::memcpy(ordered + 16 * i, numbers + 16 * block_of_codes<KIND>(i), 16 * sizeof(int16_t));
                queries[r][0] = _mm512_loadu_si512(ordered), queries[r][1] = _mm512_loadu_si512(ordered + 32);
                totals[r] = 0;
                for (int i = 0; i < GROUP; i++) totals[r] += q[r * D + d + i];
            }
            float scale[SPLIT_KEYS], least[SPLIT_KEYS] = {};
            load_scales<KIND>(k, d, n, scale, least);
            for (int64_t j0 = 0; j0 < n; j0 += 16) {
                __m512 sums[R][16];
                for (int j = 0; j < 16; j++) {
                    __m512i first, second;
                    const int64_t slot = std::min(j0 + j, n - 1);  // after the last one, it again
                    prefetch(ahead.codes_of(slot) + ahead_at, ahead_bytes);
                    widen_codes<KIND>(k.codes_of(slot), D, d, first, second);
                    UNROLLED for (int r = 0; r < R; r++) {
                        const __m512i own = add_integer_products(_mm512_setzero_si512(), first, queries[r][0]);
                        sums[r][j] = _mm512_cvtepi32_ps(add_integer_products(own, second, queries[r][1]));
                    }
                }
                UNROLLED for (int r = 0; r < R; r++) {
                    const __m512 products = _mm512_mul_ps(sums_of_all(sums[r]), _mm512_set1_ps(units[r]));
                    const __m512 before = _mm512_fmadd_ps(_mm512_loadu_ps(least + j0), _mm512_set1_ps(totals[r]),
                                                          _mm512_loadu_ps(scores[r] + j0));
                    _mm512_storeu_ps(scores[r] + j0, _mm512_fmadd_ps(products, _mm512_loadu_ps(scale + j0), before));
                }
            }
        }
        return;
    }
#endif
    for (int64_t j = 0; j < n; j++) {
        float x[MAX_D];
        decode_codes<KIND>(k.codes_of(j), k.scales_of(j), D, x);
        const float scale = KIND == INT8 ? widen(*k.scales_of(j)) : 1.0f;
        for (int r = 0; r < R; r++) {
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t d = 0; d < D; d++) sum += x[d] * q[r * D + d];
            scores[r][j] = sum * scale;
        }
    }
}

#ifdef __AVX512BW__
// Codes of numbers [d, d + 64) of two values of D numbers, in pairs of 16 bits, one of each
template <int KIND>
inline void pair_codes(const char* a, const char* b, int64_t D, int64_t d, __m512i* pairs) {
    __m512i first[2], second[2];
    widen_codes<KIND>(a, D, d, first[0], first[1]);
    widen_codes<KIND>(b, D, d, second[0], second[1]);
    for (int i = 0; i < 2; i++) {
        pairs[2 * i] = _mm512_unpacklo_epi16(first[i], second[i]);
        pairs[2 * i + 1] = _mm512_unpackhi_epi16(first[i], second[i]);
    }
}
#endif

// Sums of n encoded values, as the weights (0 after the last) of R queries say: out (R, D). As many codes `ahead` are
// prefetched.
template <int R, int KIND>
void add_encoded(const float (*weights)[SPLIT_KEYS], const Vectors& v, const Vectors& ahead, int64_t n, int64_t D, float* out) {
#ifdef __AVX512BW__
    if (D % GROUP == 0) {  // in integers: weights have 16 bits
        for (int64_t d = 0; d < D; d += GROUP) {
            const int64_t ahead_bytes = GROUP * ahead.strides[2] / D, ahead_at = d / GROUP * ahead_bytes;
            float scale[SPLIT_KEYS] = {}, least[SPLIT_KEYS] = {};
            load_scales<KIND>(v, d, n, scale, least);
            int16_t numbers[R][SPLIT_KEYS];
            float units[R], bases[R];
            for (int r = 0; r < R; r++) {
                float scaled[SPLIT_KEYS], base = 0;
                for (int j = 0; j < SPLIT_KEYS; j++) scaled[j] = weights[r][j] * scale[j];
                for (int j = 0; j < SPLIT_KEYS; j++) base += weights[r][j] * least[j];
                units[r] = to_integers(scaled, numbers[r]), bases[r] = base;
            }
            __m512i sums[R][4];
            UNROLLED for (int r = 0; r < R; r++) UNROLLED for (int i = 0; i < 4; i++) sums[r][i] = _mm512_setzero_si512();
            for (int64_t j = 0; j < n; j += 2) {
                __m512i pairs[4];
                prefetch(ahead.codes_of(j) + ahead_at, ahead_bytes);
                prefetch(ahead.codes_of(j + 1) + ahead_at, ahead_bytes);
                pair_codes<KIND>(v.codes_of(j), v.codes_of(std::min(j + 1, n - 1)), D, d, pairs);
                UNROLLED for (int r = 0; r < R; r++) {
                    int32_t both;
                    std::memcpy(&both, numbers[r] + j, 4);
                    const __m512i weight = _mm512_set1_epi32(both);
                    UNROLLED for (int i = 0; i < 4; i++) sums[r][i] = add_integer_products(sums[r][i], pairs[i], weight);
                }
            }
            for (int r = 0; r < R; r++) {
                const __m512i even = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
                const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(8));
                UNROLLED for (int i = 0; i < 4; i++) {  // blocks of 16 codes; `unpack` has divided them by fours
                    const __m512i codes = _mm512_permutex2var_epi32(sums[r][i / 2 * 2], i % 2 ? odd : even, sums[r][i / 2 * 2 + 1]);
                    const __m512 values = _mm512_fmadd_ps(_mm512_cvtepi32_ps(codes), _mm512_set1_ps(units[r]), _mm512_set1_ps(bases[r]));
                    _mm512_storeu_ps(out + r * D + d + 16 * block_of_codes<KIND>(i), values);
                }
            }
        }
        return;
    }
#endif
    std::fill(out, out + R * D, 0.0f);
    for (int64_t j = 0; j < n; j++) {
        float x[MAX_D];
        decode_codes<KIND>(v.codes_of(j), v.scales_of(j), D, x);
        const float scale = KIND == INT8 ? widen(*v.scales_of(j)) : 1.0f;
        for (int r = 0; r < R; r++) {
            const float weight = weights[r][j] * scale;
#pragma omp simd
            for (int64_t d = 0; d < D; d++) out[r * D + d] = multiply_add(weight, x[d], out[r * D + d]);
        }
    }
}

// As `attend_keys`, with encoded keys and values; the keys `next_k` are prefetched.
template <int R>
void attend_encoded(const bf16* q, const Vectors& k, const Vectors& v, const Vectors& next_k, const bf16* const* bias, int64_t n, int64_t D, float scale, float cap, float* top, float* total,
                    float* out) {
    float scores[R][SPLIT_KEYS], queries[R * MAX_D];
    for (int64_t i = 0; i < R * D; i++) queries[i] = widen(q[i]);
    prefetch(v.scales, n * v.scale_strides[2] * int64_t(sizeof(bf16)));
    with_kind(k, [&](auto kind) { multiply_encoded<R, decltype(kind)::value>(queries, k, v, n, D, scores); });
    for (int r = 0; r < R; r++) weigh(scores[r], bias[r], n, scale, cap, top + r, total + r);
    prefetch(next_k.scales, n * next_k.scale_strides[2] * int64_t(sizeof(bf16)));
    with_kind(v, [&](auto kind) { add_encoded<R, decltype(kind)::value>(scores, v, next_k, n, D, out); });
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
