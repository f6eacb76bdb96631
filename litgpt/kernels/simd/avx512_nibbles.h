// Dot products of 4-bit integers with rows in bfloat16, which holds the integers exactly
//
// A prepared row has, of every 64 columns, first the even ones; after all its values the sums of groups, for the
// products with minima.

#pragma once

constexpr int INT4_ROWS = 4;  // most rows that share one pass

inline int64_t int4_value_bytes(int64_t K) { return (K + 63) / 64 * 128; }
inline int64_t int4_row_bytes(int64_t K, int64_t groups) { return int4_value_bytes(K) + (groups + 15) / 16 * 64; }

template <int GROUP>
inline void prepare_int4(const bf16* x, int64_t K, char* row) {
    std::memset(row, 0, int4_row_bytes(K, K / GROUP));
    bf16* values = (bf16*)row;
    float* sums = (float*)(row + int4_value_bytes(K));
    for (int64_t k = 0; k < K; k++) values[k / 64 * 64 + k % 2 * 32 + k % 64 / 2] = x[k];
    for (int64_t g = 0; g < K / GROUP; g++)
        for (int64_t k = g * GROUP; k < (g + 1) * GROUP; k++) sums[g] += widen(x[k]);
}

// Products of 4 weights of K columns with M prepared rows: y[m * y_stride + r]. As many weights `ahead` are prefetched.
template <int GROUP, int M>
inline void int4_products(const uint8_t* const* w, const uint16_t* const* scales, const uint16_t* const* minima,
                          int64_t K, const char* x, int64_t stride, float* y, int64_t y_stride, const char* ahead) {
    // bfloat16 of 0 to 15, twice, since permutexvar looks up 5 bits
    const __m512i integers =
        _mm512_broadcast_i64x4(_mm256_setr_epi16(0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100,
                                                 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170));
    const int64_t groups = K / GROUP, value_bytes = int4_value_bytes(K);
    __m512 sums[M][4];
    UNROLLED for (int m = 0; m < M; m++) UNROLLED for (int r = 0; r < 4; r++) sums[m][r] = _mm512_setzero_ps();
    for (int64_t g0 = 0; g0 < groups; g0 += 16) {
        const __mmask16 mask = g0 + 16 <= groups ? 0xffff : (1 << (groups - g0)) - 1;
        __m512 factors[4];
        UNROLLED for (int r = 0; r < 4; r++) {
            factors[r] = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, scales[r] + g0));
            const __m512 least = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, minima[r] + g0));
            UNROLLED for (int m = 0; m < M; m++) {
                const __m512 group_sums = _mm512_loadu_ps(x + m * stride + value_bytes + 4 * g0);
                sums[m][r] = _mm512_fmadd_ps(least, group_sums, sums[m][r]);
            }
        }
        __m512i group = GROUP == 32 ? _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1)
                                    : _mm512_setzero_si512();  // of each lane, counted from g0
        for (int64_t k = g0 * GROUP; k < std::min(K, (g0 + 16) * GROUP); k += 64) {
            const bool whole = k + 64 <= K;
            if (ahead) prefetch(ahead + 2 * k, 128);
            UNROLLED for (int r = 0; r < 4; r++) {
                const uint8_t* at = w[r] + k / 2;
                const __m256i bytes = whole ? _mm256_loadu_si256((const __m256i*)at)
                                            : _mm256_zextsi128_si256(_mm_loadu_si128((const __m128i*)at));
                const __m512i words = _mm512_cvtepu8_epi16(bytes);
                const __m512i even = _mm512_permutexvar_epi16(words, integers);
                const __m512i odd = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), integers);
                const __m512 factor = _mm512_permutexvar_ps(group, factors[r]);
                UNROLLED for (int m = 0; m < M; m++) {
                    const char* values = x + m * stride + 2 * k;
                    __m512 part = add_products(_mm512_setzero_ps(), even, _mm512_loadu_si512(values));
                    part = add_products(part, odd, _mm512_loadu_si512(values + 64));
                    sums[m][r] = _mm512_fmadd_ps(part, factor, sums[m][r]);
                }
            }
            if (GROUP < 128 || k % 128) group = _mm512_add_epi32(group, _mm512_set1_epi32(GROUP == 32 ? 2 : 1));
        }
    }
    UNROLLED for (int m = 0; m < M; m++)
        _mm_storeu_ps(y + m * y_stride, sums_of_4(sums[m][0], sums[m][1], sums[m][2], sums[m][3]));
}
