// Any processor: vectors of 4 that the compiler maps to what it has

#pragma once

typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Integers __attribute__((vector_size(16)));
typedef uint32_t Pairs __attribute__((vector_size(16)));
constexpr int LANES = 4;

template <class T, class S>
inline T vector_at(const S* x) {
    T y;
    std::memcpy(&y, x, sizeof y);
    return y;
}

inline Floats zeros() { return Floats{}; }
inline Floats all(float x) { return Floats{x, x, x, x}; }
inline Floats load(const float* x) { return vector_at<Floats>(x); }
inline void store(float* y, Floats x) { std::memcpy(y, &x, sizeof x); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }
inline Floats greater(Floats a, Floats b) { return a > b ? a : b; }
inline Floats magnitude(Floats x) { return greater(x, -x); }
inline float largest(Floats x) { return std::max(std::max(x[0], x[1]), std::max(x[2], x[3])); }
inline float sum(Floats x) { return (x[0] + x[2]) + (x[1] + x[3]); }
inline Floats load(const bf16* x) { return Floats{widen(x[0]), widen(x[1]), widen(x[2]), widen(x[3])}; }

inline void store(bf16* y, Floats x) {
    for (int i = 0; i < LANES; i++) y[i] = narrow(x[i]);
}

inline Floats exponential(Floats x) {  // for x of at most 80; relative error below 3e-7
    return Floats{exponential(x[0]), exponential(x[1]), exponential(x[2]), exponential(x[3])};
}

// The sum of the elements of each of 4 vectors
inline Floats sums_of_4(Floats a, Floats b, Floats c, Floats d) { return Floats{sum(a), sum(b), sum(c), sum(d)}; }

inline void store_4(float* y, Floats x) { store(y, x); }

// The sum of the elements of each of LANES vectors
inline Floats sums_of_all(Floats* v) { return sums_of_4(v[0], v[1], v[2], v[3]); }

inline Floats load_numbers(const int8_t* x) { return Floats{float(x[0]), float(x[1]), float(x[2]), float(x[3])}; }

// Most rows that share one pass over weights, vectors of outputs that are summed at a time for M of them, and outputs
// where weights lie row by row: as many sums as there are registers, with room for weights and inputs
constexpr int ROWS = 5;
constexpr int output_vectors(int M) { return M == 1 ? 8 : M <= 3 ? 4 : 2; }
constexpr int outputs_by_row(int M) { return M <= 2 ? 4 : 2; }

// LANES pairs of numbers in bfloat16
inline Pairs load_pairs(const uint32_t* x) { return vector_at<Pairs>(x); }
inline void store_pairs(uint32_t* y, Pairs x) { std::memcpy(y, &x, sizeof x); }

template <class Value>
inline Pairs pairs_of(Value value) {
    Pairs y;
    for (int i = 0; i < LANES; i++) y[i] = uint32_t(narrow(value(2 * i))) | uint32_t(narrow(value(2 * i + 1))) << 16;
    return y;
}

inline Pairs int8_pairs(const int8_t* x) {
    return pairs_of([&](int i) { return float(x[i]); });
}

// What makes values of pairs of 4-bit integers: scale * i + minimum
struct NibbleValues {
    float scale, minimum;
};

inline NibbleValues nibble_values(float scale, float minimum) { return {scale, minimum}; }

inline Pairs nibble_pairs(const uint8_t* x, NibbleValues values) {  // low halves of bytes first
    return pairs_of([&](int i) { return float(x[i / 2] >> i % 2 * 4 & 15) * values.scale + values.minimum; });
}

// Exchanges rows and columns of LANES vectors of pairs.
INLINED void transpose(Pairs* a) {
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < i; j++) {
            const uint32_t before = a[i][j];
            a[i][j] = a[j][i], a[j][i] = before;
        }
}

// Integers of 16 bits, and sums of their products in 32 bits
typedef int16_t Shorts __attribute__((vector_size(16)));
constexpr int SHORTS = 8;

inline Integers no_products() { return Integers{}; }
inline Shorts load_shorts(const int16_t* x) { return vector_at<Shorts>(x); }
inline Shorts all_pairs(int32_t pair) { return vector_at<Shorts>(std::array<int32_t, 4>{pair, pair, pair, pair}.data()); }
inline Shorts four_pairs(const int32_t* x) { return vector_at<Shorts>(x); }
inline Floats to_floats(Integers x) { return __builtin_convertvector(x, Floats); }

// sum + a b: each of the sums gets two products
inline Integers add_integer_products(Integers sum, Shorts a, Shorts b) {
    for (int i = 0; i < LANES; i++) sum[i] += int32_t(a[2 * i]) * b[2 * i] + int32_t(a[2 * i + 1]) * b[2 * i + 1];
    return sum;
}

// The low and the high halves of SHORTS bytes
inline void split_nibbles(const uint8_t* x, Shorts& low, Shorts& high) {
    for (int i = 0; i < SHORTS; i++) low[i] = x[i] & 15, high[i] = x[i] >> 4;
}

// LANES quads of integers of 8 bits, which have no signs
using Quads = Pairs;
typedef uint8_t Bytes __attribute__((vector_size(16)));
constexpr int QUAD_SUMS = 8;  // that there are registers for

inline Quads without_signs(Quads x) { return x ^ 0x80808080u; }  // each number and 128
inline Quads load_quads(const int8_t* x) { return without_signs(vector_at<Quads>(x)); }

// Numbers [d, d + 4 LANES) of a vector in 4 bits
inline Quads load_nibbles(const uint8_t* x, int64_t d) {
    return vector_at<Quads>(x + d / 32 * 16) >> (d % 32 ? 4 : 0) & 0x0f0f0f0fu;
}

// Numbers [4 s, 4 s + 4) of those whose codes lie in 32 bits: quads
inline Quads two_bits(Pairs x, int s) { return x >> 2 * s & 0x03030303u; }

// x, and 16 more where there is a bit
inline Quads add_fifth_bits(Quads x, const void* bits) {
    uint16_t all;
    std::memcpy(&all, bits, 2);
    const Quads own{uint32_t(all), uint32_t(all >> 4), uint32_t(all >> 8), uint32_t(all >> 12)};
    return x | (own & 1u) << 4 | (own & 2u) << 11 | (own & 4u) << 18 | (own & 8u) << 25;
}

// Exchanges rows and columns of LANES / 4 vectors of parts of 128 bits.
inline void transpose_parts(Quads*) {}

// The sums of the lanes of parts of 128 bits: lane 4 p + i has that of part p of vector i.
inline Integers sums_of_parts(Integers a, Integers b, Integers c, Integers d) {
    const auto sum = [](Integers x) { return x[0] + x[1] + x[2] + x[3]; };
    return Integers{sum(a), sum(b), sum(c), sum(d)};
}

inline Shorts even_numbers(Quads x) { return (Shorts)(x & 0x00ff00ffu); }
inline Shorts odd_numbers(Quads x) { return (Shorts)(x >> 8 & 0x00ff00ffu); }

// The lower or the upper halves of 4 vectors, as two vectors of quads of a number of each; `store_in_order` puts sums of products
// of all four in the order of the numbers.
template <bool UPPER>
inline void interleave(const Quads* x, Quads& first, Quads& second) {
    Bytes y[2];
    for (int i = 0; i < 32; i++) y[i / 16][i % 16] = ((Bytes)x[i % 4])[(UPPER ? 8 : 0) + i / 4];
    first = (Quads)y[0], second = (Quads)y[1];
}

inline void store_in_order(float* y, Floats a, Floats b, Floats c, Floats d) {
    store(y, a), store(y + 4, b), store(y + 8, c), store(y + 12, d);
}

inline void store_rounded(int16_t* y, Floats x) {
    for (int i = 0; i < LANES; i++) y[i] = int16_t(std::nearbyint(x[i]));
}

// LANES pairs of numbers in bfloat16, `stride` numbers apart, of which there are n; zeros after the last
inline Pairs load_pairs(const bf16* x, int64_t stride, int64_t n) {
    Pairs y = {};
    for (int64_t i = 0; i < LANES && i < n; i++) y[i] = uint32_t(x[i * stride]) | uint32_t(x[i * stride + 1]) << 16;
    return y;
}

inline Floats firsts(Pairs x) { return (Floats)(x << 16); }
inline Floats seconds(Pairs x) { return (Floats)(x & 0xffff0000u); }

// LANES numbers in float16, of which there are n; zeros after the last
inline Floats load_halves(const uint16_t* x, int64_t n) {
    Floats y = {};
    for (int i = 0; i < LANES && i < n; i++) y[i] = from_half(x[i]);
    return y;
}
