// Keys and values of caches in 8, 5 or 4 bits, as litgpt/kvcache/storages/codecs.py describes them: how vectors are encoded
// and decoded.

#pragma once

#include "simd/simd.h"

constexpr int64_t GROUP = 64;  // numbers of a vector that share a scale, in 4 and 5 bits
constexpr int64_t UNIT = 32;   // numbers of a vector whose codes lie together

enum Encoding { PLAIN = 0, INT8 = 1, INT4 = 2, INT5 = 3, TWO_BITS = 4 };

inline int64_t padded(int64_t D) { return (D + UNIT - 1) / UNIT * UNIT; }
inline int64_t code_bytes(int64_t kind, int64_t D) { return kind == INT8 ? D : padded(D) * (kind == INT5 ? 5 : 4) / 8; }
inline int64_t scale_count(int64_t kind, int64_t D) { return kind == INT8 ? 1 : 2 * ((D + GROUP - 1) / GROUP); }

// Encoded keys, or values, of all rows, heads and slots
struct Vectors {
    char* codes;
    bf16* scales;
    int64_t kind, rotated;
    int64_t strides[3], scale_strides[3];  // of rows, heads, slots (in 2 bits: blocks of them); in bytes, and in numbers
    int64_t unit = 1, group = 0;           // in 2 bits: tokens of a block, and channels of a value that share a scale

    Vectors at(int64_t row, int64_t head, int64_t slot) const {
        Vectors v = *this;
        v.codes += row * strides[0] + head * strides[1] + slot / unit * strides[2];
        v.scales += row * scale_strides[0] + head * scale_strides[1] + slot / unit * scale_strides[2];
        return v;
    }
    // Whether each vector is encoded when its token comes
    bool by_vector() const { return kind != PLAIN && kind != TWO_BITS; }
    const char* codes_of(int64_t slot) const { return codes + slot * strides[2]; }
    const bf16* scales_of(int64_t slot) const { return scales + slot * scale_strides[2]; }
};

// A Hadamard matrix of LANES rows, not scaled
struct HadamardRows {
    float rows[LANES][LANES];

    constexpr HadamardRows() : rows() {
        for (int i = 0; i < LANES; i++)
            for (int j = 0; j < LANES; j++) {
                rows[i][j] = 1.0f;
                for (int common = i & j; common; common &= common - 1) rows[i][j] = -rows[i][j];
            }
    }
};

inline constexpr HadamardRows HADAMARD;

// Each LANES numbers of V vectors times that matrix
template <int V>
inline void rotate_lanes(float* x) {
    Floats sums[V];
    UNROLLED for (int v = 0; v < V; v++) sums[v] = zeros();
    for (int i = 0; i < LANES; i++) {
        const Floats row = load(HADAMARD.rows[i]);
        UNROLLED for (int v = 0; v < V; v++) sums[v] = multiply_add(all(x[v * LANES + i]), row, sums[v]);
    }
    UNROLLED for (int v = 0; v < V; v++) store(x + v * LANES, sums[v]);
}

// x (D,) times a Hadamard matrix of blocks as large as the greatest power of two that divides D
NOT_INLINED inline void rotate_vector(float* x, int64_t D) {
    const int64_t size = D & -D;
    int64_t half = 1;
    if (size >= LANES) {
        int64_t d = 0;
        for (; d + 4 * LANES <= D; d += 4 * LANES) rotate_lanes<4>(x + d);
        for (; d < D; d += LANES) rotate_lanes<1>(x + d);
        half = LANES;
    }
    for (; half < size; half *= 2)
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
#pragma omp simd reduction(max : most)
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
        float least = *own, most = *own;
#pragma omp simd reduction(min : least) reduction(max : most)
        for (int64_t i = 0; i < size; i++) least = std::min(least, own[i]), most = std::max(most, own[i]);
        const bf16 base = narrow(least), scale = narrow((most - widen(base)) / largest);
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
template <class T>
NOT_INLINED void encode(const Vectors& v, const T* x, int64_t D) {
    float y[MAX_D];
    for (int64_t i = 0; i < D; i++) y[i] = widen(x[i]);
    if (v.rotated) rotate_vector(y, D);
    if (v.kind == INT8)
        encode_int8(y, D, (int8_t*)v.codes, v.scales);
    else
        encode_groups(y, D, v.kind == INT5 ? 5 : 4, (uint8_t*)v.codes, v.scales);
}

// Numbers [d, d + 4 LANES) of a vector of D: codes without signs
template <int KIND>
inline Quads load_codes(const char* codes, int64_t D, int64_t d) {
    if constexpr (KIND == INT8) return load_quads((const int8_t*)codes + d);
    const Quads low = load_nibbles((const uint8_t*)codes, d);
    if constexpr (KIND == INT5) return add_fifth_bits(low, codes + D / 2 + d / 8);
    return low;
}

// Numbers of a vector without its scale in 8 bits: x (D,)
template <int KIND>
inline void decode_codes(const char* codes, const bf16* scales, int64_t D, float* x) {
    if (KIND == INT8) {
#pragma omp simd
        for (int64_t i = 0; i < D; i++) x[i] = float(((const int8_t*)codes)[i]);
        return;
    }
    if (D % GROUP == 0) {
        uint8_t numbers[MAX_D];
        for (int64_t d = 0; d < D; d += 4 * LANES) {
            const Quads quads = load_codes<KIND>(codes, D, d);
            std::memcpy(numbers + d, &quads, sizeof quads);
        }
        for (int64_t start = 0; start < D; start += GROUP) {
            const float scale = widen(scales[start / GROUP * 2]), least = widen(scales[start / GROUP * 2 + 1]);
#pragma omp simd
            for (int64_t i = start; i < start + GROUP; i++) x[i] = float(numbers[i]) * scale + least;
        }
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
    int64_t done = 0;
    for (; done + LANES <= D; done += LANES) store(x + done, load(y + done) * all(scale));
    for (; done < D; done++) x[done] = narrow(y[done] * scale);
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
