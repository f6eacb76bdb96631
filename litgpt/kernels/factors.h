// Integers that quads of codes in 8 bits are multiplied with, in place of numbers: a query's, or weights of values.

#pragma once

#include "encoded.h"

// N numbers divided by the largest of them, as integers of 14 bits and a sign; N is a multiple of GROUP
template <int N>
struct Factors {
    static constexpr float LARGEST = 16319;  // 127 * 128 + 63
    int32_t first[N / 4], second[N / 4];
    float unit, total;  // what the integer 1 stands for, and the sum of all numbers

    INLINED void set(const Floats* x) {
        constexpr int VECTORS = N / LANES;
        Floats most = zeros();
        UNROLLED for (int i = 0; i < VECTORS; i++) most = greater(most, magnitude(x[i]));
        const float largest_one = largest(most);
        const Floats factor = all(largest_one > 0 ? LARGEST / largest_one : 0.0f);
        unit = largest_one / LARGEST;
#ifdef LITGPT_BYTE_PRODUCTS
        Integers sums = no_products();
        UNROLLED for (int i = 0; i < VECTORS; i += 4) {
            Integers y[4];
            UNROLLED for (int j = 0; j < 4; j++) y[j] = rounded_integers(x[i + j] * factor), sums = sum_of(sums, y[j]);
            store_bytes((int8_t*)first + i * LANES, (int8_t*)second + i * LANES, y);
        }
        total = sum(to_floats(sums)) * unit;
#else
        int16_t y[N], *even = (int16_t*)first, *odd = (int16_t*)second;
        UNROLLED for (int i = 0; i < VECTORS; i++) store_rounded(y + i * LANES, x[i] * factor);
        int32_t sum = 0;
        for (int i = 0; i < N; i++) sum += y[i];
        for (int i = 0; i < N / 2; i++) even[i] = y[2 * i], odd[i] = y[2 * i + 1];
        total = float(sum) * unit;
#endif
    }

    // Of numbers x times the scales of their codes. Returns what codes of 0 add: the sum of x times `least` (null: 0).
    template <class Scale>
    INLINED float set_scaled(const float* x, const Scale* scale, const Scale* least) {
        Floats scaled[N / LANES], base = zeros();
        UNROLLED for (int i = 0; i < N / LANES; i++) {
            const Floats own = load(x + i * LANES);
            scaled[i] = own * load(scale + i * LANES);
            if (least) base = multiply_add(own, load(least + i * LANES), base);
        }
        set(scaled);
        return sum(base);
    }
};

using QueryFactors = Factors<GROUP>;

// Those of a query (D,), D / GROUP of them
inline void set_factors(const Real* query, int64_t D, QueryFactors* factors) {
    for (int64_t d = 0; d < D; d += GROUP) {
        Floats x[GROUP / LANES];
        for (int i = 0; i < GROUP / LANES; i++) x[i] = load(query + d + i * LANES);
        factors[d / GROUP].set(x);
    }
}

// Sums of products of quads with factors
#ifdef LITGPT_BYTE_PRODUCTS
struct QuadSums {
    Integers high, low;

    void clear() { high = low = no_products(); }
    Integers integers() const { return sum_of(shifted_left(high, 7), low); }
    Floats floats() const { return to_floats(integers()); }
};

using Multiplied = Quads;

inline Multiplied multiplied(Quads x) { return x; }

inline void add_products_of(QuadSums& sums, Multiplied x, Shorts first, Shorts second) {
    sums.high = add_byte_products(sums.high, x, first);
    sums.low = add_byte_products(sums.low, x, second);
}
#else
struct QuadSums {
    Integers all;

    void clear() { all = no_products(); }
    Integers integers() const { return all; }
    Floats floats() const { return to_floats(all); }
};

struct Multiplied {
    Shorts even, odd;
};

inline Multiplied multiplied(Quads x) { return {even_numbers(x), odd_numbers(x)}; }

inline void add_products_of(QuadSums& sums, const Multiplied& x, Shorts first, Shorts second) {
    sums.all = add_integer_products(sums.all, x.even, first);
    sums.all = add_integer_products(sums.all, x.odd, second);
}
#endif

// With factors [4 i, 4 i + 4) in all lanes
template <int N>
inline void add_quad_products(QuadSums& sums, const Multiplied& x, const Factors<N>& factors, int i) {
    add_products_of(sums, x, all_pairs(factors.first[i]), all_pairs(factors.second[i]));
}
