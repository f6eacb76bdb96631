// Dot products of 4-bit integers with rows in 16 bits, where there is no faster way by instructions for bfloat16.
//
// A prepared row has, of every 32 columns, first the even ones, as integers of 16 bits; after all of them, for each group
// of columns, what 1 stands for; and then the sums of groups, for the products with minima.

#pragma once

constexpr int INT4_ROWS = 4;  // most rows that share one pass

inline int64_t int4_value_bytes(int64_t K) { return (K * 2 + 63) / 64 * 64; }
inline int64_t int4_group_bytes(int64_t groups) { return (groups + 15) / 16 * 64; }
inline int64_t int4_row_bytes(int64_t K, int64_t groups) { return int4_value_bytes(K) + 2 * int4_group_bytes(groups); }

template <int GROUP>
inline void prepare_int4(const bf16* x, int64_t K, char* row) {
    const int64_t groups = K / GROUP;
    std::memset(row, 0, int4_row_bytes(K, groups));
    int16_t* values = (int16_t*)row;
    float *units = (float*)(row + int4_value_bytes(K)), *sums = units + int4_group_bytes(groups) / 4;
    for (int64_t g = 0; g < groups; g++) {
        float own[GROUP], most = 0, total = 0;
        for (int i = 0; i < GROUP; i++) own[i] = widen(x[g * GROUP + i]);
        for (int i = 0; i < GROUP; i++) most = std::max(most, std::fabs(own[i]));
        for (int i = 0; i < GROUP; i++) total += own[i];
        const bool is_finite = std::fabs(total) <= 3e38f;
        const float factor = is_finite && most > 1e-30f ? 32767.0f / most : 0.0f;
        units[g] = is_finite ? most / 32767.0f : total - total;
        sums[g] = total;
        for (int i = 0; i < GROUP; i += 32)
            for (int j = 0; j < 16; j++) {
                values[g * GROUP + i + j] = int16_t(std::nearbyint(own[i + 2 * j] * factor));
                values[g * GROUP + i + 16 + j] = int16_t(std::nearbyint(own[i + 2 * j + 1] * factor));
            }
    }
}

// Products of R weights of K columns with M prepared rows: y[m][r]. As many weights `ahead` are prefetched.
template <int GROUP, int M, int R>
inline void int4_sums(const uint8_t* const* w, const uint16_t* const* scales, const uint16_t* const* minima, int64_t K,
                      const char* x, int64_t stride, const char* ahead, Floats (&sums)[M][R]) {
    const int64_t groups = K / GROUP, units_at = int4_value_bytes(K), sums_at = units_at + int4_group_bytes(groups);
    UNROLLED for (int m = 0; m < M; m++) UNROLLED for (int r = 0; r < R; r++) sums[m][r] = zeros();
    for (int64_t g0 = 0; g0 < groups; g0 += LANES) {
        const int64_t n = std::min<int64_t>(LANES, groups - g0);
        float factors[M][R][LANES];
        UNROLLED for (int r = 0; r < R; r++) {
            const Floats scale = load_halves(scales[r] + g0, n), minimum = load_halves(minima[r] + g0, n);
            UNROLLED for (int m = 0; m < M; m++) {
                const char* row = x + m * stride;
                store(factors[m][r], scale * load((const float*)(row + units_at) + g0));
                sums[m][r] = multiply_add(minimum, load((const float*)(row + sums_at) + g0), sums[m][r]);
            }
        }
        for (int64_t g = 0; g < n; g++)
            UNROLLED for (int i = 0; i < GROUP; i += 32) {
                const int64_t k = (g0 + g) * GROUP + i;
                if (ahead) prefetch(ahead + 2 * k, 64);
                UNROLLED for (int r = 0; r < R; r++) {
                    constexpr int PARTS = 16 / SHORTS;
                    Shorts low[PARTS], high[PARTS];
                    UNROLLED for (int p = 0; p < PARTS; p++)
                        split_nibbles(w[r] + k / 2 + p * SHORTS, low[p], high[p]);
                    UNROLLED for (int m = 0; m < M; m++) {
                        const int16_t* values = (const int16_t*)(x + m * stride) + k;
                        Integers part = no_products();
                        UNROLLED for (int p = 0; p < PARTS; p++) {
                            part = add_integer_products(part, low[p], load_shorts(values + p * SHORTS));
                            part = add_integer_products(part, high[p], load_shorts(values + 16 + p * SHORTS));
                        }
                        sums[m][r] = multiply_add(to_floats(part), all(factors[m][r][g]), sums[m][r]);
                    }
                }
            }
    }
}

// The same of 4 weights: y[m * y_stride + r]
template <int GROUP, int M>
inline void int4_products(const uint8_t* const* w, const uint16_t* const* scales, const uint16_t* const* minima, int64_t K,
                          const char* x, int64_t stride, float* y, int64_t y_stride, const char* ahead) {
    if constexpr (M <= 2) {
        Floats sums[M][4];
        int4_sums<GROUP, M, 4>(w, scales, minima, K, x, stride, ahead, sums);
        UNROLLED for (int m = 0; m < M; m++)
            store_4(y + m * y_stride, sums_of_4(sums[m][0], sums[m][1], sums[m][2], sums[m][3]));
    } else {
        Floats first[M][2], last[M][2];
        int4_sums<GROUP, M, 2>(w, scales, minima, K, x, stride, ahead, first);
        int4_sums<GROUP, M, 2>(w + 2, scales + 2, minima + 2, K, x, stride, nullptr, last);
        UNROLLED for (int m = 0; m < M; m++)
            store_4(y + m * y_stride, sums_of_4(first[m][0], first[m][1], last[m][0], last[m][1]));
    }
}
