// AVX-512, with and without its instructions for bfloat16 and integer products

#pragma once

#include <immintrin.h>

using Floats = __m512;
constexpr int LANES = 16;

inline Floats zeros() { return _mm512_setzero_ps(); }
inline Floats all(float x) { return _mm512_set1_ps(x); }
inline Floats load(const float* x) { return _mm512_loadu_ps(x); }
inline void store(float* y, Floats x) { _mm512_storeu_ps(y, x); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats greater(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats magnitude(Floats x) { return _mm512_abs_ps(x); }
inline float largest(Floats x) { return _mm512_reduce_max_ps(x); }
inline float sum(Floats x) { return _mm512_reduce_add_ps(x); }

inline Floats load(const bf16* x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x)), 16));
}

inline __m256i narrowed(Floats x) {  // as `narrow`, for numbers that are not NaN
#ifdef __AVX512BF16__
    return (__m256i)_mm512_cvtneps_pbh(x);
#else
    const __m512i bits = _mm512_castps_si512(x),
                  odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#endif
}

inline void store(bf16* y, Floats x) { _mm256_storeu_si256((__m256i*)y, narrowed(x)); }

inline Floats exponential(Floats x) {    // for x of at most 80; relative error below 3e-7
    x = _mm512_max_ps(all(-200.0f), x);  // in this order NaN stays; below it is 0
    const Floats log2 = all(1.44269504f);
    const Floats n = _mm512_roundscale_ps(_mm512_mul_ps(x, log2), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Floats f = _mm512_fmsub_ps(x, log2, n);
    const float series[] = {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f};
    Floats p = all(1.5403530e-4f);  // 2^f
    UNROLLED for (int i = 0; i < 6; i++) p = _mm512_fmadd_ps(p, f, all(series[i]));
    return _mm512_scalef_ps(p, n);
}

// The sum of the elements of each of 4 vectors, which are no array, for those would be kept in memory
inline __m128 sums_of_4(Floats v0, Floats v1, Floats v2, Floats v3) {
    const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(v0, v1), _mm512_unpackhi_ps(v0, v1));
    const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(v2, v3), _mm512_unpackhi_ps(v2, v3));
    const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
    const __m512 all =
        _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)), _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

inline void store_4(float* y, __m128 x) { _mm_storeu_ps(y, x); }

// The sum of the elements of each of LANES vectors, which are lost
inline Floats sums_of_all(Floats* v) {
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

// Most rows that share one pass over weights, vectors of outputs that are summed at a time for M of them, and outputs
// where weights lie row by row: as many sums as there are registers, with room for weights and inputs
constexpr int ROWS = 6;
constexpr int output_vectors(int) { return 4; }
constexpr int outputs_by_row(int) { return 4; }

// LANES pairs of numbers in bfloat16
using Pairs = __m512i;

inline Pairs load_pairs(const uint32_t* x) { return _mm512_loadu_si512(x); }
inline void store_pairs(uint32_t* y, Pairs x) { _mm512_storeu_si512(y, x); }

#ifdef ROWS_IN_BF16
// Rows of inputs stay in bfloat16.
using Input = bf16;
using Numbers = __m512i;
constexpr int NUMBERS = 32;

inline __mmask32 first_of_32(int64_t n) { return n >= 32 ? ~0u : (1u << n) - 1; }

inline Numbers load_numbers(const bf16* x) { return _mm512_loadu_si512(x); }
inline Numbers load_numbers(const bf16* x, int64_t n) { return _mm512_maskz_loadu_epi16(first_of_32(n), x); }

inline Numbers load_numbers(const int8_t* x, int64_t n) {
    const __m256i integers = _mm256_maskz_loadu_epi8(first_of_32(n), x);
    const auto half = [](__m128i x) { return narrowed(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x))); };
    const __m256i low = half(_mm256_castsi256_si128(integers)), high = half(_mm256_extracti128_si256(integers, 1));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// sum + a b: each of the sums gets two products
inline Floats add_products(Floats sum, Numbers a, Numbers b) {
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

// Adds to sums, of M rows and V vectors of outputs, the products of a pair of inputs x, by `stride` bytes, with w.
template <int M, int V>
inline void add_pairs(Floats (&sums)[M][V], const uint32_t* w, const char* x, int64_t stride) {
    Numbers weights[V];
    UNROLLED for (int v = 0; v < V; v++) weights[v] = _mm512_loadu_si512(w + LANES * v);
    UNROLLED for (int m = 0; m < M; m++) {
        int pair;
        std::memcpy(&pair, x + m * stride, 4);
        UNROLLED for (int v = 0; v < V; v++) sums[m][v] = add_products(sums[m][v], weights[v], _mm512_set1_epi32(pair));
    }
}

inline Pairs int8_pairs(const int8_t* x) {
    return load_numbers(x, 32);
}
#endif

// What to look up pairs of 4-bit integers in: the values scale * i + minimum
using NibbleValues = __m512i;

inline NibbleValues nibble_values(float scale, float minimum) {
    const __m512 count = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_cvtepu16_epi32(narrowed(_mm512_add_ps(_mm512_mul_ps(count, all(scale)), all(minimum))));
}

inline Pairs nibble_pairs(const uint8_t* x, NibbleValues values) {  // low halves of bytes first
    const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)x));
    const __m512i even = _mm512_permutexvar_epi32(pairs, values);
    const __m512i odd = _mm512_permutexvar_epi32(_mm512_srli_epi32(pairs, 4), values);
    return _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
}

// Exchanges rows and columns of LANES vectors of pairs.
INLINED void transpose(Pairs* a) {
    __m512i b[16];
    UNROLLED for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    UNROLLED for (int i = 0; i < 16; i += 4)
        UNROLLED for (int j = 0; j < 2; j++) {
            a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
            a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
        }
    // a[4 i + c] has, in its quarter q, column 4 q + c of rows 4 i to 4 i + 3
    UNROLLED for (int c = 0; c < 4; c++) {
        const __m512i low_0 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88),
                      high_0 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xdd);
        const __m512i low_1 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88);
        const __m512i high_1 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xdd);
        b[c] = _mm512_shuffle_i32x4(low_0, low_1, 0x88);
        b[4 + c] = _mm512_shuffle_i32x4(high_0, high_1, 0x88);
        b[8 + c] = _mm512_shuffle_i32x4(low_0, low_1, 0xdd);
        b[12 + c] = _mm512_shuffle_i32x4(high_0, high_1, 0xdd);
    }
    UNROLLED for (int i = 0; i < 16; i++) a[i] = b[i];
}

// Integers of 16 bits, and sums of their products in 32 bits
using Shorts = __m512i;
using Integers = __m512i;

inline Integers no_products() { return _mm512_setzero_si512(); }
inline Shorts all_pairs(int32_t pair) { return _mm512_set1_epi32(pair); }
inline Shorts four_pairs(const int32_t* x) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)x)); }
inline Floats to_floats(Integers x) { return _mm512_cvtepi32_ps(x); }

// sum + a b: each of the sums gets two products
inline Integers add_integer_products(Integers sum, Shorts a, Shorts b) {
    return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
}

// LANES quads of integers of 8 bits, which have no signs
using Quads = Pairs;
constexpr int QUAD_SUMS = 12;  // that there are registers for

inline Quads without_signs(Quads x) { return _mm512_xor_si512(x, _mm512_set1_epi8(-128)); }  // each number and 128
inline Quads load_quads(const int8_t* x) { return without_signs(_mm512_loadu_si512(x)); }

// Numbers [d, d + 4 LANES) of a vector in 4 bits
inline Quads load_nibbles(const uint8_t* x, int64_t d) {
    const __m512i bytes = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)(x + d / 2)));
    const __m512i twice = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 1, 0, 1, 2, 3, 2, 3), bytes);
    const __m512i halves = _mm512_srlv_epi64(twice, _mm512_setr_epi64(0, 0, 4, 4, 0, 0, 4, 4));
    return _mm512_and_si512(halves, _mm512_set1_epi8(15));
}

// Numbers [4 s, 4 s + 4) of those whose codes lie in 32 bits: quads
inline Quads two_bits(Pairs x, int s) {
    return _mm512_and_si512(_mm512_srli_epi32(x, 2 * unsigned(s)), _mm512_set1_epi8(3));
}

// x, and 16 more where there is a bit
inline Quads add_fifth_bits(Quads x, const void* bits) {
    uint64_t there;
    std::memcpy(&there, bits, 8);
    return _mm512_mask_add_epi8(x, there, x, _mm512_set1_epi8(16));
}

// Exchanges rows and columns of LANES / 4 vectors of parts of 128 bits.
INLINED void transpose_parts(Quads* x) {
    const __m512i low = _mm512_shuffle_i32x4(x[0], x[1], 0x44), high = _mm512_shuffle_i32x4(x[0], x[1], 0xee);
    const __m512i low_2 = _mm512_shuffle_i32x4(x[2], x[3], 0x44), high_2 = _mm512_shuffle_i32x4(x[2], x[3], 0xee);
    x[0] = _mm512_shuffle_i32x4(low, low_2, 0x88), x[1] = _mm512_shuffle_i32x4(low, low_2, 0xdd);
    x[2] = _mm512_shuffle_i32x4(high, high_2, 0x88), x[3] = _mm512_shuffle_i32x4(high, high_2, 0xdd);
}

// The sums of the lanes of parts of 128 bits: lane 4 p + i has that of part p of vector i.
inline Integers sums_of_parts(Integers a, Integers b, Integers c, Integers d) {
    const __m512i first = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    const __m512i last = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(first, last), _mm512_unpackhi_epi64(first, last));
}

inline Shorts even_numbers(Quads x) { return _mm512_and_si512(x, _mm512_set1_epi16(255)); }
inline Shorts odd_numbers(Quads x) { return _mm512_srli_epi16(x, 8); }

#ifdef __AVX512VNNI__
#define LITGPT_BYTE_PRODUCTS
// sum + a b, where b has signs: each of the sums gets four products
inline Integers add_byte_products(Integers sum, Quads a, Shorts b) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));  // no intrinsic: GCC 12 copies its sums
    return sum;
}
inline Integers rounded_integers(Floats x) { return _mm512_cvtps_epi32(x); }
inline Integers shifted_left(Integers x, int bits) { return _mm512_slli_epi32(x, bits); }
inline Integers sum_of(Integers a, Integers b) { return _mm512_add_epi32(a, b); }

// 4 LANES integers x of 14 bits and a sign as bytes: 128 high + low
INLINED void store_bytes(int8_t* high, int8_t* low, const Integers* x) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512i upper[2], lower[2];
    UNROLLED for (int i = 0; i < 2; i++) {
        const __m512i both = _mm512_packs_epi32(x[2 * i], x[2 * i + 1]);
        upper[i] = _mm512_srai_epi16(_mm512_add_epi16(both, _mm512_set1_epi16(64)), 7);
        lower[i] = _mm512_sub_epi16(both, _mm512_slli_epi16(upper[i], 7));
    }
    _mm512_storeu_si512(high, _mm512_permutexvar_epi32(order, _mm512_packs_epi16(upper[0], upper[1])));
    _mm512_storeu_si512(low, _mm512_permutexvar_epi32(order, _mm512_packs_epi16(lower[0], lower[1])));
}
#endif

// The lower or the upper halves of 128 bits of 4 vectors, as two vectors of quads of a number of each; `store_in_order` puts sums
// of products of all four in the order of the numbers.
template <bool UPPER>
inline void interleave(const Quads* x, Quads& first, Quads& second) {
    const __m512i a = UPPER ? _mm512_unpackhi_epi8(x[0], x[1]) : _mm512_unpacklo_epi8(x[0], x[1]);
    const __m512i b = UPPER ? _mm512_unpackhi_epi8(x[2], x[3]) : _mm512_unpacklo_epi8(x[2], x[3]);
    first = _mm512_unpacklo_epi16(a, b), second = _mm512_unpackhi_epi16(a, b);
}

inline void store_in_order(float* y, Floats a, Floats b, Floats c, Floats d) {
    const Floats low = _mm512_shuffle_f32x4(a, b, 0x44), high = _mm512_shuffle_f32x4(a, b, 0xee);
    const Floats low_2 = _mm512_shuffle_f32x4(c, d, 0x44), high_2 = _mm512_shuffle_f32x4(c, d, 0xee);
    store(y, _mm512_shuffle_f32x4(low, low_2, 0x88)), store(y + 16, _mm512_shuffle_f32x4(low, low_2, 0xdd));
    store(y + 32, _mm512_shuffle_f32x4(high, high_2, 0x88)), store(y + 48, _mm512_shuffle_f32x4(high, high_2, 0xdd));
}

inline void store_rounded(int16_t* y, Floats x) {
    _mm256_storeu_si256((__m256i*)y, _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(x)));
}

// LANES pairs of numbers in bfloat16, `stride` numbers apart, of which there are n; zeros after the last
inline Pairs load_pairs(const bf16* x, int64_t stride, int64_t n) {
    const __mmask16 there = n >= LANES ? 0xffff : n > 0 ? __mmask16((1 << n) - 1) : 0;
    const __m512i count = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i index = _mm512_mullo_epi32(count, _mm512_set1_epi32(int(stride)));
    return _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), there, index, x, 2);
}

inline Floats firsts(Pairs x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
inline Floats seconds(Pairs x) { return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(int(0xffff0000)))); }
