// From products of queries with keys to weights of values.

#pragma once

#include "simd/simd.h"

constexpr int SPLIT_KEYS = 128;       // keys of a KV split, which one thread processes
constexpr Real HIDDEN = MINUS_INFINITY;  // the bias of a key that a query does not see: minus infinity
// Replaces scores s (n,) by exp(s - top), where `top` is the largest score. Returns their sum.
NOT_INLINED inline float exponentiate(float* s, float* top, int64_t n) {
    const float most = *top = largest(s, n);
    return exponentiate_to(s, s, most == -INFINITY ? 0.0f : most, n);
}

inline float softcap(float score, float cap) {
    return cap * (1.0f - 2.0f / (1.0f + exponential(std::min(2.0f * score / cap, 80.0f))));
}

// Replaces products s of a query with n <= SPLIT_KEYS keys by exp(score - top), and by 0 after the last.
NOT_INLINED inline void weigh(float* s, const Real* bias, int64_t n, float scale, float cap, float* top, float* total) {
    constexpr int COUNT = SPLIT_KEYS / LANES;
    if (cap > 0 || bias || n < SPLIT_KEYS) {
        for (int64_t j = 0; j < n; j++) s[j] *= scale;
        if (cap > 0)
            for (int64_t j = 0; j < n; j++) s[j] = softcap(s[j], cap);
        if (bias)
            for (int64_t j = 0; j < n; j++) s[j] += widen(bias[j]);
        for (int64_t j = n; j < SPLIT_KEYS; j++) s[j] = -INFINITY;
        scale = 1.0f;
    }
    Floats x[COUNT], most[COUNT], sums[COUNT];
    UNROLLED for (int i = 0; i < COUNT; i++) x[i] = most[i] = load(s + i * LANES) * all(scale);
    UNROLLED for (int half = COUNT / 2; half > 0; half /= 2)
        UNROLLED for (int i = 0; i < half; i++) most[i] = greater(most[i], most[i + half]);
    const float largest_one = largest(most[0]);
    *top = largest_one;
    const Floats base = all(largest_one == -INFINITY ? 0.0f : largest_one);
    for (int i = 0; i < COUNT; i += 8)
        UNROLLED for (int j = i; j < i + 8; j++) store(s + j * LANES, sums[j] = exponential(x[j] - base));
    UNROLLED for (int half = COUNT / 2; half > 0; half /= 2)
        UNROLLED for (int i = 0; i < half; i++) sums[i] += sums[i + half];
    *total = sum(sums[0]);
}
