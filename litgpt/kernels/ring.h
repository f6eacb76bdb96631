// Slots whose tokens the new ones replace while they still see them, as in a cache of the last tokens: for the attention of one
// layer, what such slots hold is copied, and the new tokens follow.

#pragma once

#include "layers.h"

// Keys and values of n_old earlier tokens and the T new ones of a segment, head by head
struct Ring {
    Vectors source[2], copy[2];  // where the kind is PLAIN, codes are bfloat16 numbers
    int64_t row, G, D, N;
    const int64_t* slots;
    int64_t n_old;

    // `memory` has `bytes(...)`, at a multiple of 64.
    Ring(const Layer& layer, const Segment& s, int64_t G, int64_t D, char* memory)
        : row(s.row), G(G), D(D), N(s.N), slots(s.old), n_old(s.n_old) {
        for (int i = 0; i < 2; i++) {
            source[i] = copy[i] = vectors(layer, i, D);
            const int64_t code = source[i].strides[2], scales = source[i].scale_strides[2];
            copy[i].codes = memory, memory += rounded(G * N * code);
            copy[i].scales = (bf16*)memory, memory += rounded(G * N * scales * int64_t(sizeof(bf16)));
            copy[i].strides[1] = N * code, copy[i].scale_strides[1] = N * scales;
        }
    }

    static int64_t bytes(const Layer& layer, const Segment& s, int64_t G, int64_t D) {
        int64_t sum = 0;
        for (int i = 0; i < 2; i++) {
            const Vectors v = vectors(layer, i, D);
            sum += rounded(G * s.N * v.strides[2]) + rounded(G * s.N * v.scale_strides[2] * int64_t(sizeof(bf16)));
        }
        return sum;
    }

    // Copies what the slots hold; called by all threads of a team.
    void copy_old() const {
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < n_old * 2 * G; i++) {
            const int64_t side = i / (n_old * G), g = i / n_old % G, j = i % n_old;
            const Vectors from = source[side].at(row, g, slots[j]), to = copy[side].at(0, g, j);
            std::memcpy(to.codes, from.codes, from.strides[2]);
            std::memcpy(to.scales, from.scales, from.scale_strides[2] * sizeof(bf16));
        }
    }

    // Adds the new tokens, whose keys and values are `width` numbers apart; called by all threads of a team.
    void add_new(const bf16* keys, int64_t width) const {
#pragma omp for schedule(static) nowait
        for (int64_t t = 0; t < N - n_old; t++)
            for (int64_t i = 0; i < 2 * G; i++) {
                const Vectors to = copy[i / G].at(0, i % G, n_old + t);
                const bf16* x = keys + t * width + i * D;
                if (to.kind)
                    encode(to, x, D);
                else
                    std::memcpy(to.codes, x, D * sizeof(bf16));
            }
    }

private:
    static int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

    static Vectors vectors(const Layer& layer, int side, int64_t D) {
        if (layer.encoded[0].kind) return layer.encoded[side];
        bf16* start = side ? layer.values : layer.keys;
        return {(char*)start, start, PLAIN, 0, {2 * layer.row_stride, 2 * layer.head_stride, 2 * D}, {0, 0, 0}};
    }
};
