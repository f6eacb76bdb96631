// NEON of 64-bit ARM, with and without its instructions for bfloat16

#pragma once

#include <arm_neon.h>

using Floats = float32x4_t;
constexpr int LANES = 4;

inline Floats zeros() { return vdupq_n_f32(0.0f); }
inline Floats all(float x) { return vdupq_n_f32(x); }
inline Floats load(const float* x) { return vld1q_f32(x); }
inline void store(float* y, Floats x) { vst1q_f32(y, x); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
inline Floats greater(Floats a, Floats b) { return vmaxq_f32(a, b); }
inline Floats magnitude(Floats x) { return vabsq_f32(x); }
inline float largest(Floats x) { return vmaxvq_f32(x); }
inline float sum(Floats x) { return vaddvq_f32(x); }

inline Floats load(const bf16* x) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(x), 16)); }

inline uint16x4_t narrowed(Floats x) {  // as `narrow`, for numbers that are not NaN
    const uint32x4_t bits = vreinterpretq_u32_f32(x);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    return vshrn_n_u32(vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd), 16);
}

inline void store(bf16* y, Floats x) { vst1_u16(y, narrowed(x)); }

inline Floats exponential(Floats x) {    // for x of at most 80; relative error below 3e-7
    x = vmaxq_f32(x, all(-200.0f));  // NaN stays
    const Floats n = vrndnq_f32(vmulq_n_f32(x, 1.44269504f));
    const Floats f = vfmaq_n_f32(vnegq_f32(n), x, 1.44269504f);
    const float series[] = {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f};
    Floats p = all(1.5403530e-4f);  // 2^f
    UNROLLED for (int i = 0; i < 6; i++) p = vfmaq_f32(all(series[i]), p, f);
    const int32x4_t power = vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23);
    const uint32x4_t small = vcltq_f32(x, all(-87.0f));  // 0
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(p * vreinterpretq_f32_s32(power)), small));
}

// The sum of the elements of each of 4 vectors
inline Floats sums_of_4(Floats a, Floats b, Floats c, Floats d) { return vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)); }

inline void store_4(float* y, Floats x) { vst1q_f32(y, x); }

// The sum of the elements of each of LANES vectors
inline Floats sums_of_all(Floats* v) { return sums_of_4(v[0], v[1], v[2], v[3]); }

inline uint16x8_t as_bf16(int16x8_t x) {  // integers that bfloat16 holds exactly
    const auto half = [](int16x4_t x) { return vshrn_n_u32(vreinterpretq_u32_f32(vcvtq_f32_s32(vmovl_s16(x))), 16); };
    return vcombine_u16(half(vget_low_s16(x)), half(vget_high_s16(x)));
}

#ifdef ROWS_IN_BF16
// Rows of inputs stay in bfloat16.
using Input = bf16;
using Numbers = uint16x8_t;
constexpr int NUMBERS = 8;

inline Numbers load_numbers(const bf16* x) { return vld1q_u16(x); }
inline Numbers load_numbers(const int8_t* x) { return as_bf16(vmovl_s8(vld1_s8(x))); }

// sum + a b: each of the sums gets two products
inline Floats add_products(Floats sum, Numbers a, Numbers b) {
    return vbfdotq_f32(sum, vreinterpretq_bf16_u16(a), vreinterpretq_bf16_u16(b));
}

// Adds to sums, of M rows and V vectors of outputs, the products of a pair of inputs x, by `stride` bytes, with w.
template <int M, int V>
inline void add_pairs(Floats (&sums)[M][V], const uint32_t* w, const char* x, int64_t stride) {
    Numbers weights[V];
    UNROLLED for (int v = 0; v < V; v++) weights[v] = vreinterpretq_u16_u32(vld1q_u32(w + LANES * v));
    UNROLLED for (int m = 0; m < M; m++) {
        uint32_t pair;
        std::memcpy(&pair, x + m * stride, 4);
        const Numbers inputs = vreinterpretq_u16_u32(vdupq_n_u32(pair));
        UNROLLED for (int v = 0; v < V; v++) sums[m][v] = add_products(sums[m][v], weights[v], inputs);
    }
}
#else
inline Floats load_numbers(const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four))))));
}
#endif

// Most rows that share one pass over weights, vectors of outputs that are summed at a time for M of them, and outputs
// where weights lie row by row: as many sums as there are registers, with room for weights and inputs
constexpr int ROWS = 6;
constexpr int output_vectors(int M) { return M <= 2 ? 8 : 4; }
constexpr int outputs_by_row(int) { return 4; }

// LANES pairs of numbers in bfloat16
using Pairs = uint32x4_t;

inline Pairs load_pairs(const uint32_t* x) { return vld1q_u32(x); }
inline void store_pairs(uint32_t* y, Pairs x) { vst1q_u32(y, x); }
inline Pairs int8_pairs(const int8_t* x) { return vreinterpretq_u32_u16(as_bf16(vmovl_s8(vld1_s8(x)))); }

// What makes values of pairs of 4-bit integers: scale * i + minimum
struct NibbleValues {
    Floats scale, minimum;
};

inline NibbleValues nibble_values(float scale, float minimum) { return {all(scale), all(minimum)}; }

inline Pairs nibble_pairs(const uint8_t* x, NibbleValues values) {  // low halves of bytes first
    uint32_t four;
    std::memcpy(&four, x, 4);
    const uint8x8_t bytes = vreinterpret_u8_u32(vdup_n_u32(four));
    const uint16x8_t integers = vmovl_u8(vzip1_u8(vand_u8(bytes, vdup_n_u8(15)), vshr_n_u8(bytes, 4)));
    const auto value = [&](uint16x4_t i) {
        return narrowed(vaddq_f32(vmulq_f32(vcvtq_f32_u32(vmovl_u16(i)), values.scale), values.minimum));
    };
    return vreinterpretq_u32_u16(vcombine_u16(value(vget_low_u16(integers)), value(vget_high_u16(integers))));
}

// Exchanges rows and columns of LANES vectors of pairs.
INLINED void transpose(Pairs* a) {
    const auto wide = [](uint32x4_t x) { return vreinterpretq_u64_u32(x); };
    const uint32x4_t b0 = vtrn1q_u32(a[0], a[1]), b1 = vtrn2q_u32(a[0], a[1]);
    const uint32x4_t b2 = vtrn1q_u32(a[2], a[3]), b3 = vtrn2q_u32(a[2], a[3]);
    a[0] = vreinterpretq_u32_u64(vtrn1q_u64(wide(b0), wide(b2)));
    a[1] = vreinterpretq_u32_u64(vtrn1q_u64(wide(b1), wide(b3)));
    a[2] = vreinterpretq_u32_u64(vtrn2q_u64(wide(b0), wide(b2)));
    a[3] = vreinterpretq_u32_u64(vtrn2q_u64(wide(b1), wide(b3)));
}

// Integers of 16 bits, and sums of their products in 32 bits. A pair is what is 4 apart.
using Shorts = int16x8_t;
using Integers = int32x4_t;
constexpr int SHORTS = 8;

inline Integers no_products() { return vdupq_n_s32(0); }
inline Shorts load_shorts(const int16_t* x) { return vld1q_s16(x); }
inline Shorts all_pairs(int32_t pair) { return vcombine_s16(vdup_n_s16(int16_t(pair)), vdup_n_s16(int16_t(pair >> 16))); }
inline Shorts four_pairs(const int32_t* x) {
    const int16x8_t pairs = vld1q_s16((const int16_t*)x);
    return vcombine_s16(vget_low_s16(vuzp1q_s16(pairs, pairs)), vget_low_s16(vuzp2q_s16(pairs, pairs)));
}
inline Floats to_floats(Integers x) { return vcvtq_f32_s32(x); }

// sum + a b: each of the sums gets two products
inline Integers add_integer_products(Integers sum, Shorts a, Shorts b) {
    return vmlal_high_s16(vmlal_s16(sum, vget_low_s16(a), vget_low_s16(b)), a, b);
}

// The low and the high halves of SHORTS bytes
inline void split_nibbles(const uint8_t* x, Shorts& low, Shorts& high) {
    const uint8x8_t bytes = vld1_u8(x);
    low = vreinterpretq_s16_u16(vmovl_u8(vand_u8(bytes, vdup_n_u8(15))));
    high = vreinterpretq_s16_u16(vmovl_u8(vshr_n_u8(bytes, 4)));
}

// LANES quads of integers of 8 bits, which have no signs
using Quads = Pairs;
constexpr int QUAD_SUMS = 16;  // that there are registers for

inline Quads without_signs(Quads x) { return veorq_u32(x, vdupq_n_u32(0x80808080u)); }  // each number and 128
inline Quads load_quads(const int8_t* x) { return without_signs(vreinterpretq_u32_s8(vld1q_s8(x))); }

// Numbers [d, d + 4 LANES) of a vector in 4 bits
inline Quads load_nibbles(const uint8_t* x, int64_t d) {
    const uint8x16_t bytes = vld1q_u8(x + d / 32 * 16);
    return vreinterpretq_u32_u8(d % 32 ? vshrq_n_u8(bytes, 4) : vandq_u8(bytes, vdupq_n_u8(15)));
}

// Numbers [4 s, 4 s + 4) of those whose codes lie in 32 bits: quads
inline Quads two_bits(Pairs x, int s) {
    return vandq_u32(vshlq_u32(x, vdupq_n_s32(-2 * s)), vdupq_n_u32(0x03030303u));
}

// x, and 16 more where there is a bit
inline Quads add_fifth_bits(Quads x, const void* bits) {
    const uint8_t* own = (const uint8_t*)bits;
    const uint8x16_t bit = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    const uint8x16_t there = vtstq_u8(vcombine_u8(vdup_n_u8(own[0]), vdup_n_u8(own[1])), bit);
    return vorrq_u32(x, vreinterpretq_u32_u8(vandq_u8(there, vdupq_n_u8(16))));
}

// Exchanges rows and columns of LANES / 4 vectors of parts of 128 bits.
inline void transpose_parts(Quads*) {}

// The sums of the lanes of parts of 128 bits: lane 4 p + i has that of part p of vector i.
inline Integers sums_of_parts(Integers a, Integers b, Integers c, Integers d) {
    return vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d));
}

inline Shorts four_apart(uint16x8_t x) { return vreinterpretq_s16_u16(vuzp1q_u16(x, vextq_u16(x, x, 1))); }
inline Shorts even_numbers(Quads x) { return four_apart(vandq_u16(vreinterpretq_u16_u32(x), vdupq_n_u16(255))); }
inline Shorts odd_numbers(Quads x) { return four_apart(vshrq_n_u16(vreinterpretq_u16_u32(x), 8)); }

// The lower or the upper halves of 4 vectors, as two vectors of quads of a number of each; `store_in_order` puts sums of products
// of all four in the order of the numbers.
template <bool UPPER>
inline void interleave(const Quads* x, Quads& first, Quads& second) {
    const auto bytes = [&](int i) { return vreinterpretq_u8_u32(x[i]); };
    const auto zip = [](uint8x16_t a, uint8x16_t b) {
        return vreinterpretq_u16_u8(UPPER ? vzip2q_u8(a, b) : vzip1q_u8(a, b));
    };
    const uint16x8_t a = zip(bytes(0), bytes(1)), b = zip(bytes(2), bytes(3));
    first = vreinterpretq_u32_u16(vzip1q_u16(a, b)), second = vreinterpretq_u32_u16(vzip2q_u16(a, b));
}

inline void store_in_order(float* y, Floats a, Floats b, Floats c, Floats d) {
    store(y, a), store(y + 4, b), store(y + 8, c), store(y + 12, d);
}

inline void store_rounded(int16_t* y, Floats x) { vst1_s16(y, vqmovn_s32(vcvtnq_s32_f32(x))); }

// LANES pairs of numbers in bfloat16, `stride` numbers apart, of which there are n; zeros after the last
inline Pairs load_pairs(const bf16* x, int64_t stride, int64_t n) {
    uint32_t pairs[LANES] = {};
    for (int64_t i = 0; i < LANES && i < n; i++) std::memcpy(pairs + i, x + i * stride, 4);
    return vld1q_u32(pairs);
}

inline Floats firsts(Pairs x) { return vreinterpretq_f32_u32(vshlq_n_u32(x, 16)); }
inline Floats seconds(Pairs x) { return vreinterpretq_f32_u32(vandq_u32(x, vdupq_n_u32(0xffff0000u))); }

// LANES numbers in float16, of which there are n; zeros after the last
inline Floats load_halves(const uint16_t* x, int64_t n) {
    uint16_t padded[LANES] = {};
    std::memcpy(padded, x, std::min<int64_t>(n, LANES) * sizeof(uint16_t));
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(padded)));
}
