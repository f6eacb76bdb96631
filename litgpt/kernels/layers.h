// Arguments of all layers, and their functions of a single token.

#pragma once

#include "encoded.h"
#include "weights.h"

struct Shape {
    int64_t E, H, G, D, I, rope_n, interleave, activation, norm_all_heads;
    float eps, norm_offset, scale, cap, attention_factor, mlp_factor;
    const Real* final_norm;  // after the last layer; null: none
};

struct Layer {
    const Real *norm_1, *norm_q, *norm_k, *post_attention_norm, *norm_2, *post_mlp_norm, *sinks;
    Real *keys, *values;
    int64_t row_stride, head_stride;  // of keys and values; slots lie one after the other
    Real* queries;                    // of the last tokens (row, head, slot, D), kept for the cache's policy; null: none
    int64_t query_row_stride, query_head_stride;
    int32_t* positions;               // noted by the cache's policy (row, G, slot); null: none
    float* sums;                      // and its sums (row, G, slot); null: none
    // Of a cache whose heads have slots of their own, one after the other (head_stride is 0): the first slot of each, and how many
    // slots more than plans say it uses. Null: all have as many.
    const int64_t *first_slots, *extra_slots;
    int64_t rope, plan;               // indices of RoPE tables and plans of the call; rope -1: none
    Weight qkv, proj, gate, up, down;
    Vectors encoded[2];  // keys and values, in caches of fewer bits; else their kind is PLAIN
};

// Many consecutive tokens of a row of the caches: tokens [first, first + T) of the call
struct Segment {
    int64_t first, T, row;
    int64_t key, N;               // the tokens attend to N slots from `key` on; N = 0: to each other
    int64_t window;               // number of newest keys that a token sees
    const int64_t *kept, *slots;  // tokens that are stored (null: the first ones), and their slots
    int64_t n_kept;
    const int64_t* query_slots;  // where the queries of the last tokens are kept
    int64_t n_queries;
    // Not null: the N keys are earlier tokens in these n_old slots, of which all tokens see the first `pinned`, and the new ones
    const int64_t* old;
    int64_t n_old, pinned;
    // Of caches in 2 bits: the first `sealed` of the N keys are encoded, tokens [seal_from, sealed) by this call. Of the others, those
    // before position `begin`, at which the row's tokens of the call begin, are in `newest` slots, that at p in slot p % newest.
    int64_t sealed, seal_from, begin, newest;
};

// The same for a row whose policy scores tokens several times in the call: see `Tails`
struct TailSegment {
    int64_t first, T, row;
    const int64_t *held, *shift;
    const struct TailStep* steps;
    int64_t n_steps, n_sink, recent, kept, pool, max_queries;
};

// The plan of a call for one kind of cache: T tokens of every row, or segments
struct StepPlan {
    const int64_t* rows;   // rows of the caches that take part in the call (B,); null: the first B
    const int64_t* slots;  // (T,) or, if `slots_by_row`, (B, T)
    int64_t slots_by_row, first, N;
    const int64_t* query_slots;  // (n,) or, if `query_slots_by_row`, (B, n): where the queries of the last n tokens are kept
    int64_t query_slots_by_row, n_queries;
    const Real* bias;
    int64_t bias_strides[2];
    const Segment* segments;
    int64_t n_segments;
    const int64_t* sealed;  // of caches in 2 bits, in calls without segments: see `Attention`
    int64_t newest;
    const TailSegment* tails;
    int64_t n_tails;
};

struct Rope {
    const Real *cos, *sin;  // (T, n) with a stride between rows of the batch, sines with their signs
    int64_t row_stride;
};

// What else a decode step computes: the embeddings of tokens `ids` (M,) from a table (V, E) (null: x has them), and logits (M, head.N)
// (null: none)
struct Ends {
    const int64_t* ids;
    const Real* table;
    int64_t V;
    Weight head;
    Real* logits;

    bool knows(int64_t M) const {
        return !ids || std::all_of(ids, ids + M, [&](int64_t id) { return id >= 0 && id < V; });
    }
};

// Where a head of keys has what is slot `slot` of a plan
inline int64_t slot_in_head(const Layer& layer, int64_t g, int64_t slot) {
    return layer.first_slots ? layer.first_slots[g] + layer.extra_slots[g] + slot : slot;
}

// Keeps the query of head h in a slot of a row of the cache.
inline void keep_query(const Layer& layer, const Real* query, int64_t row, int64_t h, int64_t slot, int64_t D) {
    std::memcpy(layer.queries + row * layer.query_row_stride + h * layer.query_head_stride + slot * D, query,
                D * sizeof(Real));
}

NOT_INLINED inline void norm_row(const Real* x, const Real* weight, Real* y, int64_t size, float eps, float offset) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; i++) sum += widen(x[i]) * widen(x[i]);
    const float factor = 1.0f / std::sqrt(sum / float(size) + eps);
    for (int64_t i = 0; i < size; i++) y[i] = as_real(widen(x[i]) * factor * (widen(weight[i]) + offset));
}

// RoPE for one head in place. Pairs are (i, i + n / 2), or neighbours with `interleave`; the output has halves.
NOT_INLINED inline void rotate(Real* head, const Real* cos, const Real* sin, int64_t n, bool interleave) {
    float x[MAX_D], y[MAX_D];
    const int64_t half = n / 2;
    if (interleave)
        for (int64_t i = 0; i < half; i++) x[i] = widen(head[2 * i]), x[i + half] = widen(head[2 * i + 1]);
    else
        for (int64_t i = 0; i < n; i++) x[i] = widen(head[i]);
    for (int64_t i = 0; i < half; i++) {
        y[i] = widen(as_real(x[i] * widen(cos[i]))) + x[i + half] * widen(sin[i]);
        y[i + half] = widen(as_real(x[i + half] * widen(cos[i + half]))) + x[i] * widen(sin[i + half]);
    }
    for (int64_t i = 0; i < n; i++) head[i] = as_real(y[i]);
}

// Norm and RoPE of head h of the queries and keys of a token, in row b and at t of the call
NOT_INLINED inline void finish_head(const Shape& shape, const Layer& layer, const Rope* ropes, Real* head, int64_t h, int64_t b,
                        int64_t t) {
    const Real* weight = h < shape.H ? layer.norm_q : layer.norm_k;
    if (weight && !shape.norm_all_heads) norm_row(head, weight, head, shape.D, shape.eps, shape.norm_offset);
    if (layer.rope < 0) return;
    const Rope& rope = ropes[layer.rope];
    const int64_t at = b * rope.row_stride + t * shape.rope_n;
    rotate(head, rope.cos + at, rope.sin + at, shape.rope_n, shape.interleave);
}

// Norm over all heads of the queries and keys of a token, in models that have it
inline void norm_heads(const Shape& shape, const Layer& layer, Real* qkv) {
    if (!shape.norm_all_heads || !layer.norm_q) return;
    Real* keys = qkv + shape.H * shape.D;
    norm_row(qkv, layer.norm_q, qkv, shape.H * shape.D, shape.eps, shape.norm_offset);
    norm_row(keys, layer.norm_k, keys, shape.G * shape.D, shape.eps, shape.norm_offset);
}

// x + factor * y, rounded as two operations
inline Real add(Real x, float y, float factor) {
    return as_real(widen(x) + (factor == 1.0f ? y : widen(as_real(y * factor))));
}
