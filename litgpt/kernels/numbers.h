// Numbers are bfloat16 in memory and float in registers. Conversions, scratch memory and elementwise functions.

#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

// For large functions that are called from several places: compiled once, and in the same way for all.
#define NOT_INLINED __attribute__((noinline))
// For functions over arrays of vectors, which stay in registers only where they are inlined
#define INLINED inline __attribute__((always_inline))

using bf16 = uint16_t;

constexpr int MAX_D = 256;  // largest head size

// A buffer for intermediate results, which is kept from call to call. It begins at a cache line.
template <class T>
class Scratch {
    std::unique_ptr<char[]> bytes;
    size_t size = 0;

public:
    T* get(int64_t n) {
        const size_t needed = n * sizeof(T) + 64;
        if (size < needed) {
            bytes.reset();  // before there is more
            bytes.reset(new char[needed]);
            size = needed;
        }
        return (T*)((uintptr_t(bytes.get()) + 63) / 64 * 64);
    }
};

inline float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline float widen(bf16 x) { return from_bits(uint32_t(x) << 16); }

inline bf16 narrow(float x) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float from_half(uint16_t x) {  // float16, no infinities
    return from_bits(uint32_t(x & 0x8000) << 16 | uint32_t(x & 0x7fff) << 13) * 5.192296858534828e33f;  // 2^112
}

// a b + c, in one step where there is an instruction: cannot be reordered
inline float multiply_add(float a, float b, float c) {
#ifdef __FP_FAST_FMAF
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

inline float exponential(float x) {  // relative error below 3e-7; 0 for what float cannot hold
    float n = std::floor(x * 1.44269504f + 0.5f);
    float f = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    float scale = from_bits(uint32_t((int32_t(std::max(n, -127.0f)) + 127) << 23));
    return x < -87.0f ? 0.0f : p * scale;
}

// Numbers of activations, norms, biases and caches in memory: bfloat16, or float in the library for models in float32
#ifdef LITGPT_FLOAT32
using Real = float;
constexpr Real MINUS_INFINITY = -INFINITY;
inline Real as_real(float x) { return x; }
#else
using Real = bf16;
constexpr Real MINUS_INFINITY = 0xff80;
inline Real as_real(float x) { return narrow(x); }
#endif
inline float widen(float x) { return x; }

// Asks for memory that is read soon, so that it arrives while something else is computed.
inline void prefetch(const void* start, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)start + i, 0, 2);
}

enum Activation { SILU = 0, GELU = 1, GELU_TANH = 2 };

inline float activate(float x, int kind) {
    if (kind == SILU) return x / (1.0f + exponential(std::min(-x, 80.0f)));
    if (kind == GELU) return 0.5f * x * (1.0f + std::erf(x * 0.70710678f));
    float inner = 1.59576912f * (x + 0.044715f * x * x * x);  // 0.5 (1 + tanh(z)) = 1 / (1 + exp(-2 z))
    return x / (1.0f + exponential(std::min(-inner, 80.0f)));
}
