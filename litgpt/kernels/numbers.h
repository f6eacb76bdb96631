// Numbers are bfloat16 in memory and float in registers. Conversions, scratch memory and elementwise functions.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#ifdef __AVX512BW__
#include <immintrin.h>
#endif

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

// For loops over arrays of vectors: GCC keeps those in registers only where all indices are constants.
#define UNROLLED _Pragma("GCC unroll 16")

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

#ifdef __AVX512BW__
// sum + a b for 32 bfloat16 numbers: each of the 16 sums gets two products
inline __m512 add_products(__m512 sum, __m512i a, __m512i b) {
#ifdef __AVX512BF16__
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
    const __m512i high = _mm512_set1_epi32(int(0xffff0000));
    const auto low_part = [](__m512i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); };
    const auto high_part = [&](__m512i x) { return _mm512_castsi512_ps(_mm512_and_si512(x, high)); };
    sum = _mm512_fmadd_ps(high_part(a), high_part(b), sum);
    return _mm512_fmadd_ps(low_part(a), low_part(b), sum);
#endif
}

inline __m512 exponential_16(__m512 x) {            // for x of at most 80; relative error below 3e-7
    x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);  // in this order NaN stays; below it is 0
    const __m512 log2 = _mm512_set1_ps(1.44269504f);
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, log2), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_fmsub_ps(x, log2, n);
    __m512 p = _mm512_set1_ps(1.5403530e-4f);  // 2^f by its series
    for (float c : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f})
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c));
    return _mm512_scalef_ps(p, n);
}

inline __m256i narrow_16(__m512 x) {  // as `narrow`, for numbers that are not NaN
#ifdef __AVX512BF16__
    return (__m256i)_mm512_cvtneps_pbh(x);
#else
    const __m512i bits = _mm512_castps_si512(x),
                  odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#endif
}

inline __m512 widen_16(const bf16* x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x)), 16));
}

// The sum of the elements of each of 4 vectors, which are no array, for those would be kept in memory
inline __m128 sums_of_4(__m512 v0, __m512 v1, __m512 v2, __m512 v3) {
    const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(v0, v1), _mm512_unpackhi_ps(v0, v1));
    const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(v2, v3), _mm512_unpackhi_ps(v2, v3));
    const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
    const __m512 all =
        _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)), _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// The sum of the elements of each of 16 vectors, which are lost
inline __m512 sums_of_16(__m512* v) {
    // halve the number of vectors four times, each new one with the partial sums of two in alternating places
    for (int i = 0; i < 8; i++)
        v[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    for (int i = 0; i < 4; i++) {
        const __m512d a = _mm512_castps_pd(v[2 * i]), b = _mm512_castps_pd(v[2 * i + 1]);
        v[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    for (int i = 0; i < 2; i++)
        v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(v[0], v[1], 0x88), _mm512_shuffle_f32x4(v[0], v[1], 0xdd));
}
#endif
