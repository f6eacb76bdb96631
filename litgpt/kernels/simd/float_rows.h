// Rows of inputs in float, for instruction sets without products of bfloat16, and for models in float32

#pragma once

using Input = float;
using Numbers = Floats;
constexpr int NUMBERS = LANES;

inline Numbers load_numbers(const float* x) { return load(x); }
inline Numbers load_numbers(const bf16* x) { return load(x); }

// sum + a b
inline Floats add_products(Floats sum, Numbers a, Numbers b) { return multiply_add(a, b, sum); }

// Adds to sums, of M rows and V vectors of outputs, the products of a pair of inputs x, by `stride` bytes, with w.
template <int M, int V>
inline void add_pairs(Floats (&sums)[M][V], const uint32_t* w, const char* x, int64_t stride) {
    Floats weights[V];
    const auto add = [&](int i) {
        UNROLLED for (int m = 0; m < M; m++) {
            const Floats input = all(((const float*)(x + m * stride))[i]);
            UNROLLED for (int v = 0; v < V; v++) sums[m][v] = multiply_add(input, weights[v], sums[m][v]);
        }
    };
    UNROLLED for (int v = 0; v < V; v++) weights[v] = firsts(load_pairs(w + LANES * v));
    add(0);
    UNROLLED for (int v = 0; v < V; v++) weights[v] = seconds(load_pairs(w + LANES * v));
    add(1);
}
