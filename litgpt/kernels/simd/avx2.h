// AVX2 with FMA and F16C

#pragma once

#include <immintrin.h>

using Floats = __m256;
constexpr int LANES = 8;

inline Floats zeros() { return _mm256_setzero_ps(); }
inline Floats all(float x) { return _mm256_set1_ps(x); }
inline Floats load(const float* x) { return _mm256_loadu_ps(x); }
inline void store(float* y, Floats x) { _mm256_storeu_ps(y, x); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats greater(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Floats magnitude(Floats x) { return _mm256_andnot_ps(all(-0.0f), x); }

inline float largest(Floats x) {
    __m128 most = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    most = _mm_max_ps(most, _mm_movehl_ps(most, most));
    return _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)));
}

inline float sum(Floats x) {
    __m128 sums = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    sums = _mm_add_ps(sums, _mm_movehl_ps(sums, sums));
    return _mm_cvtss_f32(_mm_add_ss(sums, _mm_movehdup_ps(sums)));
}

inline Floats load(const bf16* x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)x)), 16));
}

inline __m256i rounded(Floats x) {  // the upper halves as `narrow`, for numbers that are not NaN
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
}

inline void store(bf16* y, Floats x) {
    const __m256i high = _mm256_srli_epi32(rounded(x), 16);
    const __m128i both = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    _mm_storeu_si128((__m128i*)y, both);
}

inline Floats exponential(Floats x) {    // for x of at most 80; relative error below 3e-7
    x = _mm256_max_ps(all(-200.0f), x);  // in this order NaN stays
    const Floats log2 = all(1.44269504f);
    const Floats n = _mm256_round_ps(_mm256_mul_ps(x, log2), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Floats f = _mm256_fmsub_ps(x, log2, n);
    const float series[] = {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f};
    Floats p = all(1.5403530e-4f);  // 2^f
    UNROLLED for (int i = 0; i < 6; i++) p = _mm256_fmadd_ps(p, f, all(series[i]));
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    const Floats small = _mm256_cmp_ps(x, all(-87.0f), _CMP_LT_OQ);  // 0
    return _mm256_andnot_ps(small, _mm256_mul_ps(p, _mm256_castsi256_ps(power)));
}

// The sum of the elements of each of 4 vectors
inline __m128 sums_of_4(Floats a, Floats b, Floats c, Floats d) {
    const Floats sums = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
}

inline void store_4(float* y, __m128 x) { _mm_storeu_ps(y, x); }

// The sum of the elements of each of LANES vectors
inline Floats sums_of_all(Floats* v) {
    return _mm256_set_m128(sums_of_4(v[4], v[5], v[6], v[7]), sums_of_4(v[0], v[1], v[2], v[3]));
}

inline Floats load_numbers(const int8_t* x) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)x)));
}

// Most rows that share one pass over weights, vectors of outputs that are summed at a time for M of them, and outputs
// where weights lie row by row: as many sums as there are registers, with room for weights and inputs
constexpr int ROWS = 5;
constexpr int output_vectors(int M) { return M == 1 ? 8 : M <= 3 ? 4 : 2; }
constexpr int outputs_by_row(int M) { return M <= 2 ? 4 : 2; }

// LANES pairs of numbers in bfloat16
using Pairs = __m256i;

inline Pairs load_pairs(const uint32_t* x) { return _mm256_loadu_si256((const __m256i*)x); }
inline void store_pairs(uint32_t* y, Pairs x) { _mm256_storeu_si256((__m256i*)y, x); }

// Pairs of the upper halves of numbers
inline Pairs pairs_of(__m256i even, __m256i odd) {
    return _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xaa);
}

inline Pairs int8_pairs(const int8_t* x) {
    const __m256i words = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)x));
    const __m256i even = _mm256_srai_epi32(_mm256_slli_epi32(words, 16), 16), odd = _mm256_srai_epi32(words, 16);
    return pairs_of(_mm256_castps_si256(_mm256_cvtepi32_ps(even)), _mm256_castps_si256(_mm256_cvtepi32_ps(odd)));
}

// What makes values of pairs of 4-bit integers: scale * i + minimum
struct NibbleValues {
    Floats scale, minimum;
};

inline NibbleValues nibble_values(float scale, float minimum) { return {all(scale), all(minimum)}; }

inline Pairs nibble_pairs(const uint8_t* x, NibbleValues values) {  // low halves of bytes first
    const __m256i pairs = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)x));
    const auto value = [&](__m256i i) {
        return rounded(_mm256_add_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(i), values.scale), values.minimum));
    };
    return pairs_of(value(_mm256_and_si256(pairs, _mm256_set1_epi32(15))), value(_mm256_srli_epi32(pairs, 4)));
}

// Exchanges rows and columns of LANES vectors of pairs.
INLINED void transpose(Pairs* a) {
    __m256i b[8], c[8];
    UNROLLED for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
    }
    UNROLLED for (int i = 0; i < 8; i += 4)
        UNROLLED for (int j = 0; j < 2; j++) {
            c[i + 2 * j] = _mm256_unpacklo_epi64(b[i + j], b[i + j + 2]);
            c[i + 2 * j + 1] = _mm256_unpackhi_epi64(b[i + j], b[i + j + 2]);
        }
    UNROLLED for (int i = 0; i < 4; i++) {
        a[i] = _mm256_permute2x128_si256(c[i], c[4 + i], 0x20);
        a[4 + i] = _mm256_permute2x128_si256(c[i], c[4 + i], 0x31);
    }
}

// Integers of 16 bits, and sums of their products in 32 bits
using Shorts = __m256i;
using Integers = __m256i;
constexpr int SHORTS = 16;

inline Integers no_products() { return _mm256_setzero_si256(); }
inline Shorts load_shorts(const int16_t* x) { return _mm256_loadu_si256((const __m256i*)x); }
inline Shorts all_pairs(int32_t pair) { return _mm256_set1_epi32(pair); }
inline Shorts four_pairs(const int32_t* x) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)x)); }
inline Floats to_floats(Integers x) { return _mm256_cvtepi32_ps(x); }

// sum + a b: each of the sums gets two products
inline Integers add_integer_products(Integers sum, Shorts a, Shorts b) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
}

// The low and the high halves of SHORTS bytes
inline void split_nibbles(const uint8_t* x, Shorts& low, Shorts& high) {
    const __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)x));
    low = _mm256_and_si256(bytes, _mm256_set1_epi16(15)), high = _mm256_srli_epi16(bytes, 4);
}

// LANES quads of integers of 8 bits, which have no signs
using Quads = Pairs;
constexpr int QUAD_SUMS = 8;  // that there are registers for

inline Quads without_signs(Quads x) { return _mm256_xor_si256(x, _mm256_set1_epi8(-128)); }  // each number and 128
inline Quads load_quads(const int8_t* x) { return without_signs(_mm256_loadu_si256((const __m256i*)x)); }

// Numbers [d, d + 4 LANES) of a vector in 4 bits
inline Quads load_nibbles(const uint8_t* x, int64_t d) {
    const __m128i bytes = _mm_loadu_si128((const __m128i*)(x + d / 2));
    return _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(bytes, 4), bytes), _mm256_set1_epi8(15));
}

// Numbers [4 s, 4 s + 4) of those whose codes lie in 32 bits: quads
inline Quads two_bits(Pairs x, int s) {
    return _mm256_and_si256(_mm256_srli_epi32(x, 2 * s), _mm256_set1_epi8(3));
}

// x, and 16 more where there is a bit
inline Quads add_fifth_bits(Quads x, const void* bits) {
    int32_t own;
    std::memcpy(&own, bits, 4);
    const __m256i bytes = _mm256_shuffle_epi8(
        _mm256_set1_epi32(own), _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303));
    const __m256i bit = _mm256_set1_epi64x(int64_t(0x8040201008040201));
    const __m256i there = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
    return _mm256_or_si256(x, _mm256_and_si256(there, _mm256_set1_epi8(16)));
}

// Exchanges rows and columns of LANES / 4 vectors of parts of 128 bits.
INLINED void transpose_parts(Quads* x) {
    const __m256i first = _mm256_permute2x128_si256(x[0], x[1], 0x20);
    x[1] = _mm256_permute2x128_si256(x[0], x[1], 0x31), x[0] = first;
}

// The sums of the lanes of parts of 128 bits: lane 4 p + i has that of part p of vector i.
inline Integers sums_of_parts(Integers a, Integers b, Integers c, Integers d) {
    return _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
}

inline Shorts even_numbers(Quads x) { return _mm256_and_si256(x, _mm256_set1_epi16(255)); }
inline Shorts odd_numbers(Quads x) { return _mm256_srli_epi16(x, 8); }

#ifdef __AVXVNNI__
#define LITGPT_BYTE_PRODUCTS
// sum + a b, where b has signs: each of the sums gets four products
inline Integers add_byte_products(Integers sum, Quads a, Shorts b) {
    return _mm256_dpbusd_avx_epi32(sum, a, b);
}
inline Integers rounded_integers(Floats x) { return _mm256_cvtps_epi32(x); }
inline Integers shifted_left(Integers x, int bits) { return _mm256_slli_epi32(x, bits); }
inline Integers sum_of(Integers a, Integers b) { return _mm256_add_epi32(a, b); }

// 4 LANES integers x of 14 bits and a sign as bytes: 128 high + low
INLINED void store_bytes(int8_t* high, int8_t* low, const Integers* x) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m256i upper[2], lower[2];
    UNROLLED for (int i = 0; i < 2; i++) {
        const __m256i both = _mm256_packs_epi32(x[2 * i], x[2 * i + 1]);
        upper[i] = _mm256_srai_epi16(_mm256_add_epi16(both, _mm256_set1_epi16(64)), 7);
        lower[i] = _mm256_sub_epi16(both, _mm256_slli_epi16(upper[i], 7));
    }
    _mm256_storeu_si256((__m256i*)high, _mm256_permutevar8x32_epi32(_mm256_packs_epi16(upper[0], upper[1]), order));
    _mm256_storeu_si256((__m256i*)low, _mm256_permutevar8x32_epi32(_mm256_packs_epi16(lower[0], lower[1]), order));
}
#endif

// The lower or the upper halves of 128 bits of 4 vectors, as two vectors of quads of a number of each; `store_in_order` puts sums
// of products of all four in the order of the numbers.
template <bool UPPER>
inline void interleave(const Quads* x, Quads& first, Quads& second) {
    const __m256i a = UPPER ? _mm256_unpackhi_epi8(x[0], x[1]) : _mm256_unpacklo_epi8(x[0], x[1]);
    const __m256i b = UPPER ? _mm256_unpackhi_epi8(x[2], x[3]) : _mm256_unpacklo_epi8(x[2], x[3]);
    first = _mm256_unpacklo_epi16(a, b), second = _mm256_unpackhi_epi16(a, b);
}

inline void store_in_order(float* y, Floats a, Floats b, Floats c, Floats d) {
    store(y, _mm256_permute2f128_ps(a, b, 0x20)), store(y + 8, _mm256_permute2f128_ps(c, d, 0x20));
    store(y + 16, _mm256_permute2f128_ps(a, b, 0x31)), store(y + 24, _mm256_permute2f128_ps(c, d, 0x31));
}

inline void store_rounded(int16_t* y, Floats x) {
    const __m256i integers = _mm256_cvtps_epi32(x);
    const __m128i low = _mm256_castsi256_si128(integers), high = _mm256_extracti128_si256(integers, 1);
    _mm_storeu_si128((__m128i*)y, _mm_packs_epi32(low, high));
}

// LANES pairs of numbers in bfloat16, `stride` numbers apart, of which there are n; zeros after the last
inline Pairs load_pairs(const bf16* x, int64_t stride, int64_t n) {
    int32_t pairs[LANES] = {};
    for (int64_t i = 0; i < LANES && i < n; i++) std::memcpy(pairs + i, x + i * stride, 4);
    return _mm256_loadu_si256((const __m256i*)pairs);
}

inline Floats firsts(Pairs x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)); }
inline Floats seconds(Pairs x) { return _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(int(0xffff0000)))); }

// LANES numbers in float16, of which there are n; zeros after the last
inline Floats load_halves(const uint16_t* x, int64_t n) {
    if (n >= LANES) return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)x));
    uint16_t padded[LANES] = {};
    std::memcpy(padded, x, n * sizeof(uint16_t));
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)padded));
}
