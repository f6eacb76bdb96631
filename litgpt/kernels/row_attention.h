// Attention with gradients, in float: tokens of several rows lie one after the other, each sees those of its row up to itself; or
// tokens of one row see keys before them, too.
//
// A block of queries keeps its scores with all keys that it sees.

#pragma once

#include "narrow_rows.h"
#include "float_products.h"

constexpr int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }
// Where the next row of n numbers begins: rows at multiples of 4,096 bytes would share a few places of a cache
constexpr int64_t row_length(int64_t n) { return padded(n) | 16; }

struct Span {
    int64_t begin, end;

    int64_t size() const { return end - begin; }
};

using Spans = std::vector<Span>;

// One head of one row: T tokens, and N keys, the last T of which are theirs; D a multiple of 16.
struct RowHead {
    using Number = float;
    static constexpr int64_t QUERIES = 24;                      // of a block in the forward pass
    static constexpr int64_t MORE_QUERIES = 48, KEYS = 256;     // of a block in the backward pass
    static constexpr int64_t BLOCK = row_length(KEYS);

    int64_t T, D;
    Seen seen;
    float scale;
    const float *q, *k, *v;
    int64_t q_stride, k_stride, v_stride;  // from token to token

    static int64_t scratch_size(int64_t T, int64_t N, int64_t D) {
        return std::max((D + QUERIES) * row_length(N), 2 * (D + MORE_QUERIES) * BLOCK + padded(T));
    }

    // The keys before `end` that queries from t on see: not always one span
    Spans seen_by(int64_t t, int64_t end) const {
        const int64_t sinks = padded(seen.n_sink), start = seen.first(t) / 16 * 16;
        if (start <= sinks) return {{0, end}};
        return sinks ? Spans{{0, sinks}, {start, end}} : Spans{{start, end}};
    }

    // y (D, n tokens), zeros after them, of x (n, D)
    void transpose(const float* x, int64_t stride, int64_t n, float* y, int64_t ld) const {
        for (int64_t t0 = 0; t0 < padded(n); t0 += 16)
            for (int64_t d = 0; d < D; d++)
                for (int64_t t = t0; t < t0 + 16; t++) y[d * ld + t] = t < n ? x[t * stride + d] : 0.0f;
    }

    // Replaces scores s (n,) by exp(scale s - offset), at most 80 each; returns their sum. n is a multiple of 16.
    static float exponentiate_all(float* s, int64_t n, float scale, float offset) {
        Floats sums = zeros();
        for (int64_t i = 0; i < n; i += LANES) {
            const Floats y = exponential(multiply_add(load(s + i), all(scale), all(-offset)));
            store(s + i, y);
            sums += y;
        }
        return sum(sums);
    }

    // y and the logarithms of the sums of exponentials (T,)
    void forward(float* scratch, float* y, int64_t y_stride, float* logs) const {
        const int64_t N = T + seen.before, ld = row_length(N);
        float *keys = scratch, *scores = keys + D * ld;
        transpose(k, k_stride, N, keys, ld);
        for (int64_t t0 = 0; t0 < T; t0 += QUERIES) {
            const int64_t t1 = std::min(t0 + QUERIES, T), M = t1 - t0, end = seen.before + t1;
            const Spans spans = seen_by(t0, end);
            for (const Span& of : spans)
                multiply({q + t0 * q_stride, q_stride, 1}, keys + of.begin, ld, scores + of.begin, ld, M, padded(of.size()), D, false);
            for (int64_t t = t0; t < t1; t++) {
                float *s = scores + (t - t0) * ld, most = -INFINITY, total = 0.0f;
                for (const Span& of : spans) {
                    seen.hide(s + of.begin, t, of.begin, padded(of.size()));
                    seen.hide_masked(s + of.begin, t, of.begin, of.size(), N);
                    most = std::max(most, largest(s + of.begin, padded(of.size())) * scale);
                }
                for (const Span& of : spans) total += exponentiate_all(s + of.begin, padded(of.size()), scale, most);
                for (const Span& of : spans)
                    for (int64_t i = of.begin; i < of.end; i++) s[i] *= 1.0f / total;
                logs[t] = most + std::log(total);
            }
            for (const Span& of : spans)
                multiply({scores + of.begin, ld, 1}, v + of.begin * v_stride, v_stride, y + t0 * y_stride, y_stride, M, D, of.size(),
                         of.begin > spans.begin()->begin);
        }
    }

    // Gradients of queries (at dq_stride), and of keys and values (at d_stride), from those of y
    void backward(float* scratch, const float* y, const float* dy, int64_t y_stride, const float* logs, float* dq,
                  int64_t dq_stride, float* dk, float* dv, int64_t d_stride) const {
        const int64_t N = T + seen.before;
        float *keys = scratch, *values = keys + D * BLOCK, *scores = values + D * BLOCK, *changes = scores + MORE_QUERIES * BLOCK;
        float* means = changes + MORE_QUERIES * BLOCK;
        for (int64_t t = 0; t < T; t++) {
            means[t] = 0.0f;
            for (int64_t d = 0; d < D; d++) means[t] += y[t * y_stride + d] * dy[t * y_stride + d];
            std::fill_n(dq + t * dq_stride, D, 0.0f);
        }
        for (int64_t k0 = 0; k0 < N; k0 += KEYS) {
            const int64_t k1 = std::min(k0 + KEYS, N), first = std::max<int64_t>(0, k0 - seen.before);
            const int64_t last = k0 < seen.n_sink ? T : std::min(T, k1 - 1 - seen.before + seen.window);  // of queries that see some
            transpose(k + k0 * k_stride, k_stride, k1 - k0, keys, BLOCK);
            transpose(v + k0 * v_stride, v_stride, k1 - k0, values, BLOCK);
            for (int64_t i = k0; i < k1; i++) {
                std::fill_n(dk + i * d_stride, D, 0.0f);
                std::fill_n(dv + i * d_stride, D, 0.0f);
            }
            for (int64_t t0 = first; t0 < last; t0 += MORE_QUERIES) {
                const int64_t t1 = std::min(t0 + MORE_QUERIES, last), M = t1 - t0, n = std::min(k1, seen.before + t1) - k0;
                const float *queries = q + t0 * q_stride, *outputs = dy + t0 * y_stride;
                multiply({queries, q_stride, 1}, keys, BLOCK, scores, BLOCK, M, padded(n), D, false);
                multiply({outputs, y_stride, 1}, values, BLOCK, changes, BLOCK, M, padded(n), D, false);
                for (int64_t t = t0; t < t1; t++) {
                    float *s = scores + (t - t0) * BLOCK, *c = changes + (t - t0) * BLOCK;
                    seen.hide(s, t, k0, padded(n));
                    seen.hide_masked(s, t, k0, n, N);
                    exponentiate_all(s, padded(n), scale, logs[t]);
                    for (int64_t i = 0; i < padded(n); i++) c[i] = s[i] * (c[i] - means[t]) * scale;
                }
                multiply({changes, BLOCK, 1}, k + k0 * k_stride, k_stride, dq + t0 * dq_stride, dq_stride, M, D, n, true);
                multiply({changes, 1, BLOCK}, queries, q_stride, dk + k0 * d_stride, d_stride, n, D, M, true);
                multiply({scores, 1, BLOCK}, outputs, y_stride, dv + k0 * d_stride, d_stride, n, D, M, true);
            }
        }
    }
};

// The rows of all heads. Queries (T, H, D), keys and values (N, G, D) by strides over tokens and heads; y (T, H, D); logs
// (H, T); row r has tokens [ends[r - 1], ends[r]). Only a single row may have keys before them: then N is more than T.
template <class Head>
struct RowAttention {
    using Number = typename Head::Number;

    const Number *q, *k, *v;
    const int64_t* strides;  // of q, k and v; in `backward` then of the gradients of q, and of those of k and v, over tokens
    int64_t H, G, D, n_rows;
    const int64_t* ends;
    Seen seen;
    float scale;

    int64_t begin(int64_t row) const { return row ? ends[row - 1] : 0; }
    int64_t tokens() const { return ends[n_rows - 1]; }
    int64_t keys() const { return tokens() + seen.before; }

    Head head(int64_t row, int64_t h) const {
        const int64_t t = begin(row), g = h / (H / G);
        Seen own = seen;
        if (own.mask) own.mask += g * own.mask_stride;
        return {ends[row] - t, D, own, scale, q + t * strides[0] + h * strides[1], k + t * strides[2] + g * strides[3],
                v + t * strides[4] + g * strides[5], strides[0], strides[2], strides[4]};
    }

    template <class Run>
    void for_heads(Run run) const {
#pragma omp parallel for schedule(dynamic)
        for (int64_t i = 0; i < n_rows * H; i++) {
            static thread_local Scratch<float> scratch;
            const Head own = head(i / H, i % H);
            run(own, i % H, begin(i / H), scratch.get(Head::scratch_size(own.T, own.T + seen.before, D)));
        }
    }

    void forward(Number* y, float* logs) const {
        for_heads([&](const Head& own, int64_t h, int64_t t, float* scratch) {
            own.forward(scratch, y + (t * H + h) * D, H * D, logs + h * tokens() + t);
        });
    }

    // dq (T, H, D), dk and dv (N, G, D); where heads share keys, `parts` (2, N, H, D) has those of each head first
    void backward(const Number* y, const Number* dy, const float* logs, Number* dq, float* parts, Number* dk, Number* dv) const {
        const int64_t size = keys() * H * D, share = H / G, dq_stride = strides[6], d_stride = strides[7];
        const auto run = [&](auto* dk, auto* dv, int64_t stride) {
            for_heads([&](const Head& own, int64_t h, int64_t t, float* scratch) {
                const int64_t at = (t * H + h) * D, d_at = t * stride + h * D;
                own.backward(scratch, y + at, dy + at, H * D, logs + h * tokens() + t, dq + t * dq_stride + h * D, dq_stride,
                             dk + d_at, dv + d_at, stride);
            });
        };
        if (share == 1) return run(dk, dv, d_stride);
        run(parts, parts + size, H * D);
#pragma omp parallel for schedule(static)
        for (int64_t i = 0; i < keys() * G; i++)
            for (int64_t d = 0; d < D; d += LANES) {
                Floats key = zeros(), value = zeros();
                for (int64_t j = i * share; j < (i + 1) * share; j++) {
                    key += load(parts + j * D + d);
                    value += load(parts + size + j * D + d);
                }
                const int64_t at = i / G * d_stride + i % G * D + d;
                store(dk + at, key), store(dv + at, value);
            }
    }
};
