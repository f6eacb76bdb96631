// Keys and values of caches in 8, 5 or 4 bits, as litgpt/kvcache/storages/codecs.py describes them: how vectors are encoded
// and decoded.

#pragma once

#include "simd/simd.h"

constexpr int64_t GROUP = 64;  // numbers of a vector that share a scale, in 4 and 5 bits
constexpr int64_t UNIT = 32;   // numbers of a vector whose codes lie together

enum Encoding { PLAIN = 0, INT8 = 1, INT4 = 2, INT5 = 3 };

inline int64_t padded(int64_t D) { return (D + UNIT - 1) / UNIT * UNIT; }

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

inline void encode_groups(const float* x, int64_t D, int bits, uint8_t* codes, bf16* scales) {
    uint8_t numbers[MAX_D];
    const float largest = float((1 << bits) - 1);
    for (int64_t start = 0; start < padded(D); start += GROUP) {
        const float* own = x + start;
        const int64_t size = std::min(GROUP, D - start);
        const auto [least, most] = std::minmax_element(own, own + size);
        const bf16 base = narrow(*least), scale = narrow((*most - widen(base)) / largest);
        const float step = scale ? widen(scale) : 1.0f;
        *scales++ = scale, *scales++ = base;
        for (int64_t i = 0; i < std::min(GROUP, padded(D) - start); i++) {
            const float number = std::nearbyint((own[std::min(i, size - 1)] - widen(base)) / step);
            numbers[start + i] = uint8_t(std::max(0.0f, std::min(largest, number)));
        }
    }
    for (int64_t start = 0; start < padded(D); start += UNIT)
        for (int64_t i = start; i < start + UNIT / 2; i++)
            *codes++ = uint8_t((numbers[i] & 15) | (numbers[i + UNIT / 2] & 15) << 4);
    for (int64_t start = 0; bits == 5 && start < padded(D); start += 8) {
        uint8_t fifth = 0;
        for (int64_t i = 0; i < 8; i++) fifth |= uint8_t(numbers[start + i] >> 4 << i);
        *codes++ = fifth;
    }
}

// Encodes a head's vector x (D,) to where `v` points.
NOT_INLINED inline void encode(const Vectors& v, const bf16* x, int64_t D) {
    float y[MAX_D];
    for (int64_t i = 0; i < D; i++) y[i] = widen(x[i]);
    if (v.rotated) rotate_vector(y, D);
    if (v.kind == INT8)
        encode_int8(y, D, (int8_t*)v.codes, v.scales);
    else
        encode_groups(y, D, v.kind == INT5 ? 5 : 4, (uint8_t*)v.codes, v.scales);
}

#ifdef __AVX512BW__
// The codes of numbers [d, d + 64) of a vector (D,) as integers of 16 bits, in the order of `in_order_of_codes`
template <int KIND>
inline void widen_codes(const char* codes, int64_t D, int64_t d, __m512i& first, __m512i& second) {
    if constexpr (KIND == INT8) {
        first = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)(codes + d)));
        second = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)(codes + d + 32)));
    } else {
        const __m512i pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)(codes + d / 2)));
        first = _mm512_and_si512(pairs, _mm512_set1_epi16(15)), second = _mm512_srli_epi16(pairs, 4);
        if constexpr (KIND == INT5) {
            uint64_t fifth;
            std::memcpy(&fifth, codes + D / 2 + d / 8, 8);
            const __m512i sixteen = _mm512_set1_epi16(16);
            const uint64_t low = (fifth & 0xffff) | (fifth >> 16 & 0xffff0000);
            const uint64_t high = (fifth >> 16 & 0xffff) | (fifth >> 32 & 0xffff0000);
            first = _mm512_or_si512(first, _mm512_maskz_mov_epi16(__mmask32(low), sixteen));
            second = _mm512_or_si512(second, _mm512_maskz_mov_epi16(__mmask32(high), sixteen));
        }
    }
}

// The block of 16 numbers that is block i of 4 in the order of `widen_codes`
template <int KIND>
constexpr int block_of_codes(int i) {
    return KIND == INT8 ? i : i % 2 * 2 + i / 2;
}

// x (64,) as integers of 16 bits: returns what 1 stands for
inline float to_integers(const float* x, int16_t* y) {
    __m512 parts[4], most = _mm512_setzero_ps();
    UNROLLED for (int i = 0; i < 4; i++) most = _mm512_max_ps(most, _mm512_abs_ps(parts[i] = _mm512_loadu_ps(x + 16 * i)));
    const float largest = _mm512_reduce_max_ps(most);
    const __m512 factor = _mm512_set1_ps(largest > 0 ? 32767.0f / largest : 0.0f);
    UNROLLED for (int i = 0; i < 4; i++) {
        const __m512i numbers = _mm512_cvtps_epi32(_mm512_mul_ps(parts[i], factor));
        _mm256_storeu_si256((__m256i*)(y + 16 * i), _mm512_cvtsepi32_epi16(numbers));
    }
    return largest / 32767.0f;
}

// Scales, and least numbers but in 8 bits, of numbers [d, d + 64) of 64 vectors of which there are n; 0 after the last
template <int KIND>
inline void load_scales(const Vectors& v, int64_t d, int64_t n, float* scale, float* least) {
    const int64_t stride = v.scale_strides[2];
    for (int64_t j = 0; j < 64; j += 16) {
        const __mmask16 there = n >= j + 16 ? 0xffff : n > j ? __mmask16((1 << (n - j)) - 1) : 0;
        __m512i both;
        if constexpr (KIND == INT8) {
            if (stride != 1) {
                for (int64_t i = j; i < j + 16; i++) scale[i] = i < n ? widen(*v.scales_of(i)) : 0.0f;
                continue;
            }
            both = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, v.scales + j));
        } else {
            const __m512i index = _mm512_add_epi32(
                _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                   _mm512_set1_epi32(int(stride))),
                _mm512_set1_epi32(int(j * stride + d / GROUP * 2)));
            both = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), there, index, v.scales, 2);
            _mm512_storeu_si512(least + j, _mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000))));
        }
        _mm512_storeu_si512(scale + j, _mm512_slli_epi32(both, 16));
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
    for (int64_t start = 0; start < D; start += UNIT) {
        const uint8_t* own = (const uint8_t*)codes + start / 2;
        const float scale = widen(scales[start / GROUP * 2]), least = widen(scales[start / GROUP * 2 + 1]);
        int32_t numbers[UNIT];
#pragma omp simd
        for (int64_t i = 0; i < UNIT / 2; i++) numbers[i] = own[i] & 15, numbers[i + UNIT / 2] = own[i] >> 4;
        if (KIND == INT5) {
            uint32_t fifth;
            std::memcpy(&fifth, codes + padded(D) / 2 + start / 8, 4);
#pragma omp simd
            for (int64_t i = 0; i < UNIT; i++) numbers[i] |= int32_t(fifth >> i & 1) << 4;
        }
        const int64_t size = std::min(UNIT, D - start);
#pragma omp simd
        for (int64_t i = 0; i < size; i++) x[start + i] = float(numbers[i]) * scale + least;
    }
}

// Calls `run` with the kind of codes as a type.
template <class Run>
inline void with_kind(const Vectors& v, Run run) {
    if (v.kind == INT8)
        run(std::integral_constant<int, INT8>());
    else if (v.kind == INT4)
        run(std::integral_constant<int, INT4>());
    else
        run(std::integral_constant<int, INT5>());
}

// The vector that `v` points to: x (D,)
NOT_INLINED inline void decode(const Vectors& v, int64_t D, bf16* x) {
    float y[MAX_D];
    with_kind(v, [&](auto kind) { decode_codes<decltype(kind)::value>(v.codes, v.scales, D, y); });
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
