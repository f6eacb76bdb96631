// Keys and values of caches in 8 or 4 bits, as litgpt/kvcache/storages/codecs.py describes them: how vectors are encoded
// and decoded.

#pragma once

#include "numbers.h"

constexpr int64_t GROUP = 32;  // numbers of a vector that share a scale, in 4 bits

enum Encoding { PLAIN = 0, INT8 = 1, INT4 = 2 };

// Encoded keys, or values, of all rows, heads and slots
struct Vectors {
    char* codes;
    bf16* scales;
    int64_t kind, rotated;
    int64_t strides[3], scale_strides[3];  // of rows, heads, slots; in bytes, and in numbers

    Vectors at(int64_t row, int64_t head, int64_t slot) const {
        Vectors v = *this;
        v.codes += row * strides[0] + head * strides[1] + slot * strides[2];
        v.scales += row * scale_strides[0] + head * scale_strides[1] + slot * scale_strides[2];
        return v;
    }
    const char* codes_of(int64_t slot) const { return codes + slot * strides[2]; }
    const bf16* scales_of(int64_t slot) const { return scales + slot * scale_strides[2]; }
    int64_t bytes(int64_t D) const { return kind == INT8 ? D : (D + GROUP - 1) / GROUP * (GROUP / 2); }
};

// x (D,) times a Hadamard matrix of blocks as large as the greatest power of two that divides D
inline void rotate_vector(float* x, int64_t D) {
    const int64_t size = D & -D;
    for (int64_t half = 1; half < size; half *= 2)
        for (int64_t start = 0; start < D; start += 2 * half)
            for (int64_t i = start; i < start + half; i++) {
                const float a = x[i], b = x[i + half];
                x[i] = a + b, x[i + half] = a - b;
            }
    const float factor = 1.0f / std::sqrt(float(size));
    for (int64_t i = 0; i < D; i++) x[i] *= factor;
}

inline void rotate_vector(bf16* x, int64_t D) {
    float y[MAX_D];
    for (int64_t i = 0; i < D; i++) y[i] = widen(x[i]);
    rotate_vector(y, D);
    for (int64_t i = 0; i < D; i++) x[i] = narrow(y[i]);
}

inline void encode_int8(const float* x, int64_t D, int8_t* codes, bf16* scale) {
    float most = 0;
    for (int64_t i = 0; i < D; i++) most = std::max(most, std::fabs(x[i]));
    *scale = narrow(most / 127);
    const float step = *scale ? widen(*scale) : 1.0f;
    for (int64_t i = 0; i < D; i++)
        codes[i] = int8_t(std::max(-127.0f, std::min(127.0f, std::nearbyint(x[i] / step))));
}

inline void encode_int4(const float* x, int64_t D, uint8_t* codes, bf16* scales) {
    for (int64_t g = 0; g * GROUP < D; g++) {
        const float* own = x + g * GROUP;
        const int64_t size = std::min(GROUP, D - g * GROUP);
        const auto [least, most] = std::minmax_element(own, own + size);
        const bf16 base = narrow(*least), scale = narrow((*most - widen(base)) / 15);
        const float step = scale ? widen(scale) : 1.0f;
        scales[2 * g] = scale, scales[2 * g + 1] = base;
        uint8_t numbers[GROUP];
        for (int64_t i = 0; i < GROUP; i++) {
            const float number = std::nearbyint((own[std::min(i, size - 1)] - widen(base)) / step);
            numbers[i] = uint8_t(std::max(0.0f, std::min(15.0f, number)));
        }
        for (int64_t i = 0; i < GROUP / 2; i++)
            codes[g * GROUP / 2 + i] = uint8_t(numbers[i] | numbers[i + GROUP / 2] << 4);
    }
}

// Encodes a head's vector x (D,) to where `v` points.
inline void encode(const Vectors& v, const bf16* x, int64_t D) {
    float y[MAX_D];
    for (int64_t i = 0; i < D; i++) y[i] = widen(x[i]);
    if (v.rotated) rotate_vector(y, D);
    if (v.kind == INT8)
        encode_int8(y, D, (int8_t*)v.codes, v.scales);
    else
        encode_int4(y, D, (uint8_t*)v.codes, v.scales);
}

#ifdef __AVX512BW__
inline __m512 broadcast(bf16 x) { return _mm512_set1_ps(widen(x)); }

// Numbers [d, d + 32) of a vector, without its scale in 8 bits
template <int KIND>
inline void decode_32(const char* codes, const bf16* scales, int64_t d, __m512& low, __m512& high) {
    if constexpr (KIND == INT8) {
        low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(codes + d))));
        high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(codes + d + 16))));
    } else {
        const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(codes + d / 2)));
        const __m512 scale = broadcast(scales[d / GROUP * 2]), least = broadcast(scales[d / GROUP * 2 + 1]);
        const __m512i first = _mm512_and_si512(pairs, _mm512_set1_epi32(15));
        low = _mm512_fmadd_ps(_mm512_cvtepi32_ps(first), scale, least);
        high = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_srli_epi32(pairs, 4)), scale, least);
    }
}
#endif

// Numbers of a vector without its scale in 8 bits: x (D,)
template <int KIND>
inline void decode_codes(const char* codes, const bf16* scales, int64_t D, float* x) {
    if (KIND == INT8) {
#pragma omp simd
        for (int64_t i = 0; i < D; i++) x[i] = float(((const int8_t*)codes)[i]);
        return;
    }
    for (int64_t g = 0; g * GROUP < D; g++) {
        const uint8_t* own = (const uint8_t*)codes + g * GROUP / 2;
        const float scale = widen(scales[2 * g]), least = widen(scales[2 * g + 1]);
        float group[GROUP];
#pragma omp simd
        for (int64_t i = 0; i < GROUP / 2; i++) {
            group[i] = float(own[i] & 15) * scale + least;
            group[i + GROUP / 2] = float(own[i] >> 4) * scale + least;
        }
        std::copy(group, group + std::min(GROUP, D - g * GROUP), x + g * GROUP);
    }
}

// The vector that `v` points to: x (D,)
inline void decode(const Vectors& v, int64_t D, bf16* x) {
    float y[MAX_D];
    if (v.kind == INT8)
        decode_codes<INT8>(v.codes, v.scales, D, y);
    else
        decode_codes<INT4>(v.codes, v.scales, D, y);
    const float scale = v.kind == INT8 ? widen(*v.scales) : 1.0f;
#pragma omp simd
    for (int64_t i = 0; i < D; i++) x[i] = narrow(y[i] * scale);
}

// What a head's vector becomes by encoding and decoding it, but for the rotation
inline void round_to_codes(const Vectors& v, bf16* x, int64_t D) {
    char codes[MAX_D];
    bf16 scales[2 * MAX_D / GROUP];
    Vectors own = v;
    own.codes = codes, own.scales = scales;
    encode(own, x, D);
    decode(own, D, x);
}
