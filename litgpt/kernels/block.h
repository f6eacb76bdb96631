// A layer of a model that is trained, in bfloat16: norm and attention, then norm and an MLP with a gate, each added to its inputs.
//
// Letters: T tokens of all rows one after the other, E embedding size, H query heads, G key/value heads, D head size, I inputs of the
// MLP's last product. Weights have a row for each output.

#pragma once

#include "matrices.h"
#include "row_attention.h"
#include "training.h"

struct Norm {
    float eps, offset;
};

struct Gradient {  // of a weight
    bf16* data;
    int64_t adds;  // to what is there
};

struct BlockGradients {
    Gradient norm_1, qkv, proj, norm_2, gate, up, down;
};

struct Block {
    int64_t T, E, H, G, D, I, activation, window, n_rows;
    const int64_t* ends;  // of rows
    Norm numbers[2];
    float scale;            // of attention
    const bf16 *cos, *sin;  // (T, D); null: no RoPE
    const bf16 *norm_1, *qkv, *proj, *norm_2, *gate, *up, *down;  // weights
    // What the backward pass needs, which takes the last two for itself: inputs (T, E), queries, keys and values (T, heads, D), attention
    // and the logarithms of its sums, what is between the two parts (T, E), and the gate's two inputs (T, I)
    const bf16* x;
    bf16* heads;
    bf16* attended;
    float* logs;
    bf16 *middle, *gates, *ups;

    void forward(bf16* y) const {
        static thread_local Scratch<bf16> scratch;
        bf16 *normed = scratch.get(T * (E + I)), *inner = normed + T * E;
        apply(0, norm_1, x, normed);
        multiply(normed, E, qkv, n_heads() * D, heads);
        rotate(heads, false);
        attention(heads).forward(attended, logs);
        multiply(attended, H * D, proj, E, middle, x);
        apply(1, norm_2, middle, normed);
        multiply(normed, E, gate, I, gates);
        multiply(normed, E, up, I, ups);
        ::gate(gates, ups, inner, T * I, int(activation));
        multiply(inner, I, down, E, y, middle);
    }

    // dx from dy, (T, E)
    void backward(const bf16* dy, bf16* dx, const BlockGradients& to) const {
        static thread_local Scratch<bf16> scratch;
        static thread_local Scratch<float> float_scratch;
        bf16 *d_inner = scratch.get(T * (3 * E + I + (H + n_heads()) * D)), *normed = d_inner + T * I, *d_normed = normed + T * E;
        bf16 *d_middle = d_normed + T * E, *d_attended = d_middle + T * E, *d_heads = d_attended + T * H * D;
        float *factors = float_scratch.get(T * (2 * H * D + 1)), *parts = factors + T;
        multiply_back(dy, E, down, I, d_inner);
        gate_backward<bf16, 3>(gates, ups, d_inner, {gates, ups, d_inner}, T * I, int(activation));
        add_gradient(dy, E, d_inner, I, to.down);
        multiply_back(gates, I, gate, E, d_normed);
        multiply_back(ups, I, up, E, d_normed, d_normed);
        apply_back(1, norm_2, middle, d_normed, dy, d_middle, normed, factors, to.norm_2);
        add_gradient(gates, I, normed, E, to.gate);
        add_gradient(ups, I, normed, E, to.up);
        multiply_back(d_middle, E, proj, H * D, d_attended);
        add_gradient(d_middle, E, attended, H * D, to.proj);
        attention(heads).backward(attended, d_attended, logs, d_heads, parts, d_heads + H * D, d_heads + (H + G) * D);
        rotate(d_heads, true);
        multiply_back(d_heads, n_heads() * D, qkv, E, d_normed);
        apply_back(0, norm_1, x, d_normed, d_middle, dx, normed, factors, to.norm_1);
        add_gradient(d_heads, n_heads() * D, normed, E, to.qkv);
    }

private:
    int64_t n_heads() const { return H + 2 * G; }

    // y (T, N) = x (T, K) w^T, and what is added
    void multiply(const bf16* x, int64_t K, const bf16* w, int64_t N, bf16* y, const bf16* added = nullptr) const {
        MatrixProduct{{x, K, 1}, {w, 1, K}, nullptr, added, y, T, K, N}.run();
    }

    // dx (T, K) = dy (T, N) w, and what is added
    void multiply_back(const bf16* dy, int64_t N, const bf16* w, int64_t K, bf16* dx, const bf16* added = nullptr) const {
        MatrixProduct{{dy, N, 1}, {w, K, 1}, nullptr, added, dx, T, N, K}.run();
    }

    // Gradient of w (N, K) from x (T, K) and dy (T, N)
    void add_gradient(const bf16* dy, int64_t N, const bf16* x, int64_t K, const Gradient& to) const {
        MatrixProduct{{dy, 1, N}, {x, K, 1}, nullptr, to.adds ? to.data : nullptr, to.data, N, T, K}.run();
    }

    void apply(int which, const bf16* weight, const bf16* x, bf16* y) const {
        norm(x, weight, y, T, E, numbers[which].eps, numbers[which].offset);
    }

    // dx, which is added to, and again the norm's outputs
    void apply_back(int which, const bf16* weight, const bf16* x, const bf16* dy, const bf16* added, bf16* dx, bf16* y, float* factors,
                    const Gradient& to) const {
        norm_backward(x, weight, dy, added, dx, y, to.data, to.adds, factors, T, E, numbers[which].eps, numbers[which].offset);
    }

    void rotate(bf16* x, bool back) const {
        const int64_t stride = n_heads() * D;
        if (cos) ::rotate(x, cos, sin, x, T, H + G, D, stride, D, stride, back);
    }

    RowAttention<NarrowRowHead> attention(const bf16* x) const {
        static thread_local int64_t strides[8];
        const int64_t token = n_heads() * D;
        for (int i = 0; i < 8; i++) strides[i] = i % 2 && i < 6 ? D : token;
        return {x, x + H * D, x + (H + G) * D, strides, H, G, D, n_rows, ends, Seen{0, window, 0}, scale};
    }
};
