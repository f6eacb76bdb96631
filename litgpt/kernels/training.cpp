// The kernels of training on CPUs as C functions: a library of its own, with products.cpp. Letters as in attention.py; M rows, K
// inputs, N outputs.

#include "block.h"

// Attention of rows in float, or bfloat16 where `narrow` is not 0. The five numbers at `seen` are those of a `Seen`.
struct RowCall {
    const void *q, *k, *v;
    int64_t H, G, D, n_rows;
    const int64_t *ends, *strides, *seen;
    float scale;
    int narrow;

    // Calls f(attention, a number of its type)
    template <class F>
    void run(F f) const {
        if (narrow)
            f(of<NarrowRowHead>(), bf16());
        else
            f(of<RowHead>(), float());
    }

    template <class Head, class T = typename Head::Number>
    RowAttention<Head> of() const {
        const Seen own{seen[0], seen[1], seen[2], (const uint8_t*)seen[3], seen[4]};
        return {(const T*)q, (const T*)k, (const T*)v, strides, H, G, D, n_rows, ends, own, scale};
    }
};

extern "C" {

void attend_rows(const void* q, const void* k, const void* v, void* y, float* logs, int64_t H, int64_t G, int64_t D,
                 int64_t n_rows, const int64_t* ends, const int64_t* strides, const int64_t* seen, float scale, int narrow) {
    RowCall{q, k, v, H, G, D, n_rows, ends, strides, seen, scale, narrow}.run([&](const auto& attention, auto number) {
        attention.forward((decltype(number)*)y, logs);
    });
}

void attend_rows_backward(const void* q, const void* k, const void* v, const void* y, const void* dy, const float* logs, void* dq,
                          float* parts, void* dk, void* dv, int64_t H, int64_t G, int64_t D, int64_t n_rows, const int64_t* ends,
                          const int64_t* strides, const int64_t* seen, float scale, int narrow) {
    RowCall{q, k, v, H, G, D, n_rows, ends, strides, seen, scale, narrow}.run([&](const auto& attention, auto number) {
        using T = decltype(number);
        attention.backward((const T*)y, (const T*)dy, logs, (T*)dq, parts, (T*)dk, (T*)dv);
    });
}

// C (M, N) = A (M, K) B (K, N) + bias (null: none), or with `adds` added to it, by the strides of rows and columns of A and B, one of
// which is 1
void multiply_matrices(const bf16* a, const bf16* b, const bf16* bias, bf16* c, int64_t M, int64_t K, int64_t N,
                       int64_t a_row, int64_t a_column, int64_t b_row, int64_t b_column, int adds) {
    MatrixProduct{{a, a_row, a_column}, {b, b_row, b_column}, bias, adds ? c : nullptr, c, M, K, N}.run();
}

void run_block(const Block* block, bf16* y) { block->forward(y); }

void run_block_backward(const Block* block, const bf16* dy, bf16* dx, const BlockGradients* to) { block->backward(dy, dx, *to); }

// Parts of a training step: see training.h. Numbers are float, or bfloat16 where `narrow` is not 0.
void gate_values(const void* g, const void* x, void* y, int64_t n, int kind, int narrow) {
    with_numbers(narrow, [&](auto number) {
        using T = decltype(number);
        gate((const T*)g, (const T*)x, (T*)y, n, kind);
    });
}

void gate_values_backward(const void* g, const void* x, const void* dy, void* dg, void* dx, int64_t n, int kind, int narrow) {
    with_numbers(narrow, [&](auto number) {
        using T = decltype(number);
        gate_backward<T, 2>((const T*)g, (const T*)x, (const T*)dy, {(T*)dg, (T*)dx}, n, kind);
    });
}

void drop_values(const void* x, void* y, int64_t n, int64_t seed, double p, int narrow) {
    with_numbers(narrow, [&](auto number) { drop((const decltype(number)*)x, (decltype(number)*)y, n, seed, p); });
}

void norm_values(const void* x, const void* w, void* y, int64_t rows, int64_t size, float eps, float offset, int narrow) {
    with_numbers(narrow, [&](auto number) {
        using T = decltype(number);
        norm((const T*)x, (const T*)w, (T*)y, rows, size, eps, offset);
    });
}

void norm_values_backward(const void* x, const void* w, const void* dy, void* dx, void* dw, float* factors, int64_t rows,
                          int64_t size, float eps, float offset, int narrow) {
    with_numbers(narrow, [&](auto number) {
        using T = decltype(number);
        norm_backward<T>((const T*)x, (const T*)w, (const T*)dy, nullptr, (T*)dx, nullptr, (T*)dw, false, factors, rows, size, eps, offset);
    });
}

void rotate_values(const void* x, const void* cos, const void* sin, void* y, int64_t T, int64_t H, int64_t D,
                   int64_t token_stride, int64_t head_stride, int64_t y_stride, int back, int narrow) {
    with_numbers(narrow, [&](auto number) {
        using N = decltype(number);
        rotate((const N*)x, (const N*)cos, (const N*)sin, (N*)y, T, H, D, token_stride, head_stride, y_stride, back);
    });
}

void next_token_losses(void* logits, const int64_t* targets, float* losses, int64_t rows, int64_t V, float scale, int narrow) {
    with_numbers(narrow, [&](auto number) { next_token_loss((decltype(number)*)logits, targets, losses, rows, V, scale); });
}

}  // extern "C"
