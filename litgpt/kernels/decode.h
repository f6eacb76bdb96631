// All layers for a few tokens of every row: a decode step, or the verification of draft tokens.

#pragma once

#include "attention.h"
#include "layers.h"

// y (M, N) = x (M, K) w^T + bias, and what small matrices add, by all threads of a team. Each thread prepares x for the weight in
// its own `scratch`.
inline void team_product(const Weight& w, const Real* x, Real* y, int64_t M, Scratch<char>& scratch,
                         Scratch<float>& low_scratch) {
    const TilesOf tiles(w);
    const LowRank low(w, x, M, low_scratch);
    product(*tiles, rows_for(*tiles, x, M, scratch), M, [&](int64_t m, int64_t first, int64_t size, float* values) {
        low.add(m, first, size, values);
        store_row(values, w.bias ? w.bias + first : nullptr, y + m * w.N + first, size);
    });
}

// x += factor * norm(y), for rows that each thread has a copy of
inline void add_rows(Real* x, const Real* y, const Real* norm, float factor, int64_t M, const Shape& shape,
                     Scratch<Real>& scratch) {
    const int64_t E = shape.E;
    if (norm) {
        Real* normed = scratch.get(M * E);
        for (int64_t m = 0; m < M; m++) norm_row(y + m * E, norm, normed + m * E, E, shape.eps, shape.norm_offset);
        y = normed;
    }
    for (int64_t i = 0; i < M * E; i++) x[i] = add(x[i], widen(y[i]), factor);
}

// x (B, T, E) through all layers and the final norm, in place, or what `ends` says. Threads synchronise only where one needs the
// results of another; norms and other small results are computed by each thread for itself.
inline void run_decode(const Shape& shape, const Layer* layers, int64_t n_layers, const StepPlan* plans,
                       const Rope* ropes, const Ends& ends, Real* x, int64_t B, int64_t T) {
    const int64_t E = shape.E, H = shape.H, G = shape.G, D = shape.D, M = B * T, heads = H + 2 * G;
    static thread_local Scratch<Real> shared;
    static thread_local Scratch<float> attention_scratch;
    Real *qkv = shared.get(M * (heads * D + H * D + E + shape.I)), *attended = qkv + M * heads * D,
         *out = attended + M * H * D, *inner = out + M * E;
    int64_t n_plans = 0;
    for (int64_t l = 0; l < n_layers; l++) n_plans = std::max(n_plans, layers[l].plan + 1);
    static thread_local std::vector<KvSplits> all_splits;  // of plans, then of layers whose heads have slots of their own
    if (int64_t(all_splits.size()) < n_plans + n_layers) all_splits.resize(n_plans + n_layers);
    for (int64_t p = 0; p < n_plans; p++)
        all_splits[p].find(B, G, T, plans[p].N, plans[p].bias, plans[p].bias_strides);
    for (int64_t l = 0; l < n_layers; l++)
        if (layers[l].extra_slots) all_splits[n_plans + l].find(G, plans[layers[l].plan].N, layers[l].extra_slots);
    KvSplits* splits = all_splits.data();
    static thread_local std::vector<Vectors> shifted;  // encoded keys and values from the first slot that is read
    shifted.resize(2 * n_layers);
    Vectors* encoded = shifted.data();
    for (int64_t l = 0; l < n_layers; l++)
        for (int i = 0; i < 2; i++)
            if (layers[l].encoded[0].kind) encoded[2 * l + i] = layers[l].encoded[i].at(0, 0, plans[layers[l].plan].first);
    const auto attention_of = [&](const Layer& layer) {
        const StepPlan& plan = plans[layer.plan];
        return Attention{B,
                         H,
                         G,
                         T,
                         plan.N,
                         D,
                         shape.scale,
                         shape.cap,
                         layer.keys + plan.first * D,
                         layer.values + plan.first * D,
                         {layer.row_stride, layer.head_stride, D},
                         {layer.row_stride, layer.head_stride, D},
                         plan.bias,
                         {plan.bias_strides[0], plan.bias_strides[1]},
                         layer.sinks,
                         splits + (layer.extra_slots ? n_plans + (&layer - layers) : layer.plan),
                         plan.rows,
                         layer.encoded[0].kind ? encoded + 2 * (&layer - layers) : nullptr,
                         plan.sealed,
                         plan.newest,
                         layer.first_slots,
                         layer.extra_slots};
    };
    int64_t most = 0;
    for (int64_t l = 0; l < n_layers; l++) most = std::max(most, attention_of(layers[l]).scratch_size());
    float* attention_memory = attention_scratch.get(most);
    const double begun = clock_seconds(CLOCK_MONOTONIC);
    const int threads = Team::mine().threads_of_report();
    double used = 0;
#pragma omp parallel num_threads(threads) reduction(+ : used)
    {
        const double own_begun = processor_seconds();
        static thread_local Scratch<char> scratch;
        static thread_local Scratch<Real> own_scratch, normed_scratch, post;
        static thread_local Scratch<float> low_scratch, low_scratch_of_up;
        Real *own = own_scratch.get(M * E), *normed = normed_scratch.get(M * E);
        for (int64_t m = 0; m < M; m++)
            std::memcpy(own + m * E, ends.ids ? ends.table + ends.ids[m] * E : x + m * E, E * sizeof(Real));
        for (int64_t l = 0; l < n_layers; l++) {
            const Layer& layer = layers[l];
            const StepPlan& plan = plans[layer.plan];
            const auto norm = [&](const Real* weight) {
                for (int64_t m = 0; weight && m < M; m++)
                    norm_row(own + m * E, weight, normed + m * E, E, shape.eps, shape.norm_offset);
                return weight ? normed : own;
            };
            team_product(layer.qkv, norm(layer.norm_1), qkv, M, scratch, low_scratch);

            if (shape.norm_all_heads && layer.norm_q) {
#pragma omp for schedule(static)
                for (int64_t m = 0; m < M; m++) norm_heads(shape, layer, qkv + m * heads * D);
            }
            Attention attention = attention_of(layer);
            attention.use_scratch(attention_memory);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < M * heads; i++) {
                const int64_t m = i / heads, h = i % heads, b = m / T, t = m % T;
                Real* head = qkv + i * D;
                if (h < H + G) finish_head(shape, layer, ropes, head, h, b, t);
                const Vectors* own = layer.encoded;
                const int64_t row = plan.rows ? plan.rows[b] : b;
                if (h < H) {
                    const int64_t n = plan.n_queries, j = t - (T - n);
                    if (j >= 0)
                        keep_query(layer, head, row, h, plan.query_slots[plan.query_slots_by_row ? b * n + j : j], D);
                    attention.set_query((b * H + h) * T + t, head);
                } else {
                    const int64_t g = (h - H) % G, slot = slot_in_head(layer, g, plan.slots[plan.slots_by_row ? m : t]);
                    Real* buffer = h < H + G ? layer.keys : layer.values;
                    if (own[0].by_vector())
                        encode(own[h >= H + G].at(row, g, slot), head, D);
                    else
                        std::memcpy(buffer + row * layer.row_stride + g * layer.head_stride + slot * D, head,
                                D * sizeof(Real));
                }
            }
            attention.attend_splits();
            attention.combine(attended);
            team_product(layer.proj, attended, out, M, scratch, low_scratch);
            add_rows(own, out, layer.post_attention_norm, shape.attention_factor, M, shape, post);

            const Real* mlp_input = norm(layer.norm_2);
            const TilesOf gate(layer.gate), up(layer.up);
            const LowRank low_gate(layer.gate, mlp_input, M, low_scratch), low_up(layer.up, mlp_input, M, low_scratch_of_up);
            gated(*gate, *up, rows_for(*gate, mlp_input, M, scratch), inner, M, int(shape.activation), &low_gate, &low_up);
            team_product(layer.down, inner, out, M, scratch, low_scratch);
            add_rows(own, out, layer.post_mlp_norm, shape.mlp_factor, M, shape, post);
        }
        if (ends.logits) {
            for (int64_t m = 0; m < M; m++) norm_row(own + m * E, shape.final_norm, normed + m * E, E, shape.eps, shape.norm_offset);
            team_product(ends.head, normed, ends.logits, M, scratch, low_scratch);
        } else {
#pragma omp for schedule(static)
            for (int64_t m = 0; m < M; m++)
                if (shape.final_norm)
                    norm_row(own + m * E, shape.final_norm, x + m * E, E, shape.eps, shape.norm_offset);
                else
                    std::memcpy(x + m * E, own + m * E, E * sizeof(Real));
        }
        used += processor_seconds() - own_begun;
    }
    Team::mine().report(clock_seconds(CLOCK_MONOTONIC) - begun, used);
}
