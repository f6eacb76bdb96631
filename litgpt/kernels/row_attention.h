// Attention with gradients, in float: tokens of several rows lie one after the other, each sees those of its row up to itself; or
// tokens of one row see keys before them, too.
//
// All products are one: C (M, N) = A (M, K) B (K, N), where elements of A lie at any strides and rows of B and C are
// contiguous. A block of queries keeps its scores with all keys that it sees.

#pragma once

#include "narrow_rows.h"

constexpr int COLUMN_VECTORS = output_vectors(6);  // of a tile of 6 rows: what registers hold

struct Strided {  // a matrix, by the strides of rows and columns
    const float* data;
    int64_t row, column;
};

// M rows and V vectors of columns of C = A B, or C + A B
template <int M, int V>
inline void product_tile(Strided a, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t K, bool add) {
    Floats sums[M][V];
    UNROLLED for (int m = 0; m < M; m++)
        UNROLLED for (int v = 0; v < V; v++) sums[m][v] = add ? load(c + m * ldc + v * LANES) : zeros();
    for (int64_t k = 0; k < K; k++) {
        Floats column[V];
        UNROLLED for (int v = 0; v < V; v++) column[v] = load(b + k * ldb + v * LANES);
        UNROLLED for (int m = 0; m < M; m++) {
            const Floats x = all(a.data[m * a.row + k * a.column]);
            UNROLLED for (int v = 0; v < V; v++) sums[m][v] = multiply_add(x, column[v], sums[m][v]);
        }
    }
    UNROLLED for (int m = 0; m < M; m++)
        UNROLLED for (int v = 0; v < V; v++) store(c + m * ldc + v * LANES, sums[m][v]);
}

template <int V>
inline void product_columns(Strided a, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t M, int64_t K, bool add) {
    int64_t m = 0;
    const auto rest = [&] { return Strided{a.data + m * a.row, a.row, a.column}; };
    for (; m + 6 <= M; m += 6) product_tile<6, V>(rest(), b, ldb, c + m * ldc, ldc, K, add);
    for (; m + 2 <= M; m += 2) product_tile<2, V>(rest(), b, ldb, c + m * ldc, ldc, K, add);
    for (; m < M; m++) product_tile<1, V>(rest(), b, ldb, c + m * ldc, ldc, K, add);
}

// N is a multiple of 16
inline void multiply(Strided a, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t M, int64_t N, int64_t K, bool add) {
    int64_t n = 0;
    for (; n + LANES * COLUMN_VECTORS <= N; n += LANES * COLUMN_VECTORS)
        product_columns<COLUMN_VECTORS>(a, b + n, ldb, c + n, ldc, M, K, add);
    for (; n < N; n += LANES) product_columns<1>(a, b + n, ldb, c + n, ldc, M, K, add);
}

// One head of one row: T tokens, and N keys, the last T of which are theirs; D a multiple of 16.
struct RowHead {
    using Number = float;
    static constexpr int64_t QUERIES = 24;  // of a block

    int64_t T, D;
    Seen seen;
    float scale;
    const float *q, *k, *v;
    int64_t q_stride, k_stride, v_stride;  // from token to token

    static int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

    // Scratch: transposed keys and values (D, padded N), scores and their gradients (QUERIES, padded N).
    static int64_t scratch_size(int64_t, int64_t N, int64_t D) { return 2 * (D + QUERIES) * padded(N); }

    void transpose(const float* x, int64_t stride, float* y) const {
        const int64_t N = T + seen.before, ld = padded(N);
        for (int64_t t0 = 0; t0 < ld; t0 += 16)
            for (int64_t d = 0; d < D; d++)
                for (int64_t t = t0; t < t0 + 16; t++) y[d * ld + t] = t < N ? x[t * stride + d] : 0.0f;
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
        const int64_t ld = padded(T + seen.before);
        float *keys = scratch, *scores = keys + 2 * D * ld;
        transpose(k, k_stride, keys);
        for (int64_t t0 = 0; t0 < T; t0 += QUERIES) {
            const int64_t t1 = std::min(t0 + QUERIES, T), M = t1 - t0, end = seen.before + t1;
            multiply({q + t0 * q_stride, q_stride, 1}, keys, ld, scores, ld, M, padded(end), D, false);
            for (int64_t t = t0; t < t1; t++) {
                float* s = scores + (t - t0) * ld;
                const int64_t n = padded(seen.before + t + 1);
                seen.hide(s, t, padded(end));
                const float most = largest(s, n) * scale, total = exponentiate_all(s, padded(end), scale, most);
                for (int64_t i = 0; i < n; i++) s[i] *= 1.0f / total;
                logs[t] = most + std::log(total);
            }
            multiply({scores, ld, 1}, v, v_stride, y + t0 * y_stride, y_stride, M, D, end, false);
        }
    }

    // Gradients of queries (at dq_stride), and of keys and values (at d_stride), from those of y
    void backward(float* scratch, const float* y, const float* dy, int64_t y_stride, const float* logs, float* dq,
                  int64_t dq_stride, float* dk, float* dv, int64_t d_stride) const {
        const int64_t N = T + seen.before, ld = padded(N);
        float *keys = scratch, *values = keys + D * ld, *scores = values + D * ld, *changes = scores + QUERIES * ld;
        transpose(k, k_stride, keys);
        transpose(v, v_stride, values);
        for (int64_t t = 0; t < N; t++) {
            std::fill_n(dk + t * d_stride, D, 0.0f);
            std::fill_n(dv + t * d_stride, D, 0.0f);
        }
        for (int64_t t0 = 0; t0 < T; t0 += QUERIES) {
            const int64_t t1 = std::min(t0 + QUERIES, T), M = t1 - t0, end = seen.before + t1;
            const float *queries = q + t0 * q_stride, *outputs = dy + t0 * y_stride;
            multiply({queries, q_stride, 1}, keys, ld, scores, ld, M, padded(end), D, false);
            multiply({outputs, y_stride, 1}, values, ld, changes, ld, M, padded(end), D, false);
            for (int64_t t = t0; t < t1; t++) {
                float *s = scores + (t - t0) * ld, *c = changes + (t - t0) * ld;
                const float *own = y + t * y_stride, *d_own = dy + t * y_stride;
                float mean = 0.0f;
                for (int64_t d = 0; d < D; d++) mean += own[d] * d_own[d];
                seen.hide(s, t, padded(end));
                exponentiate_all(s, padded(end), scale, logs[t]);
                for (int64_t i = 0; i < end; i++) c[i] = s[i] * (c[i] - mean) * scale;
            }
            multiply({changes, ld, 1}, k, k_stride, dq + t0 * dq_stride, dq_stride, M, D, end, false);
            multiply({changes, 1, ld}, queries, q_stride, dk, d_stride, end, D, M, true);
            multiply({scores, 1, ld}, outputs, y_stride, dv, d_stride, end, D, M, true);
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
        return {ends[row] - t, D, seen, scale, q + t * strides[0] + h * strides[1], k + t * strides[2] + g * strides[3],
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
