// The likeliest of many tokens.

#pragma once

#include "numbers.h"

// A number in bfloat16 as an integer of the same order, in which both zeros are equal
inline int16_t in_order(bf16 x) { return x == 0x8000 ? 0 : int16_t(x & 0x8000 ? x ^ 0x7fff : x); }

// Index of the largest of x (n,), the first of equal ones. -1: there is a NaN or inf, or nothing but -inf.
NOT_INLINED inline int64_t likeliest(const bf16* x, int64_t n) {
    constexpr int64_t BLOCK = 1024;  // in one of which the largest is searched
    constexpr int16_t INF = 0x7f80, MINUS_INF = -0x7f81;
    int16_t most = MINUS_INF, least = INF;
    int64_t at = 0;
    for (int64_t begin = 0; begin < n; begin += BLOCK) {
        int16_t own = MINUS_INF;
#pragma omp simd reduction(max : own) reduction(min : least)
        for (int64_t i = begin; i < std::min(n, begin + BLOCK); i++) own = std::max(own, in_order(x[i])), least = std::min(least, in_order(x[i]));
        if (own > most) most = own, at = begin;
    }
    if (most >= INF || most == MINUS_INF || least < MINUS_INF) return -1;
    while (in_order(x[at]) != most) at++;
    return at;
}
