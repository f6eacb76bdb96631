// The instruction set that the library is compiled for. Algorithms use only the names that every one of these headers
// defines; each header lists them in the same order.
//
// LANES floats are a vector `Floats`. Products of weights in bfloat16 or fewer bits with rows of inputs are sums in
// float; `Input` is the type in which rows are kept for them, and NUMBERS of these are a vector `Numbers`. Weights whose
// outputs lie side by side come in pairs of inputs: 32 bits, the first input in the low half.

#pragma once

#include "../numbers.h"

// For loops over arrays of vectors: GCC keeps those in registers only where all indices are constants.
#ifdef __clang__
#define UNROLLED _Pragma("clang loop unroll(full)")
#else
#define UNROLLED _Pragma("GCC unroll 64")
#endif

#if !defined(LITGPT_SCALAR) && !defined(LITGPT_FLOAT32) && \
    (defined(__AVX512BW__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC))
#define ROWS_IN_BF16  // rows of inputs stay in bfloat16
#endif

#if defined(LITGPT_SCALAR)
#include "scalar.h"
#elif defined(__AVX512BW__)
#include "avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "avx2.h"
#elif defined(__aarch64__) && defined(__ARM_NEON)
#include "neon.h"
#else
#include "scalar.h"
#endif

#ifndef ROWS_IN_BF16
#include "float_rows.h"
#endif

// As they are, the first n numbers, and zeros
template <class T>
inline Numbers load_numbers(const T* x, int64_t n) {
    if (n >= NUMBERS) return load_numbers(x);
    T padded[NUMBERS] = {};
    std::memcpy(padded, x, n * sizeof(T));
    return load_numbers(padded);
}

#if defined(__AVX512BW__) && defined(ROWS_IN_BF16)
#include "avx512_nibbles.h"
#elif !defined(LITGPT_FLOAT32)  // which has no integers
#include "nibbles.h"
#endif

// The largest of x (n,); n is a multiple of 16.
inline float largest(const float* x, int64_t n) {
    Floats most = load(x);
    for (int64_t i = LANES; i < n; i += LANES) most = greater(most, load(x + i));
    return largest(most);
}

// y = exp(s - base) for s (n,), which is at most 80 more than base; returns their sum. n is a multiple of 16.
template <class Y>
inline float exponentiate_to(Y* y, const float* s, float base, int64_t n) {
    Floats sums = zeros();
    for (int64_t j = 0; j < n; j += LANES) {
        const Floats weights = exponential(load(s + j) - all(base));
        store(y + j, weights);
        sums += weights;
    }
    return sum(sums);
}

// Sums of the lanes of 4 vectors: y (4,)
inline void store_sums(float* y, Floats a, Floats b, Floats c, Floats d) { store_4(y, sums_of_4(a, b, c, d)); }
