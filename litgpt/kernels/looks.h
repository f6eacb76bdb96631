// What cache policies need of a CPU: the attention weights of queries on stored keys, summed up, all in float; and tokens
// that move to other slots.

#pragma once

#ifdef LITGPT_FLOAT32
#include "attention.h"
#include "float_products.h"

using KeyWord = float;  // of keys that are laid out: one number, or two

// Blocks of BLOCK_TILE keys (N, D), one number of all after the other; zeros in place of others
inline void lay_out_keys(const float* k, int64_t stride, int64_t N, int64_t D, int64_t size, float* blocks) {
    for (int64_t j = 0; j < (N + BLOCK_TILE - 1) / BLOCK_TILE * BLOCK_TILE; j++)
        for (int64_t d = 0; d < size; d++)
            blocks[(j / BLOCK_TILE * size + d) * BLOCK_TILE + j % BLOCK_TILE] = j < N && d < D ? k[j * stride + d] : 0.0f;
}

inline void compute_block(const float* w, int64_t K, const Rows& x, int rows, float* y) {
    multiply({(const float*)x.start, x.stride / int64_t(sizeof(float)), 1}, w, BLOCK_TILE, y, BLOCK_TILE, rows, BLOCK_TILE, K, false);
}
#else
#include "causal_attention.h"

using KeyWord = uint32_t;
#endif

// Attention weights of n queries (B, H, n, D) on N keys (B, G, N, D), which may be encoded. Query i of row b sees the first
// ends[b, g, i] keys.
struct SeenWeights {
    static constexpr int64_t KEYS = BLOCK_TILE;

    int64_t B, H, G, n, N, D;
    float scale, cap;
    const Real *q, *k, *sinks;
    const Vectors* encoded;                // in place of k; null: none
    const int64_t *q_strides, *k_strides;  // of rows, heads, tokens
    const int64_t* ends;
    bool largest;  // of all queries, in place of their sum

    // own (N,): the weights of head h in row b
    void of_head(int64_t b, int64_t h, float* own) const { see(b, h, laid_out_keys(b, h / (H / G)), own); }

    // own (N,): the sum over the heads that share the keys of group g in row b
    void of_group(int64_t b, int64_t g, float* own) const {
        static thread_local Scratch<float> scratch;
        const int64_t heads = H / G;
        const KeyWord* keys = laid_out_keys(b, g);
        float* of_head = scratch.get(N);
        see(b, g * heads, keys, own);
        for (int64_t h = 1; h < heads; h++) {
            see(b, g * heads + h, keys, of_head);
            for (int64_t j = 0; j < N; j++) own[j] += of_head[j];
        }
    }

    // out (B, G, N): of the heads that share keys; `by_head` (B, H, N) is overwritten
    void of_groups(float* by_head, float* out) const {
#pragma omp parallel for num_threads(Team::mine().threads()) schedule(dynamic)
        for (int64_t i = 0; i < B * H; i++) of_head(i / H, i % H, by_head + i * N);
        for (int64_t i = 0; i < B * G; i++) {
            const float* own = by_head + i * (H / G) * N;
            std::copy_n(own, N, out + i * N);
            for (int64_t h = 1; h < H / G; h++)
                for (int64_t j = 0; j < N; j++)
                    out[i * N + j] = largest ? std::max(out[i * N + j], own[h * N + j]) : out[i * N + j] + own[h * N + j];
        }
    }

private:
    int64_t key_size() const { return (D + 31) / 32 * 32; }
    static int64_t words(int64_t numbers) { return numbers * int64_t(sizeof(Real)) / int64_t(sizeof(KeyWord)); }
    int64_t padded_length() const { return (N + KEYS - 1) / KEYS * KEYS; }

    // The keys of group g in row b as `compute_block` reads them: until this thread lays out others
    const KeyWord* laid_out_keys(int64_t b, int64_t g) const {
        static thread_local Scratch<KeyWord> scratch;
        KeyWord* keys = scratch.get(words(padded_length() * key_size()));
#ifdef LITGPT_FLOAT32
        lay_out_keys(k + b * k_strides[0] + g * k_strides[1], k_strides[2], N, D, key_size(), keys);
#else
        CausalAttention source{};
        source.D = D;
        if (encoded)
            source.encoded[0] = encoded->at(b, 0, 0);
        else
            source.k = k + b * k_strides[0], source.k_strides[0] = k_strides[1], source.k_strides[1] = k_strides[2];
        source.lay_out_keys(keys, g, 0, N, key_size());
#endif
        return keys;
    }

    // own (N,): the weights of head h in row b on keys that are laid out
    NOT_INLINED void see(int64_t b, int64_t h, const KeyWord* keys, float* own) const {
        static thread_local Scratch<float> scratch;
        const int64_t g = h / (H / G), size = key_size(), padded = padded_length();
        float* scores = scratch.get(ROWS * (padded + size));
        Input* queries = (Input*)(scores + ROWS * padded);
        std::fill_n(own, N, 0.0f);
        for (int64_t i = 0; i < n; i += ROWS) {
            const int count = int(std::min<int64_t>(ROWS, n - i));
            const int64_t* seen = ends + (b * G + g) * n + i;
            for (int m = 0; m < count; m++) {
                Real query[MAX_D];
                std::memcpy(query, q + b * q_strides[0] + h * q_strides[1] + (i + m) * q_strides[2], D * sizeof(Real));
                if (encoded && encoded->rotated) rotate_vector(query, D);
                prepare_inputs(query, D, (char*)(queries + m * size), size * sizeof(Input));
            }
            const int64_t end = *std::max_element(seen, seen + count), columns = (end + KEYS - 1) / KEYS * KEYS;
            for (int64_t j = 0; j < end; j += KEYS) {
                float part[ROWS * KEYS];
                compute_block(keys + words(j * size), size, {(const char*)queries, size * int64_t(sizeof(Input))},
                              count, part);
                for (int m = 0; m < count; m++) {
                    float* row = scores + m * padded + j;
                    for (int64_t c = 0; c < KEYS; c++) row[c] = part[m * KEYS + c] * scale;
                    for (int64_t c = 0; cap > 0 && c < KEYS; c++) row[c] = softcap(row[c], cap);
                    for (int64_t c = std::max<int64_t>(0, seen[m] - j); c < KEYS; c++) row[c] = -INFINITY;
                }
            }
            for (int m = 0; m < count && columns; m++) add(scores + m * padded, columns, seen[m], h, own);
        }
    }

    void add(float* scores, int64_t columns, int64_t seen, int64_t h, float* own) const {
        float top;
        float total = exponentiate(scores, &top, columns);
        if (sinks) total += std::exp(widen(sinks[h]) - top);
        const float factor = 1.0f / total;
        if (largest)
            for (int64_t j = 0; j < seen; j++) own[j] = std::max(own[j], scores[j] * factor);
        else
            for (int64_t j = 0; j < seen; j++) own[j] += scores[j] * factor;
    }
};

// Slot j of row rows[b] (null: b) and head g becomes what its slot index[b, g, j] was, of the n in index (B, G, n).
// `buffer` (rows, G, C) has so many bytes for a slot.
inline void move_slots_of_rows(char* buffer, const int64_t* rows, const int64_t* index, int64_t B, int64_t G,
                               int64_t C, int64_t n, int64_t bytes) {
    static thread_local Scratch<char> scratch;
    char* moved = scratch.get(n * bytes);
    for (int64_t i = 0; i < B * G; i++) {
        char* own = buffer + ((rows ? rows[i / G] : i / G) * G + i % G) * C * bytes;
        for (int64_t j = 0; j < n; j++) std::memcpy(moved + j * bytes, own + index[i * n + j] * bytes, bytes);
        std::memcpy(own, moved, n * bytes);
    }
}

// Slots of the `kept` best of N scores, ascending: see `ScorePolicy.best`
inline void find_best(const float* scores, int64_t N, int64_t n_sink, int64_t recent, int64_t kept, int64_t* stays) {
    static thread_local Scratch<int64_t> scratch;
    int64_t *order = scratch.get(2 * N), *sorted = order + N;
    for (int64_t j = 0; j < N; j++) {
        int32_t bits;
        std::memcpy(&bits, scores + j, sizeof(bits));
        const int32_t size = bits & 0x7fffffff;
        if (size == 0) bits = 0;                                                   // of two zeros none is less
        if (size > 0x7f800000) bits = int32_t(0xff800000);                      // no number: the least
        if (size == 0x7f800000) bits = (bits & int32_t(0x80000000)) | 0x7f7fffff;  // not as much as what has to stay
        if (j < n_sink || j >= N - recent) bits = 0x7f800000;
        order[j] = int64_t(bits < 0 ? bits ^ 0x7fffffff : bits) * (int64_t(1) << 32) | j;  // as integers, all different
    }
    std::copy_n(order, N, sorted);
    std::nth_element(sorted, sorted + N - kept, sorted + N);
    const int64_t least = sorted[N - kept];
    for (int64_t j = 0; j < N; j++)
        if (order[j] >= least) *stays++ = j;
}
