// Parts of a training step that torch takes several passes over memory for. Numbers are float or bfloat16 in memory.

#pragma once

#include "simd/simd.h"

// Calls f with a number of the type that is asked for.
template <class F>
void with_numbers(bool narrow, F f) {
    if (narrow)
        f(bf16());
    else
        f(float());
}

// Calls f(inputs, outputs) for vectors of n elements.
template <class T, int IN, int OUT, class F>
void for_vectors(int64_t n, const T* const (&in)[IN], T* const (&out)[OUT], F f) {
    constexpr int64_t PART = 4096;
    const auto vector = [&](const T* const* x, T* const* y) {
        Floats inputs[IN], outputs[OUT];
        UNROLLED for (int i = 0; i < IN; i++) inputs[i] = load(x[i]);
        f(inputs, outputs);
        UNROLLED for (int i = 0; i < OUT; i++) store(y[i], outputs[i]);
    };
#pragma omp parallel for schedule(static) if (n > PART)
    for (int64_t start = 0; start < n; start += PART) {
        const T* x[IN];
        T* y[OUT];
        int64_t i = start;
        const int64_t end = std::min(n, start + PART);
        for (; i + LANES <= end; i += LANES) {
            for (int j = 0; j < IN; j++) x[j] = in[j] + i;
            for (int j = 0; j < OUT; j++) y[j] = out[j] + i;
            vector(x, y);
        }
        if (i == end) continue;
        T padded[IN + OUT][LANES] = {};
        for (int j = 0; j < IN; j++) x[j] = std::copy(in[j] + i, in[j] + end, padded[j]) - (end - i);
        for (int j = 0; j < OUT; j++) y[j] = padded[IN + j];
        vector(x, y);
        for (int j = 0; j < OUT; j++) std::copy_n(y[j], end - i, out[j] + i);
    }
}

// g sigmoid(z): z is g, or for GELU by tanh 1.5958 (g + 0.0447 g^3); its slope is dz / dg
struct Gate {
    Floats share, slope;  // sigmoid(z)

    Gate(Floats g, int kind) : slope(all(1.0f)) {
        Floats z = g;
        if (kind == GELU_TANH) {
            const Floats square = g * g * all(0.044715f);
            z = all(1.59576912f) * multiply_add(square, g, g);
            slope = all(1.59576912f) * multiply_add(all(3.0f), square, slope);
        }
        share = all(1.0f) / (all(1.0f) + exponential(zeros() - greater(z, all(-80.0f))));
    }
};

template <class T>
void gate(const T* g, const T* x, T* y, int64_t n, int kind) {
    for_vectors<T, 2, 1>(n, {g, x}, {y}, [kind](const Floats* in, Floats* out) {
        out[0] = in[0] * Gate(in[0], kind).share * in[1];
    });
}

// Gradients of g and of x, and if there are three outputs what `gate` gives; each may take the place of an input.
template <class T, int OUT>
void gate_backward(const T* g, const T* x, const T* dy, T* const (&to)[OUT], int64_t n, int kind) {
    for_vectors<T, 3, OUT>(n, {g, x, dy}, to, [kind](const Floats* in, Floats* out) {
        const Gate own(in[0], kind);
        const Floats rest = in[0] * (all(1.0f) - own.share) * own.slope, gated = in[0] * own.share;
        out[0] = in[2] * in[1] * own.share * (all(1.0f) + rest);
        out[1] = in[2] * gated;
        if constexpr (OUT == 3) out[2] = gated * in[1];
    });
}

inline uint32_t mixed(uint32_t x) {  // each bit of x changes half of the others
    x = (x ^ x >> 16) * 0x7feb352d;
    x = (x ^ x >> 15) * 0x846ca68b;
    return x ^ x >> 16;
}

// y = x / (1 - p), or 0 where the number that belongs to the seed and an element's index is below p of 2^32
template <class T>
void drop(const T* x, T* y, int64_t n, uint64_t seed, double p) {
    constexpr int64_t PART = 1024;
    const uint32_t limit = uint32_t(p * 4294967296.0), low = uint32_t(seed), high = uint32_t(seed >> 32);
    const float scale = float(1.0 / (1.0 - p));
#pragma omp parallel for schedule(static) if (n > 4 * PART)
    for (int64_t start = 0; start < n; start += PART) {
        const int64_t size = std::min(PART, n - start);
        const uint32_t first = uint32_t(start), key = high ^ mixed(uint32_t(start >> 32));
        float factors[PART];
        for (int64_t i = 0; i < PART; i++) factors[i] = mixed(mixed(first + uint32_t(i) + low) ^ key) < limit ? 0.0f : scale;
        int64_t i = 0;
        for (; i + LANES <= size; i += LANES) store(y + start + i, load(x + start + i) * load(factors + i));
        if (i == size) continue;
        T padded[LANES] = {};
        std::copy_n(x + start + i, size - i, padded);
        store(padded, load(padded) * load(factors + i));
        std::copy_n(padded, size - i, y + start + i);
    }
}

// Cross-entropies of logits (rows, V) with targets; the logits become their gradients times `scale`. V is a multiple of 16.
template <class T>
void next_token_loss(T* logits, const int64_t* targets, float* losses, int64_t rows, int64_t V, float scale) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        T* own = logits + r * V;
        Floats most = load(own);
        for (int64_t i = LANES; i < V; i += LANES) most = greater(most, load(own + i));
        const Floats offset = all(largest(most));
        Floats sums = zeros();
        for (int64_t i = 0; i < V; i += LANES) sums += exponential(load(own + i) - offset);
        const float log_sum = largest(most) + std::log(sum(sums));
        T target[LANES];
        std::fill_n(target, LANES, own[targets[r]]);
        losses[r] = log_sum - largest(load(target));
        const float its_share = std::exp(-losses[r]);
        for (int64_t i = 0; i < V; i += LANES) store(own + i, exponential(load(own + i) - all(log_sum)) * all(scale));
        store(target, all((its_share - 1.0f) * scale));
        own[targets[r]] = target[0];
    }
}

// y = factor x (offset + w), by the root mean square of each row; size is a multiple of 16.
template <class T>
inline float norm_factor(const T* x, int64_t size, float eps) {
    Floats squares = zeros();
    for (int64_t i = 0; i < size; i += LANES) squares = multiply_add(load(x + i), load(x + i), squares);
    return 1.0f / std::sqrt(sum(squares) / size + eps);
}

template <class T>
void norm(const T* x, const T* w, T* y, int64_t rows, int64_t size, float eps, float offset) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const T* own = x + r * size;
        const Floats factor = all(norm_factor(own, size, eps));
        for (int64_t i = 0; i < size; i += LANES)
            store(y + r * size + i, load(own + i) * factor * (load(w + i) + all(offset)));
    }
}

// dx is added to `added`, dw to what is there if it `adds`; y is what `norm` gives. `added`, y and dw may be null; factors (rows,)
template <class T>
void norm_backward(const T* x, const T* w, const T* dy, const T* added, T* dx, T* y, T* dw, bool adds, float* factors, int64_t rows,
                   int64_t size, float eps, float offset) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const int64_t first = r * size;
        const float factor = factors[r] = norm_factor(x + first, size, eps);
        Floats products = zeros();
        for (int64_t i = 0; i < size; i += LANES)
            products = multiply_add(load(x + first + i) * load(dy + first + i), load(w + i) + all(offset), products);
        const Floats back = all(sum(products) * factor * factor * factor / size);
        for (int64_t i = 0; i < size; i += LANES) {
            const int64_t at = first + i;
            const Floats weight = (load(w + i) + all(offset)) * all(factor), own = load(x + at);
            const Floats change = load(dy + at) * weight - own * back;
            store(dx + at, added ? change + load(added + at) : change);
            if (y) store(y + at, own * weight);
        }
    }
    if (!dw) return;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < size; i += 16) {
        Floats sums[16 / LANES];
        for (int j = 0; j < 16 / LANES; j++) sums[j] = adds ? load(dw + i + j * LANES) : zeros();
        for (int64_t r = 0; r < rows; r++)
            for (int j = 0; j < 16 / LANES; j++) {
                const int64_t at = r * size + i + j * LANES;
                sums[j] = multiply_add(load(x + at) * all(factors[r]), load(dy + at), sums[j]);
            }
        for (int j = 0; j < 16 / LANES; j++) store(dw + i + j * LANES, sums[j]);
    }
}

// y (T, H, D), which may be x, of heads x by strides over tokens and heads: each half times its cosines, plus the other half times
// sines; `back` takes gradients of y. D is a multiple of 32.
template <class T>
void rotate(const T* x, const T* cos, const T* sin, T* y, int64_t n_tokens, int64_t H, int64_t D, int64_t token_stride,
            int64_t head_stride, int64_t y_stride, bool back) {
    const int64_t half = D / 2;
#pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < n_tokens; t++) {
        const T *c = cos + t * D, *left_sin = sin + t * D + (back ? half : 0), *right_sin = sin + t * D + (back ? 0 : half);
        for (int64_t h = 0; h < H; h++) {
            const T* own = x + t * token_stride + h * head_stride;
            T* to = y + t * y_stride + h * D;
            for (int64_t i = 0; i < half; i += LANES) {
                const Floats left = load(own + i), right = load(own + half + i);
                store(to + i, multiply_add(right, load(left_sin + i), left * load(c + i)));
                store(to + half + i, multiply_add(left, load(right_sin + i), right * load(c + half + i)));
            }
        }
    }
}
