// All layers of a step of decoding.

#pragma once

#include "attention.h"
#include "weights.h"

struct Shape {
    int64_t E, H, G, D, I, rope_n, interleave, activation, norm_all_heads;
    float eps, norm_offset, scale, cap, attention_factor, mlp_factor;
};

struct Layer {
    const bf16 *norm_1, *norm_q, *norm_k, *post_attention_norm, *norm_2, *post_mlp_norm, *sinks;
    bf16 *keys, *values;
    int64_t row_stride, head_stride;  // of keys and values; slots lie one after the other
    int64_t rope, plan;               // which of the step's; rope -1: none
    Weight qkv, proj, gate, up, down;
};

struct StepPlan {
    const int64_t* slots;  // (T,) or, if `slots_by_row`, (B, T)
    int64_t slots_by_row, first, N;
    const bf16* bias;
    int64_t bias_strides[2];
};

struct Rope {
    const bf16 *cos, *sin;  // (T, n) with a stride between rows of the batch, sines with their signs
    int64_t row_stride;
};

inline void norm_row(const bf16* x, const bf16* weight, bf16* y, int64_t size, float eps, float offset) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; i++) sum += widen(x[i]) * widen(x[i]);
    const float factor = 1.0f / std::sqrt(sum / float(size) + eps);
    for (int64_t i = 0; i < size; i++) y[i] = narrow(widen(x[i]) * factor * (widen(weight[i]) + offset));
}

// RoPE for one head in place: halves are pairs, or with `interleave` neighbours, which end up in halves
inline void turn(bf16* head, const bf16* cos, const bf16* sin, int64_t n, bool interleave) {
    float x[MAX_D], y[MAX_D];
    const int64_t half = n / 2;
    for (int64_t i = 0; i < n; i++) x[interleave ? i % 2 * half + i / 2 : i] = widen(head[i]);
    for (int64_t i = 0; i < half; i++) {
        y[i] = widen(narrow(x[i] * widen(cos[i]))) + x[i + half] * widen(sin[i]);
        y[i + half] = widen(narrow(x[i + half] * widen(cos[i + half]))) + x[i] * widen(sin[i + half]);
    }
    for (int64_t i = 0; i < n; i++) head[i] = narrow(y[i]);
}

// y (M, N) = x (M, K) w^T + bias by all threads of a team, each of which has brought x into the weight's form in its own `room`
inline void team_product(const Weight& w, const bf16* x, bf16* y, int64_t M, std::vector<float>& room) {
    with_weight(w, [&](auto weight) { product(weight, rows_for(weight, x, M, room), w.bias, y, M); });
}

// x += factor * norm(y), for rows that each thread has a copy of
inline void add_rows(std::vector<bf16>& x, const bf16* y, const bf16* norm, float factor, int64_t M, const Shape& shape,
              std::vector<bf16>& room) {
    const int64_t E = shape.E;
    if (norm) {
        room.resize(M * E);
        for (int64_t m = 0; m < M; m++) norm_row(y + m * E, norm, &room[m * E], E, shape.eps, shape.norm_offset);
        y = room.data();
    }
    for (int64_t i = 0; i < M * E; i++)
        x[i] = narrow(widen(x[i]) + (factor == 1.0f ? widen(y[i]) : widen(narrow(widen(y[i]) * factor))));
}

// x (B, T, E) through all layers, in place. Threads meet only where one needs what another has computed; what is small, each
// computes for itself.
inline void run_layers(const Shape& shape, const Layer* layers, int64_t n_layers, const StepPlan* plans, const Rope* ropes,
                       bf16* x, int64_t B, int64_t T) {
    const int64_t E = shape.E, H = shape.H, G = shape.G, D = shape.D, M = B * T, heads = H + 2 * G;
    static thread_local std::vector<bf16> shared;
    static thread_local std::vector<float> attention_room;
    shared.resize(M * (heads * D + H * D + E + shape.I));
    bf16 *qkv = shared.data(), *attended = qkv + M * heads * D, *out = attended + M * H * D, *inner = out + M * E;
    const auto attention_of = [&](const Layer& layer) {
        const StepPlan& plan = plans[layer.plan];
        return Attention{B, H, G, T, plan.N, D, shape.scale, shape.cap,
                         layer.keys + plan.first * D, layer.values + plan.first * D,
                         {layer.row_stride, layer.head_stride, D}, {layer.row_stride, layer.head_stride, D},
                         plan.bias, {plan.bias_strides[0], plan.bias_strides[1]}, layer.sinks,
                         nullptr, nullptr, nullptr, nullptr};
    };
    int64_t most = 0;
    for (int64_t l = 0; l < n_layers; l++) most = std::max(most, attention_of(layers[l]).room());
    attention_room.resize(most);
    float* room_of_attention = attention_room.data();
#pragma omp parallel
    {
        static thread_local std::vector<float> room;
        static thread_local std::vector<bf16> own, normed, post;
        own.assign(x, x + M * E);
        normed.resize(M * E);
        for (int64_t l = 0; l < n_layers; l++) {
            const Layer& layer = layers[l];
            const StepPlan& plan = plans[layer.plan];
            const auto norm = [&](const bf16* weight) {
                for (int64_t m = 0; weight && m < M; m++)
                    norm_row(&own[m * E], weight, &normed[m * E], E, shape.eps, shape.norm_offset);
                return weight ? normed.data() : own.data();
            };
            team_product(layer.qkv, norm(layer.norm_1), qkv, M, room);

            if (shape.norm_all_heads && layer.norm_q) {
#pragma omp for schedule(static)
                for (int64_t m = 0; m < M; m++) {
                    bf16* row = qkv + m * heads * D;
                    norm_row(row, layer.norm_q, row, H * D, shape.eps, shape.norm_offset);
                    norm_row(row + H * D, layer.norm_k, row + H * D, G * D, shape.eps, shape.norm_offset);
                }
            }
            Attention attention = attention_of(layer);
            attention.settle(room_of_attention);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < M * heads; i++) {
                const int64_t m = i / heads, h = i % heads, b = m / T, t = m % T;
                bf16* head = qkv + i * D;
                if (h < H + G) {
                    const bf16* weight = h < H ? layer.norm_q : layer.norm_k;
                    if (weight && !shape.norm_all_heads) norm_row(head, weight, head, D, shape.eps, shape.norm_offset);
                    if (layer.rope >= 0) {
                        const Rope& rope = ropes[layer.rope];
                        const int64_t at = b * rope.row_stride + t * shape.rope_n;
                        turn(head, rope.cos + at, rope.sin + at, shape.rope_n, shape.interleave);
                    }
                }
                if (h < H) {
                    std::memcpy(attention.queries + ((b * H + h) * T + t) * D, head, D * sizeof(bf16));
                } else {
                    const int64_t g = (h - H) % G, slot = plan.slots[plan.slots_by_row ? m : t];
                    bf16* buffer = h < H + G ? layer.keys : layer.values;
                    std::memcpy(buffer + b * layer.row_stride + g * layer.head_stride + slot * D, head, D * sizeof(bf16));
                }
            }
            attention.parts();
            attention.combine(attended);
            team_product(layer.proj, attended, out, M, room);
            add_rows(own, out, layer.post_attention_norm, shape.attention_factor, M, shape, post);

            const bf16* mlp_input = norm(layer.norm_2);
            with_weight(layer.gate, [&](auto gate) {
                const decltype(gate) up(layer.up);
                gated(gate, up, rows_for(gate, mlp_input, M, room), inner, M, int(shape.activation));
            });
            team_product(layer.down, inner, out, M, room);
            add_rows(own, out, layer.post_mlp_norm, shape.mlp_factor, M, shape, post);
        }
#pragma omp single
        std::memcpy(x, own.data(), M * E * sizeof(bf16));
    }
}
