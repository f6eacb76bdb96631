// Attention from a few queries over the keys of a KV split. Compiled in splits.cpp and float32.cpp only.

#pragma once

#include "attention.h"

// Weighted sums of n values for R queries, columns [d0, d0 + V LANES): out (R, D). The keys at `ahead` are prefetched.
template <int R, int V>
inline void add_values(const float (*weights)[SPLIT_KEYS], const Real* ahead, int64_t k_stride, const Real* v,
                       int64_t v_stride, int64_t n, int64_t D, int64_t d0, float* out) {
    Floats sums[R][V];
    UNROLLED for (int r = 0; r < R; r++) UNROLLED for (int i = 0; i < V; i++) sums[r][i] = zeros();
    for (int64_t j = 0; j < n; j++) {
        Floats values[V];
        prefetch(ahead + j * k_stride + d0, sizeof(Real) * LANES * V);
        UNROLLED for (int i = 0; i < V; i++) values[i] = load(v + j * v_stride + d0 + LANES * i);
        UNROLLED for (int r = 0; r < R; r++) {
            const Floats weight = all(weights[r][j]);
            UNROLLED for (int i = 0; i < V; i++) sums[r][i] = multiply_add(weight, values[i], sums[r][i]);
        }
    }
    UNROLLED for (int r = 0; r < R; r++) UNROLLED for (int i = 0; i < V; i++)
        store(out + r * D + d0 + LANES * i, sums[r][i]);
}

// x (n,) in the type in which it is multiplied: itself, or in `room`
template <class T>
const Input* as_inputs(const T* x, int64_t n, Input* room) {
    if constexpr (std::is_same_v<Input, T>)
        return x;
    else
        for (int64_t i = 0; i < n; i++) room[i] = widen(x[i]);
    return room;
}

// Attention from R queries over n <= SPLIT_KEYS keys: `top` the largest scores, `total` the sums of exponentials, and
// `out` the weighted sums of values.
template <int R, int D0>
void attend_keys(const Real* q, const Real* k, const Real* v, const Real* ahead, int64_t k_stride, int64_t v_stride,
                 const Real* const* bias, int64_t n, int64_t any_D, float scale, float cap, float* top, float* total,
                 float* out) {
    const int64_t D = D0 ? D0 : any_D;
    float scores[R][SPLIT_KEYS];
    int64_t done = 0, d0 = 0;
    if (D % NUMBERS == 0) {
        Input inputs[std::is_same_v<Input, Real> ? 1 : R * MAX_D];
        const Input* queries = as_inputs(q, R * D, inputs);
        for (; done < n; done += LANES) {
            Floats sums[R][LANES];
            for (int j = 0; j < LANES; j++) {
                const Real* key = k + std::min(done + j, n - 1) * k_stride;  // after the last one, it again
                prefetch(v + std::min(done + j, n - 1) * v_stride, D * sizeof(Real));
                Floats own[R];
                UNROLLED for (int r = 0; r < R; r++) own[r] = zeros();
                for (int64_t d = 0; d < D; d += NUMBERS) {
                    const Numbers keys = load_numbers(key + d);
                    UNROLLED for (int r = 0; r < R; r++) own[r] =
                        add_products(own[r], keys, load_numbers(queries + r * D + d));
                }
                UNROLLED for (int r = 0; r < R; r++) sums[r][j] = own[r];
            }
            UNROLLED for (int r = 0; r < R; r++) store(scores[r] + done, sums_of_all(sums[r]));
        }
    }
    for (int64_t j = done; j < n; j++)
        for (int r = 0; r < R; r++) {
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t d = 0; d < D; d++) sum += widen(k[j * k_stride + d]) * widen(q[r * D + d]);
            scores[r][j] = sum;
        }
    for (int r = 0; r < R; r++) weigh(scores[r], bias[r], n, scale, cap, top + r, total + r);
    constexpr int V = output_vectors(std::max(R, 4));  // sums in registers
    for (; d0 + V * LANES <= D; d0 += V * LANES) add_values<R, V>(scores, ahead, k_stride, v, v_stride, n, D, d0, out);
    for (; d0 + LANES <= D; d0 += LANES) add_values<R, 1>(scores, ahead, k_stride, v, v_stride, n, D, d0, out);
    for (int r = 0; d0 < D && r < R; r++) {
        float sums[MAX_D] = {};
        for (int64_t j = 0; j < n; j++)
#pragma omp simd
            for (int64_t d = d0; d < D; d++) sums[d] = multiply_add(scores[r][j], widen(v[j * v_stride + d]), sums[d]);
        std::copy(sums + d0, sums + D, out + r * D + d0);
    }
}

template <int R>
void attend_rows(const SplitQueries& x, const Real* k, const Real* v, const Real* ahead, int64_t k_stride, int64_t v_stride) {
    const auto run = x.D == 64 ? attend_keys<R, 64> : x.D == 128 ? attend_keys<R, 128> : attend_keys<R, 0>;
    run(x.q, k, v, ahead, k_stride, v_stride, x.bias, x.n, x.D, x.scale, x.cap, x.top, x.total, x.out);
}

void SplitQueries::attend(const Real* k, const Real* v, const Real* ahead, int64_t k_stride, int64_t v_stride) const {
    const auto run = count == 1   ? attend_rows<1>
                     : count == 2 ? attend_rows<2>
                     : count == 3 ? attend_rows<3>
                                  : attend_rows<4>;
    run(*this, k, v, ahead, k_stride, v_stride);
}
