// All layers for many tokens, as in the prefill. Tokens are processed BLOCK at a time from one product to the next, so
// that intermediate results stay in the processor's caches.

#pragma once

#include "causal_attention.h"
#include "layers.h"
#include "ring.h"
#include "tails.h"

constexpr int64_t BLOCK = 256;

struct Prefill {
    const Shape& shape;
    const Rope* ropes;
    bf16* x;  // (M, E)
    int64_t T, M, heads;
    bf16 *qkv, *attended;        // M rows
    bf16* rounded;               // M rows of keys and values as decoded, of layers with encoded caches
    bf16 *normed, *out, *inner;  // BLOCK rows
    char* prepared;              // BLOCK rows, prepared for a weight
    char* ring_memory;           // of a layer's rings

    // `scratch` has M (2 H + 2 G) D numbers: queries, keys, values and the output of attention. Where caches are encoded, M 2 G D
    // more.
    Prefill(const Shape& shape, const Layer* layers, int64_t n_layers, const StepPlan* plans, const Rope* ropes,
            bf16* x, bf16* scratch, int64_t B, int64_t T)
        : shape(shape), ropes(ropes), x(x), T(T), M(B * T), heads(shape.H + 2 * shape.G), qkv(scratch) {
        static thread_local Scratch<bf16> block_scratch;
        static thread_local Scratch<char> prepared_scratch;
        attended = qkv + M * heads * shape.D;
        rounded = attended + M * shape.H * shape.D;
        normed = block_scratch.get(BLOCK * (2 * shape.E + shape.I));
        out = normed + BLOCK * shape.E;
        inner = out + BLOCK * shape.E;
        int64_t most = 0;
        for (int64_t l = 0; l < n_layers; l++)
            for (const Weight* weight : {&layers[l].qkv, &layers[l].proj, &layers[l].gate, &layers[l].down})
                most = std::max(most, (weight->K + 31) / 32 * 32 * int64_t(sizeof(Input)) + 64);
        prepared = prepared_scratch.get(BLOCK * most);
        static thread_local Scratch<char> ring_scratch;
        most = 0;
        for (int64_t l = 0; l < n_layers; l++) {
            int64_t sum = 0;
            for_rings(plans[layers[l].plan], [&](const Segment& s) { sum += Ring::bytes(layers[l], s, shape.G, shape.D); });
            most = std::max(most, sum);
        }
        ring_memory = most ? ring_scratch.get(most) : nullptr;
    }

    // One layer, called by all threads of a team. With `output_tokens` (ascending), the MLP is computed for those
    // tokens only, and they become the first rows of x.
    void run(const Layer& layer, const StepPlan& plan, const int64_t* output_tokens, int64_t n_output_tokens) {
        const int64_t E = shape.E, H = shape.H, G = shape.G, D = shape.D;
        static thread_local Scratch<uint32_t> scratch;
        for (int64_t m0 = 0; m0 < M; m0 += BLOCK) {
            const int64_t n = std::min(BLOCK, M - m0);
            const bf16* input = norm(layer.norm_1, x + m0 * E, n);
            const TilesOf w(layer.qkv, &scratch);
            product(*w, rows_of(*w, input, n), layer.qkv.bias, qkv + m0 * heads * D, n);
        }
#pragma omp for schedule(static)
        for (int64_t m = 0; m < M; m++) {
            bf16* token = qkv + m * heads * D;
            norm_heads(shape, layer, token);
            for (int64_t h = 0; h < H + G; h++) finish_head(shape, layer, ropes, token + h * D, h, m / T, m % T);
        }
        static thread_local std::vector<Ring> rings;
        rings.clear();
        char* memory = ring_memory;
        for_rings(plan, [&](const Segment& s) {
            rings.emplace_back(layer, s, G, D, memory);
            rings.back().copy_old();
            rings.back().add_new(qkv + (s.first * heads + H) * D, heads * D);
            memory += Ring::bytes(layer, s, G, D);
        });
        if (!rings.empty()) {
#pragma omp barrier
        }
        const bool in_two_bits = layer.encoded[0].kind == TWO_BITS;
        for (int64_t s = 0; s < plan.n_segments; s++) in_two_bits ? seal(layer, plan.segments[s]) : store(layer, plan.segments[s]);
#pragma omp barrier
        const Vectors* encoded = layer.encoded[0].by_vector() ? layer.encoded : nullptr;
        if (encoded) {
            for (int64_t s = 0; s < plan.n_segments; s++) round(encoded, plan.segments[s]);
#pragma omp barrier
        }
        static thread_local std::vector<CausalAttention> attentions;
        static thread_local std::vector<int64_t> ends;  // of their tasks
        attentions.clear(), ends.clear();
        const Ring* ring = rings.data();
        for (int64_t s = 0; s < plan.n_segments; s++) {
            attentions.push_back(attention(layer, plan.segments[s], plan.segments[s].old ? ring++ : nullptr));
            ends.push_back((s ? ends.back() : 0) + attentions.back().tasks());
        }
#pragma omp for schedule(dynamic) nowait
        for (int64_t i = 0; i < plan.n_tails * G; i++) run_tails(layer, plan.tails[i / G], i % G);
        const int64_t n_tasks = ends.empty() ? 0 : ends.back();
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < n_tasks; i++) {
            const int64_t s = std::upper_bound(ends.begin(), ends.end(), i) - ends.begin();
            attentions[s].run(i - (s ? ends[s - 1] : 0));
        }
        for (int64_t s = 0; in_two_bits && s < plan.n_segments; s++) store(layer, plan.segments[s]);
        if (encoded && encoded[1].rotated) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < M * H; i++) rotate_vector(attended + i * D, D);
        }
#pragma omp single
        for (int64_t i = 0; output_tokens && i < n_output_tokens; i++) {
            std::memmove(x + i * E, x + output_tokens[i] * E, E * sizeof(bf16));
            std::memmove(attended + i * H * D, attended + output_tokens[i] * H * D, H * D * sizeof(bf16));
        }
        const int64_t left = output_tokens ? n_output_tokens : M;
        for (int64_t m0 = 0; m0 < left; m0 += BLOCK) {
            const int64_t n = std::min(BLOCK, left - m0);
            bf16* own = x + m0 * E;
            add_product(layer.proj, attended + m0 * H * D, own, n, layer.post_attention_norm, shape.attention_factor,
                        scratch);
            const bf16* input = norm(layer.norm_2, own, n);
            gated_product(layer, input, n, scratch);
            add_product(layer.down, inner, own, n, layer.post_mlp_norm, shape.mlp_factor, scratch);
        }
    }

private:
    // Calls f for the segments of a plan whose keys are in a ring.
    template <class F>
    static void for_rings(const StepPlan& plan, F f) {
        for (int64_t s = 0; s < plan.n_segments; s++)
            if (plan.segments[s].old) f(plan.segments[s]);
    }

    // Tokens of a row and a head of keys enter its cache tail by tail.
    void run_tails(const Layer& layer, const TailSegment& s, int64_t g) const {
        const int64_t H = shape.H, G = shape.G, D = shape.D, width = heads * D, strides[] = {0, D, width};
        const bf16* tokens = qkv + s.first * width;
        const ScoredCache cache{H, G, D, layer.head_stride / D, s.n_sink, s.recent, s.kept, s.pool, s.max_queries, shape.scale,
                                shape.cap, layer.sinks, layer.queries, layer.positions, layer.sums,
                                {{(char*)layer.keys, D * int64_t(sizeof(bf16))}, {(char*)layer.values, D * int64_t(sizeof(bf16))}}, {}};
        const Tails own{cache, 1, s.T, s.n_steps, tokens, tokens + H * D, tokens + (H + G) * D, strides, strides, strides, &s.row,
                        s.held, s.shift, s.steps, attended + s.first * H * D, nullptr};
        own.run(0, g);
    }

    const bf16* norm(const bf16* weight, const bf16* rows, int64_t n) {
        if (!weight) return rows;
#pragma omp for schedule(static)
        for (int64_t m = 0; m < n; m++)
            norm_row(rows + m * shape.E, weight, normed + m * shape.E, shape.E, shape.eps, shape.norm_offset);
        return normed;
    }

    Rows rows_of(const Tiles& w, const bf16* rows, int64_t n) {
        const int64_t stride = w.stride();
        if (w.row_bytes == 0) return {(const char*)rows, stride};
#pragma omp for schedule(static)
        for (int64_t m = 0; m < n; m++) w.prepare(rows + m * w.K, prepared + m * stride);
        return {prepared, stride};
    }

    // own += factor * post_norm(input w^T + bias)
    void add_product(const Weight& weight, const bf16* input, bf16* own, int64_t n, const bf16* post_norm, float factor,
                     Scratch<uint32_t>& scratch) {
        const int64_t E = shape.E;
        const TilesOf w(weight, &scratch);
        product(*w, rows_of(*w, input, n), n, [&](int64_t m, int64_t first, int64_t size, const float* values) {
            bf16 *target = out + m * E + first, *sum = own + m * E + first;
            store_row(values, weight.bias ? weight.bias + first : nullptr, target, size);
            if (!post_norm)
                for (int64_t j = 0; j < size; j++) sum[j] = add(sum[j], widen(target[j]), factor);
        });
        if (!post_norm) return;
#pragma omp for schedule(static)
        for (int64_t m = 0; m < n; m++) {
            bf16* row = out + m * E;
            norm_row(row, post_norm, row, E, shape.eps, shape.norm_offset);
            for (int64_t i = 0; i < E; i++) own[m * E + i] = add(own[m * E + i], widen(row[i]), factor);
        }
    }

    // inner = activation(input gate^T) * (input up^T)
    void gated_product(const Layer& layer, const bf16* input, int64_t n, Scratch<uint32_t>& scratch) {
        static thread_local Scratch<uint32_t> up_scratch;
        const TilesOf gate(layer.gate, &scratch), up(layer.up, &up_scratch);
        gated(*gate, *up, rows_of(*gate, input, n), inner, n, int(shape.activation));
    }

    // The key, or value, of a row's token at position p, which is not encoded or comes to be
    const bf16* newest(const Layer& layer, const Segment& s, int side, int64_t g, int64_t p) const {
        if (p < s.begin)
            return (side ? layer.values : layer.keys) + s.row * layer.row_stride + g * layer.head_stride + p % s.newest * shape.D;
        return qkv + ((s.first + p - (s.N - s.T)) * heads + shape.H + side * shape.G + g) * shape.D;
    }

    // Encodes blocks of tokens in 2 bits.
    void seal(const Layer& layer, const Segment& s) {
        for (int side = 0; side < 2; side++) {
            const Vectors& target = layer.encoded[side];
            const int64_t G = shape.G, blocks = (s.sealed - s.seal_from) / target.unit;
#pragma omp for schedule(static) nowait
            for (int64_t i = 0; i < blocks * G; i++) {
                const int64_t g = i % G, start = s.seal_from + i / G * target.unit;
                const auto token = [&](int64_t j) { return newest(layer, s, side, g, start + j); };
                const Vectors block = target.at(s.row, g, start);
                side ? encode_values(block, shape.D, token) : encode_keys(block, shape.D, token);
            }
        }
    }

    // Writes the tokens of a segment that stay to the cache, and the last queries that its policy asks for.
    void store(const Layer& layer, const Segment& segment) {
        const int64_t H = shape.H, G = shape.G, D = shape.D;
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < segment.n_queries; i++) {
            const bf16* token = qkv + (segment.first + segment.T - segment.n_queries + i) * heads * D;
            for (int64_t h = 0; h < H; h++)
                keep_query(layer, token + h * D, segment.row, h, segment.query_slots[i], D);
        }
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < segment.n_kept; i++) {
            const bf16* token = qkv + (segment.first + (segment.kept ? segment.kept[i] : i)) * heads * D;
            for (int64_t g = 0; g < 2 * G && layer.encoded[0].by_vector(); g++)
                encode(layer.encoded[g / G].at(segment.row, g % G, slot_in_head(layer, g % G, segment.slots[i])),
                       token + (H + g) * D, D);
            for (int64_t g = 0; g < G && !layer.encoded[0].by_vector(); g++) {
                const int64_t slot = slot_in_head(layer, g, segment.slots[i]);
                const int64_t at = segment.row * layer.row_stride + g * layer.head_stride + slot * D;
                std::memcpy(layer.keys + at, token + (H + g) * D, D * sizeof(bf16));
                std::memcpy(layer.values + at, token + (H + G + g) * D, D * sizeof(bf16));
            }
        }
    }

    // Queries of a segment as its keys are encoded, where their outputs will be; and its keys and values as decoded, where its
    // tokens attend to each other.
    void round(const Vectors* encoded, const Segment& segment) {
        const int64_t H = shape.H, G = shape.G, D = shape.D;
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < segment.T; i++) {
            const int64_t at = segment.first + i;
            const bf16* token = qkv + at * heads * D;
            bf16 *queries = attended + at * H * D, *own = rounded + at * 2 * G * D;
            if (encoded[0].rotated) std::memcpy(queries, token, H * D * sizeof(bf16));
            for (int64_t h = 0; encoded[0].rotated && h < H; h++) rotate_vector(queries + h * D, D);
            if (segment.N) continue;
            std::memcpy(own, token + H * D, 2 * G * D * sizeof(bf16));
            for (int64_t g = 0; g < 2 * G; g++)
                if (!segment.kept && i < segment.n_kept)  // stored
                    decode(encoded[g / G].at(segment.row, g % G, segment.slots[i]), D, own + g * D);
                else
                    round_to_codes(encoded[g / G], own + g * D, D);
        }
    }

    CausalAttention attention(const Layer& layer, const Segment& segment, const Ring* ring) {
        const int64_t H = shape.H, G = shape.G, D = shape.D, width = heads * D;
        const bf16* tokens = qkv + segment.first * width;
        bf16* outputs = attended + segment.first * H * D;
        const bool coded = layer.encoded[0].by_vector(), rotated = coded && layer.encoded[0].rotated;
        CausalAttention a{H, G, segment.T, segment.N, D, segment.window, shape.scale, shape.cap, rotated ? outputs : tokens,
                          nullptr, nullptr, layer.sinks, {D, rotated ? H * D : width}, {}, {}, outputs};
        if (ring) {
            a.pinned = segment.pinned;
            for (int i = 0; i < 2 && layer.encoded[0].kind; i++) a.encoded[i] = ring->copy[i];
            a.k = (const bf16*)ring->copy[0].codes, a.v = (const bf16*)ring->copy[1].codes;
            for (auto strides : {a.k_strides, a.v_strides}) strides[0] = segment.N * D, strides[1] = D;
        } else if (segment.newest) {
            const int64_t at = segment.row * layer.row_stride;
            for (int i = 0; i < 2; i++) {
                a.encoded[i] = layer.encoded[i].at(segment.row, 0, 0);
                a.new_keys[i] = tokens + (H + i * G) * D;
            }
            a.k = layer.keys + at, a.v = layer.values + at;
            for (auto strides : {a.k_strides, a.v_strides}) strides[0] = layer.head_stride, strides[1] = D;
            a.sealed = segment.sealed, a.begin = segment.begin, a.newest = segment.newest;
        } else if (segment.N && layer.encoded[0].kind) {
            for (int i = 0; i < 2; i++) a.encoded[i] = layer.encoded[i].at(segment.row, 0, segment.key);
        } else if (segment.N) {
            const int64_t at = segment.row * layer.row_stride + segment.key * D;
            a.k = layer.keys + at, a.v = layer.values + at;
            for (auto strides : {a.k_strides, a.v_strides}) strides[0] = layer.head_stride, strides[1] = D;
        } else {
            a.N = segment.T, a.k = coded ? rounded + segment.first * 2 * G * D : tokens + H * D, a.v = a.k + G * D;
            for (auto strides : {a.k_strides, a.v_strides}) strides[0] = D, strides[1] = coded ? 2 * G * D : width;
        }
        if (segment.N) a.first_slots = layer.first_slots, a.extra_slots = layer.extra_slots;
        return a;
    }
};

// x (B, T, E) through all layers and the final norm, in place; plans have segments. With `output_tokens` (ascending),
// their outputs become the first rows of x, and no others are computed.
inline void run_prefill(const Shape& shape, const Layer* layers, int64_t n_layers, const StepPlan* plans,
                     const Rope* ropes, bf16* x, bf16* scratch, int64_t B, int64_t T, const int64_t* output_tokens,
                     int64_t n_output_tokens) {
    Prefill prefill(shape, layers, n_layers, plans, ropes, x, scratch, B, T);
    const int64_t rows = output_tokens ? n_output_tokens : B * T;
    const double begun = clock_seconds(CLOCK_MONOTONIC);
    const int threads = Team::mine().threads_of_report();
    double used = 0;
#pragma omp parallel num_threads(threads) reduction(+ : used)
    {
        const double own_begun = processor_seconds();
        for (int64_t l = 0; l < n_layers; l++)
            prefill.run(layers[l], plans[layers[l].plan], l + 1 < n_layers ? nullptr : output_tokens, n_output_tokens);
#pragma omp for schedule(static)
        for (int64_t m = 0; m < rows; m++) {
            bf16* row = x + m * shape.E;
            if (shape.final_norm) norm_row(row, shape.final_norm, row, shape.E, shape.eps, shape.norm_offset);
        }
        used += processor_seconds() - own_begun;
    }
    Team::mine().report(clock_seconds(CLOCK_MONOTONIC) - begun, used);
}
