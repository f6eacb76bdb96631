// Attention of a row with gradients in bfloat16: scores, weights and sums in float; weights and their gradients are rounded to
// bfloat16 where they are multiplied. All products are blocks of a few rows and 64 columns, as in weights.h.

#pragma once

#include "panels.h"

// Which of the keys a query sees: those up to its own, which comes after `before` others, fewer than `window` before it, and the
// first `n_sink`.
struct Seen {
    int64_t before, window, n_sink;
    const uint8_t* mask = nullptr;  // (1 or groups, T, N), in float: 0 where a query does not see a key for other reasons
    int64_t mask_stride = 0;        // from group to group

    int64_t first(int64_t t) const { return std::max<int64_t>(0, before + t + 1 - window); }  // of the window

    // Minus infinity for the scores s (n,) of keys from `begin` on, where query t does not see them
    void hide(float* s, int64_t t, int64_t begin, int64_t n) const {
        const auto at = [&](int64_t key) { return s + std::clamp<int64_t>(key - begin, 0, n); };
        std::fill(at(before + t + 1), s + n, -INFINITY);
        if (first(t) > n_sink) std::fill(at(n_sink), at(first(t)), -INFINITY);
    }

    // The same by the mask, whose rows have N keys
    void hide_masked(float* s, int64_t t, int64_t begin, int64_t n, int64_t N) const {
        if (!mask) return;
        const uint8_t* own = mask + t * N + begin;
        for (int64_t i = 0; i < std::min(n, N - begin); i++) s[i] = own[i] ? s[i] : -INFINITY;
    }
};

// One head of one row: T tokens, and N keys, the last T of which are theirs; D a multiple of 16.
struct NarrowRowHead {
    using Number = bf16;
    static constexpr int64_t WIDTH = BLOCK_TILE;
    static constexpr int STEP = ROWS / 2 * 2;    // rows at a time: pairs
    static constexpr int64_t KEYS = 32 * STEP;  // whose part in the gradients of queries is summed at a time

    int64_t T, D;
    Seen seen;
    float scale;
    const bf16 *q, *k, *v;
    int64_t q_stride, k_stride, v_stride;  // from token to token

    static int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
    static int64_t size(int64_t D) { return padded(D, 32); }
    static int64_t width(int64_t D) { return padded(D, WIDTH); }

    // Most of what the two functions take from their scratch, in floats
    static int64_t scratch_size(int64_t T, int64_t N, int64_t D) {
        const int64_t n = padded(T, WIDTH), n_keys = padded(N, WIDTH), in_float = sizeof(Input) / 2;
        const int64_t panels = n_keys * (size(D) + width(D)) + n * KEYS / 2;
        return panels + in_float * n_keys * (D + 2 * size(D) + 4 * STEP) / 2 + n * (2 + D) + STEP * n_keys + 16 * 16;
    }

    // y and the logarithms of the sums of exponentials (T,)
    void forward(float* scratch, bf16* y, int64_t y_stride, float* logs) const {
        Room room{scratch};
        const int64_t S = size(D), N = T + seen.before, n = padded(N, WIDTH);
        uint32_t *keys = room.pairs(n * S / 2), *values = room.pairs(n * width(D) / 2);
        const Rows queries = as_rows(q, q_stride, T, room);
        Input* weights = room.inputs(STEP * n);
        float* scores = room.floats(STEP * n);
        by_columns(keys, k, k_stride, N);
        by_rows(values, v, v_stride, N);
        for (int64_t t = 0; t < T; t += STEP) {
            const int rows = int(std::min<int64_t>(STEP, T - t));
            const int64_t end = padded(seen.before + t + rows, WIDTH);
            float totals[STEP], part[ROWS * WIDTH];
            for (int64_t j = 0; j < end; j += WIDTH) {
                compute_block(keys + j * S / 2, S, from(queries, t), rows, part);
                for (int m = 0; m < rows; m++)
                    for (int64_t i = 0; i < WIDTH; i += LANES) store(scores + m * n + j + i, load(part + m * WIDTH + i) * all(scale));
            }
            for (int m = 0; m < rows; m++) {
                float* s = scores + m * n;
                seen.hide(s, t + m, 0, end);
                const float most = largest(s, end);
                totals[m] = exponentiate_to(weights + m * n, s, most, end);
                logs[t + m] = most + std::log(totals[m]);
            }
            for (int64_t d = 0; d < D; d += WIDTH) {
                compute_block(values + d * n / 2, end, rows_at(weights, n), rows, part);
                for (int m = 0; m < rows; m++)
                    for (int64_t i = 0; i < std::min(WIDTH, D - d); i += LANES)
                        store(y + (t + m) * y_stride + d + i, load(part + m * WIDTH + i) * all(1.0f / totals[m]));
            }
        }
    }

    // Gradients of queries (at dq_stride), and of keys and values (at d_stride), from those of y
    template <class Out>
    void backward(float* scratch, const bf16* y, const bf16* dy, int64_t y_stride, const float* logs, bf16* dq, int64_t dq_stride,
                  Out* dk, Out* dv, int64_t d_stride) const {
        Room room{scratch};
        const int64_t S = size(D), n = padded(T, WIDTH), N = T + seen.before, n_all = padded(N, WIDTH);
        uint32_t *queries = room.pairs(n * S / 2), *outputs = room.pairs(n * S / 2);  // by columns, of y their gradients
        uint32_t *query_rows = room.pairs(n * width(D) / 2), *output_rows = room.pairs(n * width(D) / 2);
        uint32_t* changes = room.pairs(n * KEYS / 2);  // of scores, by rows for each pair of keys
        Input* turned = room.inputs(n_all * D);        // keys (D, n_all)
        Input *weights = room.inputs(STEP * n), *own_changes = room.inputs(STEP * n);
        float *offsets = room.floats(n), *means = room.floats(n), *sums = room.floats(n * D);  // sums: gradients of queries (D, n)
        const Rows keys = as_rows(k, k_stride, N, room), values = as_rows(v, v_stride, N, room);
        by_columns(queries, q, q_stride, T), by_columns(outputs, dy, y_stride, T);
        by_rows(query_rows, q, q_stride, T), by_rows(output_rows, dy, y_stride, T);
        for (int64_t d = 0; d < D; d += WIDTH) lay_out_transposed(turned + d * n_all, n_all, k + d, k_stride, std::min(WIDTH, D - d), N, n_all);
        std::fill_n(sums, n * D, 0.0f);
        for (int64_t t = 0; t < n; t++) {
            offsets[t] = t < T ? logs[t] : INFINITY;  // no weights after the last
            Floats products = zeros();
            for (int64_t d = 0; t < T && d < D; d += LANES)
                products = multiply_add(load(y + t * y_stride + d), load(dy + t * y_stride + d), products);
            means[t] = sum(products);
        }
        for (int64_t k0 = 0; k0 < N; k0 += KEYS) {
            const int64_t n_keys = std::min(KEYS, N - k0);
            for (int64_t i = 0; i < padded(n_keys, 32); i += STEP) {
                // keys from j on, which queries from `first` on may see, or a product of whole pairs reads
                const int64_t j = k0 + i, first = std::max<int64_t>(0, j / 32 * 32 - seen.before) / WIDTH * WIDTH;
                const int rows = int(std::max<int64_t>(0, std::min<int64_t>(STEP, N - j)));
                for (int64_t t = first; t < n && rows; t += WIDTH)
                    weigh(queries + t * S / 2, outputs + t * S / 2, from(keys, j), from(values, j), rows, j, t, offsets + t, means + t,
                          weights + t - first, own_changes + t - first, n);
                for (int m = 0; m < STEP && i + m < padded(n_keys, 32); m += 2)
                    for (int64_t t = first; t < n; t += WIDTH)
                        pair(own_changes + m * n + t - first, n, rows - m, changes + t * KEYS / 2 + (i + m) / 2 * WIDTH);
                if (!rows) continue;
                multiply_rows(weights, output_rows, first, rows, dv + j * d_stride, d_stride);
                multiply_rows(own_changes, query_rows, first, rows, dk + j * d_stride, d_stride);
            }
            for (int64_t t = std::max<int64_t>(0, k0 - seen.before) / WIDTH * WIDTH; t < n; t += WIDTH)
                for (int64_t d = 0; d < D; d += STEP) {
                    const int rows = int(std::min<int64_t>(STEP, D - d));
                    float part[ROWS * WIDTH];
                    const int64_t some = std::min(padded(n_keys, 32), padded(seen.before + t + WIDTH - k0, 32));
                    compute_block(changes + t * KEYS / 2, some, rows_at(turned + d * n_all + k0, n_all), rows, part);
                    for (int m = 0; m < rows; m++)
                        for (int64_t i = 0; i < WIDTH; i += LANES) {
                            float* own = sums + (d + m) * n + t + i;
                            store(own, load(own) + load(part + m * WIDTH + i));
                        }
                }
        }
        for (int64_t t = 0; t < T; t += LANES)
            for (int64_t d = 0; d < D; d += LANES) {
                Pairs part[LANES];
                float turned[LANES];
                for (int i = 0; i < LANES; i++) part[i] = load_pairs((const uint32_t*)sums + (d + i) * n + t);
                transpose(part);
                for (int i = 0; i < LANES && t + i < T; i++) {
                    store_pairs((uint32_t*)turned, part[i]);
                    store(dq + (t + i) * dq_stride + d, load(turned));
                }
            }
    }

private:
    struct Room {  // takes parts of a scratch
        float* next;

        float* floats(int64_t n) {
            float* own = next;
            next += n;
            return own;
        }
        uint32_t* pairs(int64_t n) { return (uint32_t*)floats(n); }
        Input* inputs(int64_t n) { return (Input*)floats(n * int64_t(sizeof(Input)) / 4); }
    };

    static Rows rows_at(const Input* x, int64_t stride) { return {(const char*)x, stride * int64_t(sizeof(Input))}; }
    static Rows from(const Rows& x, int64_t t) { return {x.start + t * x.stride, x.stride}; }

    // `count` rows of D numbers as they are multiplied
    Rows as_rows(const bf16* x, int64_t stride, int64_t count, Room& room) const {
        const int64_t S = size(D);
        if (std::is_same_v<Input, bf16> && S == D) return {(const char*)x, stride * int64_t(sizeof(bf16))};
        Input* rows = room.inputs(padded(count, 2) * S);
        for (int64_t t = 0; t < count; t++) prepare_inputs(x + t * stride, D, (char*)(rows + t * S), S * sizeof(Input));
        return rows_at(rows, S);
    }

    // Panels whose columns are the tokens
    void by_columns(uint32_t* target, const bf16* x, int64_t stride, int64_t count) const {
        for (int64_t t = 0; t < padded(count, WIDTH); t += LANES)
            lay_out_columns(target + t / WIDTH * WIDTH * size(D) / 2 + t % WIDTH, x + std::min(t, count - 1) * stride, stride, count - t, D,
                            size(D));
    }

    // Panels whose rows are the tokens
    void by_rows(uint32_t* target, const bf16* x, int64_t stride, int64_t count) const {
        const int64_t n = padded(count, WIDTH);
        for (int64_t d = 0; d < D; d += WIDTH) lay_out_rows(target + d * n / 2, x + d, stride, std::min(WIDTH, D - d), count, n);
    }

    // Weights, and gradients of scores, of a few keys from key j on and 64 queries from t on
    void weigh(const uint32_t* queries, const uint32_t* outputs, Rows keys, Rows values, int rows, int64_t j, int64_t t,
               const float* offsets, const float* means, Input* weights, Input* changes, int64_t stride) const {
        float scores[ROWS * WIDTH], products[ROWS * WIDTH];
        compute_block(queries, size(D), keys, rows, scores);
        compute_block(outputs, size(D), values, rows, products);
        for (int m = 0; m < rows; m++) {
            for (int64_t i = 0; i < WIDTH; i += LANES) {
                const int at = int(m * WIDTH + i);
                const Floats weight = exponential(load(scores + at) * all(scale) - load(offsets + i));
                store(weights + m * stride + i, weight);
                store(changes + m * stride + i, weight * (load(products + at) - load(means + i)) * all(scale));
            }
            const int64_t own = j + m - seen.before - t, last = j + m < seen.n_sink ? WIDTH : own + seen.window;  // of the queries that see it
            for (int64_t i = 0; i < std::min(WIDTH, own); i++) weights[m * stride + i] = changes[m * stride + i] = Input(0);
            for (int64_t i = std::max<int64_t>(0, last); i < WIDTH; i++) weights[m * stride + i] = changes[m * stride + i] = Input(0);
        }
    }

    // Two rows of 64 numbers (0 of those that are not there) as pairs
    static void pair(const Input* x, int64_t stride, int rows, uint32_t* y) {
        bf16 row[2][WIDTH] = {};
        for (int m = 0; m < std::min(rows, 2); m++)
            for (int64_t i = 0; i < WIDTH; i += LANES) {
                if constexpr (std::is_same_v<Input, bf16>)
                    std::memcpy(row[m] + i, x + m * stride + i, LANES * sizeof(bf16));
                else
                    store(row[m] + i, load(x + m * stride + i));
            }
        pair_up(row[0], row[1], y, WIDTH);
    }

    // y (rows, D) = x (rows, tokens from `first` on) times rows of tokens in panels
    template <class Out>
    void multiply_rows(const Input* x, const uint32_t* panels, int64_t first, int rows, Out* y, int64_t stride) const {
        const int64_t n = padded(T, WIDTH);
        for (int64_t d = 0; d < D; d += WIDTH) {
            float part[ROWS * WIDTH];
            compute_block(panels + d * n / 2 + first / 2 * WIDTH, padded(T, 32) - first, rows_at(x, n), rows, part);
            for (int m = 0; m < rows; m++)
                for (int64_t i = 0; i < std::min(WIDTH, D - d); i += LANES)
                    store(y + m * stride + d + i, load(part + m * WIDTH + i));
        }
    }
};
