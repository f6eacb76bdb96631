// Keys and values of caches in 2 bits, as litgpt/kvcache/storages/kivi.py describes them: how blocks of tokens are encoded, and
// tokens decoded.

#pragma once

#include "encoded.h"

constexpr int64_t WORD = 16;  // numbers whose codes lie in 32 bits: number 4 s + b in byte b, from bit 2 s on

inline int64_t words(int64_t n) { return (n + WORD - 1) / WORD; }

// How far the code of number i of a word has to be shifted down
inline int64_t code_shift(int64_t i) { return i % 4 * 8 + i / 4 * 2; }

// Numbers with a scale of their own and a least number
struct TwoBits {
    float least, step;
    bf16 scale, base;

    TwoBits(float smallest, float most) : base(narrow(smallest)) {
        least = widen(base);
        scale = narrow((most - least) / 3.0f);
        step = scale ? widen(scale) : 1.0f;
    }

    uint32_t code(float x) const { return uint32_t(std::max(0.0f, std::min(3.0f, std::nearbyint((x - least) / step)))); }
};

// Encodes the keys of a block of tokens: `key(j)` is that of token j. For each channel the tokens share a scale.
template <class Key>
void encode_keys(const Vectors& block, int64_t D, Key key) {
    const int64_t n = block.unit;
    float least[MAX_D], most[MAX_D];
    for (int64_t d = 0; d < D; d++) least[d] = most[d] = widen(key(0)[d]);
    for (int64_t j = 1; j < n; j++) {
        const bf16* x = key(j);
        for (int64_t d = 0; d < D; d++) {
            least[d] = std::min(least[d], widen(x[d]));
            most[d] = std::max(most[d], widen(x[d]));
        }
    }
    uint32_t* codes = (uint32_t*)block.codes;
    std::fill(codes, codes + words(D) * n, 0u);
    for (int64_t d = 0; d < D; d++) {
        const TwoBits own(least[d], most[d]);
        block.scales[d] = own.scale, block.scales[D + d] = own.base;
        least[d] = own.least, most[d] = own.step;
    }
    for (int64_t j = 0; j < n; j++) {
        const bf16* x = key(j);
        uint32_t code[MAX_D];
        for (int64_t d = 0; d < D; d++)
            code[d] = uint32_t(std::max(0.0f, std::min(3.0f, std::nearbyint((widen(x[d]) - least[d]) / most[d]))));
        for (int64_t d = 0; d < D; d++) codes[d / WORD * n + j] |= code[d] << code_shift(d % WORD);
    }
}

// Encodes the values of a block of tokens. For each token, `group` channels share a scale.
template <class Value>
void encode_values(const Vectors& block, int64_t D, Value value) {
    const int64_t n = block.unit, width = words(D) * WORD;
    uint32_t* codes = (uint32_t*)block.codes;
    std::fill(codes, codes + words(n) * width, 0u);
    for (int64_t j = 0; j < n; j++) {
        const bf16* x = value(j);
        float y[MAX_D];
        for (int64_t d = 0; d < D; d++) y[d] = widen(x[d]);
        for (int64_t d0 = 0; d0 < D; d0 += block.group) {
            const int64_t size = std::min(block.group, D - d0);
            const auto [smallest, most] = std::minmax_element(y + d0, y + d0 + size);
            const TwoBits own(*smallest, *most);
            bf16* scales = block.scales + d0 / block.group * 2 * n + j;
            scales[0] = own.scale, scales[n] = own.base;
            uint32_t* target = codes + j / WORD * width + d0;
            for (int64_t d = 0; d < size; d++) target[d] |= own.code(y[d0 + d]) << code_shift(j % WORD);
        }
    }
}

// The key of token `slot` of a head: x (D,)
inline void decode_key(const Vectors& head, int64_t slot, int64_t D, float* x) {
    const Vectors block = head.at(0, 0, slot);
    const int64_t j = slot % head.unit;
    for (int64_t d0 = 0; d0 < D; d0 += WORD) {
        const uint32_t word = ((const uint32_t*)block.codes)[d0 / WORD * head.unit + j];
        const int64_t size = std::min(WORD, D - d0);
        for (int64_t i = 0; i < size; i++)
            x[d0 + i] = float(word >> code_shift(i) & 3) * widen(block.scales[d0 + i]) + widen(block.scales[D + d0 + i]);
    }
}

// The value of token `slot` of a head: x (D,)
inline void decode_value(const Vectors& head, int64_t slot, int64_t D, float* x) {
    const Vectors block = head.at(0, 0, slot);
    const int64_t j = slot % head.unit, shift = code_shift(j % WORD);
    const uint32_t* codes = (const uint32_t*)block.codes + j / WORD * words(D) * WORD;
    for (int64_t d0 = 0; d0 < D; d0 += head.group) {
        const bf16* scales = block.scales + d0 / head.group * 2 * head.unit + j;
        const float scale = widen(scales[0]), least = widen(scales[head.unit]);
        const int64_t end = std::min(d0 + head.group, D);
        for (int64_t d = d0; d < end; d++) x[d] = float(codes[d] >> shift & 3) * scale + least;
    }
}
