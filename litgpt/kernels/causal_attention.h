// Attention from many queries, as in the prefill. Arithmetic is the limit: scores and weighted values are products of
// six rows with 64 columns, as in weights.h. Keys and values are rearranged for them, KEY_BLOCK at a time.
//
// T queries are the last of N consecutive positions, and each sees the last `window` keys up to its own.

#pragma once

#include "attention.h"
#include "panels.h"
#include "two_bits.h"

struct CausalAttention {
    static constexpr int64_t KEY_BLOCK = 512;      // keys that are rearranged at a time
    static constexpr int64_t QUERY_TILE_ROWS = 144;  // approximate rows of a tile: queries of all heads that share keys
    static constexpr int64_t KEYS = BLOCK_TILE;

    int64_t H, G, T, N, D, window;
    float scale, cap;
    const bf16 *q, *k, *v, *sinks;
    int64_t q_strides[2], k_strides[2], v_strides[2];  // of heads, tokens
    bf16* y;                                           // (T, H, D), also in place of the queries
    Vectors encoded[2] = {};                           // keys and values in fewer bits, in place of k and v, of one row
    int64_t pinned = 0;                                // first keys, which all queries see that follow them
    const bf16* new_keys[2] = {};  // of caches in 2 bits: keys and values of the tokens, by the strides of queries; others in k and v
    int64_t sealed = 0, begin = 0, newest = 0;  // and as in `Segment`
    const int64_t *first_slots = nullptr, *extra_slots = nullptr;  // of heads of keys, as in `Layer`; then there is no window

    int64_t tile_tokens() const {
        const int64_t tokens = ((encoded[0].kind ? 2 * QUERY_TILE_ROWS : QUERY_TILE_ROWS) * G / H + ROWS - 1) / ROWS * ROWS;
        return std::max<int64_t>(4 * ROWS, tokens);
    }
    int64_t tiles() const { return (T + tile_tokens() - 1) / tile_tokens(); }
    int64_t tasks() const { return G * tiles(); }

    int64_t last_key(int64_t t) const { return N - T + t + 1; }  // exclusive
    int64_t first_key(int64_t t) const { return std::max<int64_t>(0, last_key(t) - window); }

    // The same with the keys of one head, which has slots of its own
    CausalAttention of_head(int64_t g) const {
        CausalAttention own = *this;
        own.N += extra_slots[g], own.window = own.N;
        own.k += first_slots[g] * k_strides[1], own.v += first_slots[g] * v_strides[1];
        for (int i = 0; i < 2 && encoded[0].kind; i++) own.encoded[i] = encoded[i].at(0, 0, first_slots[g]);
        own.first_slots = nullptr;
        return own;
    }

    // One of `tasks()`. Any thread may take any of them; the longest come first.
    void run(int64_t task) const {
        if (first_slots) return of_head(task % G).run(task);
        static thread_local Scratch<float> scratch;
        const int64_t g = task % G, tile = tiles() - 1 - task / G, heads = H / G;
        const int64_t t0 = tile * tile_tokens(), count = std::min(tile_tokens(), T - t0), rows = heads * count;
        const int64_t size = (D + 31) / 32 * 32, outputs = (D + KEYS - 1) / KEYS * KEYS;
        const int64_t inputs = rows * size + ROWS * KEY_BLOCK;
        float* start = scratch.get(KEY_BLOCK * (size + outputs) / 2 + inputs * int64_t(sizeof(Input)) / 4 +
                                   rows * (outputs + 2) + ROWS * KEY_BLOCK);
        uint32_t *keys = (uint32_t*)start, *values = keys + KEY_BLOCK * size / 2;
        Input *queries = (Input*)(values + KEY_BLOCK * outputs / 2), *weights = queries + rows * size;
        float* sums = (float*)(weights + ROWS * KEY_BLOCK);
        float *tops = sums + rows * outputs, *totals = tops + rows, *scores = totals + rows;

        std::fill_n(sums, rows * outputs, 0.0f);
        for (int64_t row = 0; row < rows; row++) {
            const int64_t h = g * heads + row / count, t = t0 + row % count;
            prepare_inputs(q + h * q_strides[0] + t * q_strides[1], D, (char*)(queries + row * size),
                           size * sizeof(Input));
            tops[row] = sinks ? widen(sinks[h]) : -INFINITY;
            totals[row] = sinks ? 1.0f : 0.0f;
        }
        const int64_t end = last_key(t0 + count - 1);
        for (int64_t k0 = pinned ? 0 : first_key(t0) / KEYS * KEYS; k0 < end; k0 += KEY_BLOCK) {
            const int64_t n = std::min(KEY_BLOCK, end - k0), padded = (n + KEYS - 1) / KEYS * KEYS;
            lay_out_keys(keys, g, k0, n, size);
            lay_out_values(values, g, k0, n, outputs);
            for (int64_t row = 0; row < rows;) {
                const int64_t t = t0 + row % count;
                // consecutive tokens of one head
                const int n_queries = int(std::min<int64_t>(ROWS, count - row % count));
                const int64_t from = k0 < pinned ? 0 : std::max<int64_t>(0, first_key(t) - k0) / KEYS * KEYS;
                const int64_t to = std::min(padded, (last_key(t + n_queries - 1) - k0 + KEYS - 1) / KEYS * KEYS);
                if (from < to)
                    attend(queries + row * size, keys, values, scores, weights, k0, from, to, t, n_queries, size,
                           outputs, tops + row, totals + row, sums + row * outputs);
                row += n_queries;
            }
        }
        for (int64_t row = 0; row < rows; row++) {
            bf16* out = y + ((t0 + row % count) * H + g * heads + row / count) * D;
            for (int64_t d = 0; d < D; d++) out[d] = narrow(sums[row * outputs + d] / totals[row]);
        }
    }

private:
    friend struct SeenWeights;

    // Adds the attention of `n_queries` queries from t on over keys [from, to) of the block that begins at k0.
    void attend(const Input* queries, const uint32_t* keys, const uint32_t* values, float* scores, Input* weights,
                int64_t k0, int64_t from, int64_t to, int64_t t, int n_queries, int64_t size, int64_t outputs,
                float* tops, float* totals, float* sums) const {
        const int64_t n = to - from;
        for (int64_t j = from; j < to; j += KEYS) {
            float part[ROWS * KEYS];
            compute_block(keys + j / KEYS * size / 2 * KEYS, size, {(const char*)queries, size * int64_t(sizeof(Input))},
                          n_queries, part);
            for (int m = 0; m < n_queries; m++) {
                float* s = scores + m * n + j - from;
                const int64_t first = first_key(t + m) - k0 - j, last = last_key(t + m) - k0 - j;
                if (cap > 0)
                    for (int64_t i = 0; i < KEYS; i++) s[i] = softcap(part[m * KEYS + i] * scale, cap);
                else
                    for (int64_t i = 0; i < KEYS; i++) s[i] = part[m * KEYS + i] * scale;
                if (first > 0 || last < KEYS)
                    for (int64_t i = 0; i < KEYS; i++)
                        s[i] = (i >= first || i < pinned - k0 - j) && i < last ? s[i] : -INFINITY;
            }
        }
        float factors[ROWS];  // that rescale the sums so far
        for (int m = 0; m < n_queries; m++) {
            const float before = tops[m];
            totals[m] = exponentiate_row(scores + m * n, n, tops + m, totals[m], weights + m * n);
            factors[m] = before == -INFINITY ? 0.0f : exponential(before - tops[m]);
        }
        for (int64_t u = 0; u < outputs / KEYS; u++) {
            float part[ROWS * KEYS];
            compute_block(values + u * KEY_BLOCK / 2 * KEYS + from / 2 * KEYS, n,
                          {(const char*)weights, n * int64_t(sizeof(Input))}, n_queries, part);
            for (int m = 0; m < n_queries; m++) {
                float* out = sums + m * outputs + u * KEYS;
                for (int64_t d = 0; d < KEYS; d++) out[d] = out[d] * factors[m] + part[m * KEYS + d];
            }
        }
    }

    // Weights exp(s - top) of scores s (n,), where `top` is the largest score so far. Returns the sum of all weights so
    // far.
    static float exponentiate_row(const float* s, int64_t n, float* top, float total, Input* weights) {
        const float most = std::max(*top, largest(s, n));
        const float base = most == -INFINITY ? 0.0f : most;
        if (total > 0) total *= exponential(*top - base);
        *top = most;
        return total + exponentiate_to(weights, s, base, n);
    }

    // The key or value at position p, which is in `room` where it is decoded
    const bf16* vector(int side, int64_t g, int64_t p, bf16* room) const {
        if (!newest) {
            decode(encoded[side].at(0, g, p), D, room);
        } else if (p < sealed) {
            float x[MAX_D];
            (side ? decode_value : decode_key)(encoded[side].at(0, g, 0), p, D, x);
            for (int64_t d = 0; d < D; d++) room[d] = narrow(x[d]);
        } else if (p < begin) {
            return (side ? v : k) + g * k_strides[0] + p % newest * k_strides[1];
        } else {
            return new_keys[side] + g * q_strides[0] + (p - (N - T)) * q_strides[1];
        }
        return room;
    }

    // Keys [k0, k0 + n) of group g in blocks of 64: for pairs of their numbers, one after the other; zeros after the
    // last.
    void lay_out_keys(uint32_t* target, int64_t g, int64_t k0, int64_t n, int64_t size) const {
        const bf16* start = encoded[0].kind ? nullptr : k + g * k_strides[0] + k0 * k_strides[1];
        std::vector<bf16> decoded(start ? 0 : LANES * size);
        for (int64_t j = 0; j < (n + KEYS - 1) / KEYS * KEYS; j += LANES) {
            uint32_t* block = target + j / KEYS * KEYS * size / 2 + j % KEYS;
            const int64_t count = std::min<int64_t>(LANES, n - j);
            for (int64_t i = 0; !start && i < count; i++) {
                bf16* room = decoded.data() + i * size;
                const bf16* own = vector(0, g, k0 + j + i, room);
                if (own != room) std::memcpy(room, own, D * sizeof(bf16));
            }
            const bf16* rows = start ? start + j * k_strides[1] : decoded.data();
            const int64_t stride = start ? k_strides[1] : size;
            lay_out_columns(block, rows, stride, count, D, size);
        }
    }

    // Values [k0, k0 + n) of group g in blocks of 64 numbers: for pairs of tokens, one after the other; zeros after the
    // last.
    void lay_out_values(uint32_t* target, int64_t g, int64_t k0, int64_t n, int64_t outputs) const {
        const bf16* start = encoded[0].kind ? nullptr : v + g * v_strides[0] + k0 * v_strides[1];
        const bf16 none[MAX_D] = {};
        bf16 decoded[2][MAX_D];
        const auto value = [&](int64_t j, bf16* own) -> const bf16* {
            if (j >= n) return none;
            if (start) return start + j * v_strides[1];
            return vector(1, g, k0 + j, own);
        };
        for (int64_t j = 0; j < (n + KEYS - 1) / KEYS * KEYS; j += 2) {
            const bf16 *first = value(j, decoded[0]), *second = value(j + 1, decoded[1]);
            for (int64_t u = 0; u < outputs / KEYS; u++) {
                uint32_t* row = target + u * KEY_BLOCK / 2 * KEYS + j / 2 * KEYS;
                const int64_t d0 = u * KEYS, width = std::min(KEYS, D - d0);
                for (int64_t d = 0; d < width; d++) row[d] = uint32_t(first[d0 + d]) | uint32_t(second[d0 + d]) << 16;
                for (int64_t d = width; d < KEYS; d++) row[d] = 0;
            }
        }
    }
};
