// All layers for a few tokens of every row, as in a step of decoding.

#pragma once

#include "attention.h"
#include "layers.h"

// y (M, N) = x (M, K) w^T + bias by all threads of a team, each of which has brought x into the weight's form in its
// own `room`
inline void team_product(const Weight& w, const bf16* x, bf16* y, int64_t M, Room<char>& room) {
    with_weight<Int4>(w, [&](auto weight) { product(weight, rows_for(weight, x, M, room), w.bias, y, M); });
}

// x += factor * norm(y), for rows that each thread has a copy of
inline void add_rows(bf16* x, const bf16* y, const bf16* norm, float factor, int64_t M, const Shape& shape,
                     Room<bf16>& room) {
    const int64_t E = shape.E;
    if (norm) {
        bf16* normed = room.get(M * E);
        for (int64_t m = 0; m < M; m++) norm_row(y + m * E, norm, normed + m * E, E, shape.eps, shape.norm_offset);
        y = normed;
    }
    for (int64_t i = 0; i < M * E; i++) x[i] = add(x[i], widen(y[i]), factor);
}

// x (B, T, E) through all layers and the final norm, in place. Threads meet only where one needs what another has computed; what is small,
// each computes for itself.
inline void run_few(const Shape& shape, const Layer* layers, int64_t n_layers, const StepPlan* plans, const Rope* ropes,
                    bf16* x, int64_t B, int64_t T) {
    const int64_t E = shape.E, H = shape.H, G = shape.G, D = shape.D, M = B * T, heads = H + 2 * G;
    static thread_local Room<bf16> shared;
    static thread_local Room<float> attention_room;
    bf16 *qkv = shared.get(M * (heads * D + H * D + E + shape.I)), *attended = qkv + M * heads * D,
         *out = attended + M * H * D, *inner = out + M * E;
    int64_t n_plans = 0;
    for (int64_t l = 0; l < n_layers; l++) n_plans = std::max(n_plans, layers[l].plan + 1);
    static thread_local std::vector<Pieces> all_pieces;
    if (int64_t(all_pieces.size()) < n_plans) all_pieces.resize(n_plans);
    for (int64_t p = 0; p < n_plans; p++)
        all_pieces[p].find(B, G, T, plans[p].N, plans[p].bias, plans[p].bias_strides);
    Pieces* pieces = all_pieces.data();
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
                         pieces + layer.plan,
                         plan.rows};
    };
    int64_t most = 0;
    for (int64_t l = 0; l < n_layers; l++) most = std::max(most, attention_of(layers[l]).room());
    float* room_of_attention = attention_room.get(most);
#pragma omp parallel
    {
        static thread_local Room<char> room;
        static thread_local Room<bf16> own_room, normed_room, post;
        bf16 *own = own_room.get(M * E), *normed = normed_room.get(M * E);
        std::memcpy(own, x, M * E * sizeof(bf16));
        for (int64_t l = 0; l < n_layers; l++) {
            const Layer& layer = layers[l];
            const StepPlan& plan = plans[layer.plan];
            const auto norm = [&](const bf16* weight) {
                for (int64_t m = 0; weight && m < M; m++)
                    norm_row(own + m * E, weight, normed + m * E, E, shape.eps, shape.norm_offset);
                return weight ? normed : own;
            };
            team_product(layer.qkv, norm(layer.norm_1), qkv, M, room);

            if (shape.norm_all_heads && layer.norm_q) {
#pragma omp for schedule(static)
                for (int64_t m = 0; m < M; m++) norm_heads(shape, layer, qkv + m * heads * D);
            }
            Attention attention = attention_of(layer);
            attention.settle(room_of_attention);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < M * heads; i++) {
                const int64_t m = i / heads, h = i % heads, b = m / T, t = m % T;
                bf16* head = qkv + i * D;
                if (h < H + G) finish_head(shape, layer, ropes, head, h, b, t);
                if (h < H) {
                    std::memcpy(attention.queries + ((b * H + h) * T + t) * D, head, D * sizeof(bf16));
                } else {
                    const int64_t g = (h - H) % G, slot = plan.slots[plan.slots_by_row ? m : t];
                    bf16* buffer = h < H + G ? layer.keys : layer.values;
                    const int64_t row = plan.rows ? plan.rows[b] : b;
                    std::memcpy(buffer + row * layer.row_stride + g * layer.head_stride + slot * D, head,
                                D * sizeof(bf16));
                }
            }
            attention.parts();
            attention.combine(attended);
            team_product(layer.proj, attended, out, M, room);
            add_rows(own, out, layer.post_attention_norm, shape.attention_factor, M, shape, post);

            const bf16* mlp_input = norm(layer.norm_2);
            with_weight<Int4>(layer.gate, [&](auto gate) {
                const decltype(gate) up(layer.up);
                gated(gate, up, rows_for(gate, mlp_input, M, room), inner, M, int(shape.activation));
            });
            team_product(layer.down, inner, out, M, room);
            add_rows(own, out, layer.post_mlp_norm, shape.mlp_factor, M, shape, post);
        }
#pragma omp for schedule(static)
        for (int64_t m = 0; m < M; m++)
            if (shape.final_norm)
                norm_row(own + m * E, shape.final_norm, x + m * E, E, shape.eps, shape.norm_offset);
            else
                std::memcpy(x + m * E, own + m * E, E * sizeof(bf16));
    }
}
