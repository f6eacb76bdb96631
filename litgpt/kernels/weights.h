// Products of rows with large weights. For a few rows memory bandwidth is the limit: all threads read weights in order,
// and prefetch. For many rows arithmetic is the limit: a tile of the weights stays in the processor's cache.
//
// Letters: M rows, K inputs, N outputs. Each kind of weight computes TILE outputs at a time for up to ROWS rows. It may
// rearrange rows first (`prepare`; `row_bytes` is 0 where it takes them as they are). The output of a row does not
// depend on the other rows, to the last bit.

#pragma once

#include "numbers.h"

constexpr int ROWS = 6;       // most rows that share one pass over the weights: as many sums as there are registers
constexpr int ROW_TILE = 32;  // outputs of a tile, where weights lie row by row

// A weight of any kind: bfloat16 in oneDNN's order, int8, or int4 with its group size
struct Weight {
    int64_t kind, K, N, group;
    const void *w, *scale, *minimum;
    const bf16* bias;
};

// The weights of the next tile, which are prefetched while this one is computed: a share in each of its `passes`.
struct Prefetch {
    const void* start;  // null: there are none
    int pass, passes;   // 0 passes: nothing to prefetch
};

// bfloat16 in oneDNN's order for such CPUs: blocks of 64 outputs, within them pairs of inputs, K padded to 32
struct Blocked {
    static constexpr int TILE = 64, PASS = ROWS;
    const uint32_t* w;
    int64_t K, N;

    Blocked(const void* w, int64_t K, int64_t N) : w((const uint32_t*)w), K(K), N(N) {}
    explicit Blocked(const Weight& x) : Blocked(x.w, x.K, x.N) {}

    int64_t pairs() const { return (K + 31) / 32 * 16; }
    int64_t row_bytes() const { return K % 32 ? pairs() * 4 : 0; }
    void prepare(const bf16* x, char* row) const {
        std::memset(row, 0, row_bytes());
        std::memcpy(row, x, K * sizeof(bf16));
    }
    const void* at(int64_t u) const { return w + u * pairs() * TILE; }

    template <int M>
    void compute_tile(int64_t u, const char* x, int64_t stride, float* y, Prefetch ahead) const {
        const uint32_t* block = w + u * pairs() * TILE;
#ifdef __AVX512BW__
        __m512 sums[M][4];
        UNROLLED for (int m = 0; m < M; m++) UNROLLED for (int v = 0; v < 4; v++) sums[m][v] = _mm512_setzero_ps();
        int countdown = ahead.pass;
        for (int64_t p = 0; p < pairs(); p++, block += TILE) {
            if (ahead.start && countdown-- == 0) {
                prefetch((const uint32_t*)ahead.start + p * TILE, TILE * 4);
                countdown = ahead.passes - 1;
            }
            __m512i weights[4];
            UNROLLED for (int v = 0; v < 4; v++) weights[v] = _mm512_loadu_si512(block + 16 * v);
            UNROLLED for (int m = 0; m < M; m++) {
                int pair;
                std::memcpy(&pair, x + m * stride + 4 * p, 4);
                UNROLLED for (int v = 0; v < 4; v++) sums[m][v] =
                    add_products(sums[m][v], weights[v], _mm512_set1_epi32(pair));
            }
        }
        UNROLLED for (int m = 0; m < M; m++) UNROLLED for (int v = 0; v < 4; v++)
            _mm512_storeu_ps(y + m * TILE + 16 * v, sums[m][v]);
#else
        float sums[M][TILE] = {};
        for (int64_t p = 0; p < pairs(); p++, block += TILE)
            for (int m = 0; m < M; m++) {
                const bf16* row = (const bf16*)(x + m * stride);
                const float a = widen(row[2 * p]), b = widen(row[2 * p + 1]);
#pragma omp simd
                for (int j = 0; j < TILE; j++)
                    sums[m][j] += from_bits(block[j] << 16) * a + from_bits(block[j] & 0xffff0000u) * b;
            }
        std::memcpy(y, sums, sizeof sums);
#endif
    }
};

constexpr int LANES = 64;  // independent partial sums

// The sum over k of value(k) * x(k), with `K` values
template <class V, class X>
inline float sum_products(V value, X x, int64_t K) {
    float sums[LANES] = {};
    int64_t k = 0;
    for (; k + LANES <= K; k += LANES)
#pragma omp simd
        for (int l = 0; l < LANES; l++) sums[l] += value(k + l) * x(k + l);
    float sum = 0;
    for (int l = 0; l < LANES; l++) sum += sums[l];
    for (; k < K; k++) sum += value(k) * x(k);
    return sum;
}

// Weights that lie row by row. Four outputs are computed at a time; at the end the last one is repeated. A subclass has
// SIZE bytes for each number, `load` (32 numbers as bfloat16), `value` (one of them as float) and `factor` (of a row).
template <class W>
struct ByRow {
    static constexpr int TILE = ROW_TILE, PASS = ROWS;
    static constexpr int PREFETCH_ROWS = 16;  // distance

    const W& self() const { return *static_cast<const W*>(this); }
    const char* row(int64_t n) const { return (const char*)self().w + n * self().weight_bytes(); }
    const void* at(int64_t u) const { return row(u * TILE); }
    int64_t weight_bytes() const { return self().K * W::SIZE; }
    int64_t row_bytes() const { return 0; }
    void prepare(const bf16*, char*) const {}

    template <int M>
    void compute_tile(int64_t u, const char* x, int64_t stride, float* y, Prefetch ahead) const {
        for (int64_t i = 0; i < TILE && u * TILE + i < self().N; i += 4) {
            int64_t rows[4];
            for (int r = 0; r < 4; r++) rows[r] = std::min(u * TILE + i + r, self().N - 1);
            const char* next = ahead.passes ? row(u * TILE + i + PREFETCH_ROWS) : nullptr;
            if (ahead.start && ahead.pass == 1) next = (const char*)ahead.start + i * self().weight_bytes();
            self().template four_outputs<M>(rows, x, stride, y + i, next);
        }
    }

    template <int M>
    void four_outputs(const int64_t* n, const char* x, int64_t stride, float* y, const char* ahead) const {
        const int64_t K = self().K;
        const char* rows[4] = {row(n[0]), row(n[1]), row(n[2]), row(n[3])};
        const float factors[4] = {self().factor(n[0]), self().factor(n[1]), self().factor(n[2]), self().factor(n[3])};
#ifdef __AVX512BW__
        __m512 sums[M][4];
        UNROLLED for (int m = 0; m < M; m++) UNROLLED for (int r = 0; r < 4; r++) sums[m][r] = _mm512_setzero_ps();
        for (int64_t k = 0; k < K; k += 32) {
            const __mmask32 mask = k + 32 <= K ? ~0u : (1u << (K - k)) - 1;
            if (ahead) prefetch(ahead + 4 * W::SIZE * k, 128 * W::SIZE);
            __m512i weights[4];
            UNROLLED for (int r = 0; r < 4; r++) weights[r] = W::load(rows[r], k, mask);
            UNROLLED for (int m = 0; m < M; m++) {
                const __m512i inputs = _mm512_maskz_loadu_epi16(mask, x + m * stride + 2 * k);
                UNROLLED for (int r = 0; r < 4; r++) sums[m][r] = add_products(sums[m][r], weights[r], inputs);
            }
        }
        UNROLLED for (int m = 0; m < M; m++) {
            const __m128 totals = sums_of_4(sums[m][0], sums[m][1], sums[m][2], sums[m][3]);
            _mm_storeu_ps(y + m * TILE, _mm_mul_ps(totals, _mm_loadu_ps(factors)));
        }
#else
        for (int m = 0; m < M; m++)
            for (int r = 0; r < 4; r++) {
                const bf16* inputs = (const bf16*)(x + m * stride);
                y[m * TILE + r] = factors[r] * sum_products([&](int64_t k) { return W::value(rows[r], k); },
                                                            [&](int64_t k) { return widen(inputs[k]); }, K);
            }
#endif
    }
};

// bfloat16 row by row
struct Plain : ByRow<Plain> {
    static constexpr int SIZE = 2;
    const bf16* w;
    int64_t K, N;

    Plain(const bf16* w, int64_t K, int64_t N) : w(w), K(K), N(N) {}

    float factor(int64_t) const { return 1.0f; }
    static float value(const char* row, int64_t k) { return widen(((const bf16*)row)[k]); }
#ifdef __AVX512BW__
    static __m512i load(const char* row, int64_t k, __mmask32 mask) {
        return _mm512_maskz_loadu_epi16(mask, row + 2 * k);
    }
#endif
};

// 8-bit integers row by row, and a factor for every row: bfloat16 holds the integers exactly
struct Int8 : ByRow<Int8> {
    static constexpr int SIZE = 1;
    const int8_t* w;
    const float* scale;
    int64_t K, N;

    Int8(const int8_t* w, const float* scale, int64_t K, int64_t N) : w(w), scale(scale), K(K), N(N) {}
    explicit Int8(const Weight& x) : Int8((const int8_t*)x.w, (const float*)x.scale, x.K, x.N) {}

    float factor(int64_t n) const { return scale[n]; }
    static float value(const char* row, int64_t k) { return float(((const int8_t*)row)[k]); }
#ifdef __AVX512BW__
    static __m512i load(const char* row, int64_t k, __mmask32 mask) {
        const __m256i bytes = _mm256_maskz_loadu_epi8(mask, row + k);
        const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
        const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
#ifdef __AVX512BF16__
        return (__m512i)_mm512_cvtne2ps_pbh(high, low);
#else
        return _mm512_inserti64x4(_mm512_castsi256_si512(narrow_16(low)), narrow_16(high), 1);
#endif
    }
#endif
};

// Pairs of 4-bit integers row by row, even columns in the low halves, with a scale and a minimum (float16) for each
// group of columns, of which K is a multiple. A prepared row has, of every 64 columns, first the even ones; after all
// its values the sums of groups, for the products with minima.
template <int GROUP>
struct Int4 : ByRow<Int4<GROUP>> {
    static constexpr int TILE = ROW_TILE, PASS = 4;
    const uint8_t* w;
    const uint16_t *scale, *minimum;
    int64_t K, N;

    explicit Int4(const Weight& x)
        : w((const uint8_t*)x.w),
          scale((const uint16_t*)x.scale),
          minimum((const uint16_t*)x.minimum),
          K(x.K),
          N(x.N) {}

    int64_t groups() const { return K / GROUP; }
    int64_t weight_bytes() const { return K / 2; }
    int64_t value_bytes() const { return (K + 63) / 64 * 128; }
    int64_t row_bytes() const { return value_bytes() + (groups() + 15) / 16 * 64; }
    static int64_t place(int64_t k) { return k / 64 * 64 + k % 2 * 32 + k % 64 / 2; }
    void prepare(const bf16* x, char* row) const {
        std::memset(row, 0, row_bytes());
        bf16* values = (bf16*)row;
        float* sums = (float*)(row + value_bytes());
        for (int64_t k = 0; k < K; k++) values[place(k)] = x[k];
        for (int64_t g = 0; g < groups(); g++)
            for (int64_t k = g * GROUP; k < (g + 1) * GROUP; k++) sums[g] += widen(x[k]);
    }

    // Row n of the weight in bfloat16, (K,)
    void widen_row(int64_t n, bf16* y) const {
        const uint8_t* row = w + n * (K / 2);
        for (int64_t g = 0; g < groups(); g++) {
            const float a = from_half(scale[n * groups() + g]), b = from_half(minimum[n * groups() + g]);
#ifdef __AVX512BW__
            const __m512 count = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            const __m512 numbers = _mm512_add_ps(_mm512_mul_ps(count, _mm512_set1_ps(a)), _mm512_set1_ps(b));
            const __m512i rounded = _mm512_cvtepu16_epi32(narrow_16(numbers));  // the value of each integer
            for (int64_t k = g * GROUP; k < (g + 1) * GROUP; k += 32) {
                const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(row + k / 2)));
                const __m512i even = _mm512_permutexvar_epi32(pairs, rounded);
                const __m512i odd = _mm512_permutexvar_epi32(_mm512_srli_epi32(pairs, 4), rounded);
                _mm512_storeu_si512(y + k, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
            }
#else
            for (int64_t k = g * GROUP; k < (g + 1) * GROUP; k++)
                y[k] = narrow(float(row[k / 2] >> k % 2 * 4 & 15) * a + b);
#endif
        }
    }

    template <int M>
    void four_outputs(const int64_t* n, const char* x, int64_t stride, float* y, const char* ahead) const {
#ifdef __AVX512BW__
        // bfloat16 of 0 to 15, twice, since permutexvar looks up 5 bits
        const __m512i integers =
            _mm512_broadcast_i64x4(_mm256_setr_epi16(0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100,
                                                     0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170));
        const uint8_t* rows[4];
        UNROLLED for (int r = 0; r < 4; r++) rows[r] = w + n[r] * (K / 2);
        __m512 sums[M][4];
        UNROLLED for (int m = 0; m < M; m++) UNROLLED for (int r = 0; r < 4; r++) sums[m][r] = _mm512_setzero_ps();
        for (int64_t g0 = 0; g0 < groups(); g0 += 16) {
            const __mmask16 mask = g0 + 16 <= groups() ? 0xffff : (1 << (groups() - g0)) - 1;
            __m512 scales[4];
            UNROLLED for (int r = 0; r < 4; r++) {
                const int64_t at = n[r] * groups() + g0;
                scales[r] = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, scale + at));
                const __m512 minima = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, minimum + at));
                UNROLLED for (int m = 0; m < M; m++) {
                    const __m512 group_sums = _mm512_loadu_ps(x + m * stride + value_bytes() + 4 * g0);
                    sums[m][r] = _mm512_fmadd_ps(minima, group_sums, sums[m][r]);
                }
            }
            __m512i group = GROUP == 32 ? _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1)
                                        : _mm512_setzero_si512();  // of each lane, counted from g0
            for (int64_t k = g0 * GROUP; k < std::min(K, (g0 + 16) * GROUP); k += 64) {
                const bool whole = k + 64 <= K;
                if (ahead) prefetch(ahead + 2 * k, 128);
                UNROLLED for (int r = 0; r < 4; r++) {
                    const uint8_t* at = rows[r] + k / 2;
                    const __m256i bytes = whole ? _mm256_loadu_si256((const __m256i*)at)
                                                : _mm256_zextsi128_si256(_mm_loadu_si128((const __m128i*)at));
                    const __m512i words = _mm512_cvtepu8_epi16(bytes);
                    const __m512i even = _mm512_permutexvar_epi16(words, integers);
                    const __m512i odd = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), integers);
                    const __m512 factors = _mm512_permutexvar_ps(group, scales[r]);
                    UNROLLED for (int m = 0; m < M; m++) {
                        const char* values = x + m * stride + 2 * k;
                        __m512 part = add_products(_mm512_setzero_ps(), even, _mm512_loadu_si512(values));
                        part = add_products(part, odd, _mm512_loadu_si512(values + 64));
                        sums[m][r] = _mm512_fmadd_ps(part, factors, sums[m][r]);
                    }
                }
                if (GROUP < 128 || k % 128) group = _mm512_add_epi32(group, _mm512_set1_epi32(GROUP == 32 ? 2 : 1));
            }
        }
        UNROLLED for (int m = 0; m < M; m++)
            _mm_storeu_ps(y + m * TILE, sums_of_4(sums[m][0], sums[m][1], sums[m][2], sums[m][3]));
#else
        for (int m = 0; m < M; m++)
            for (int r = 0; r < 4; r++) {
                const bf16* values = (const bf16*)(x + m * stride);
                const float* group_sums = (const float*)(x + m * stride + value_bytes());
                const uint8_t* weights = w + n[r] * (K / 2);
                float total = 0;
                for (int64_t g = 0; g < groups(); g++) {
                    float even = 0, odd = 0;
                    for (int64_t i = g * GROUP / 2; i < (g + 1) * GROUP / 2; i++) {
                        const bf16* pair = values + i / 32 * 64 + i % 32;
                        even += float(weights[i] & 15) * widen(pair[0]);
                        odd += float(weights[i] >> 4) * widen(pair[32]);
                    }
                    const int64_t at = n[r] * groups() + g;
                    total += from_half(scale[at]) * (even + odd) + from_half(minimum[at]) * group_sums[g];
                }
                y[m * TILE + r] = total;
            }
#endif
    }
};

// Calls `f` with the weight as its own type; 4-bit integers are an `Int4Type`, constructed with `more`.
template <template <int> class Int4Type, class F, class... More>
void with_weight(const Weight& w, F f, More&... more) {
    if (w.kind == 0) return f(Blocked(w));
    if (w.kind == 1) return f(Int8(w));
    if (w.group == 32) return f(Int4Type<32>(w, more...));
    if (w.group == 64) return f(Int4Type<64>(w, more...));
    f(Int4Type<128>(w, more...));
}

// Rows prepared for a weight, with a stride in bytes
struct Rows {
    const char* start;
    int64_t stride;
};

template <class W>
int64_t stride_of_rows(const W& w) {
    return w.row_bytes() ? (w.row_bytes() + 63) / 64 * 64 : w.K * int64_t(sizeof(bf16));
}

template <class W>
Rows rows_for(const W& w, const bf16* x, int64_t M, Scratch<char>& scratch) {
    const int64_t stride = stride_of_rows(w);
    if (w.row_bytes() == 0) return {(const char*)x, stride};
    char* start = scratch.get(M * stride);
    for (int64_t m = 0; m < M; m++) w.prepare(x + m * w.K, start + m * stride);
    return {start, stride};
}

// Outputs of tile u for up to PASS rows from row m on.
template <class W>
void compute_tile(const W& w, int64_t u, const Rows& x, int64_t m, int rows, float* y,
                  Prefetch ahead = {nullptr, 0, 0}) {
    const char* start = x.start + m * x.stride;
    switch (rows) {
        case 1:
            return w.template compute_tile<1>(u, start, x.stride, y, ahead);
        case 2:
            return w.template compute_tile<2>(u, start, x.stride, y, ahead);
        case 3:
            return w.template compute_tile<3>(u, start, x.stride, y, ahead);
        case 4:
            return w.template compute_tile<4>(u, start, x.stride, y, ahead);
    }
    if constexpr (W::PASS == ROWS) {
        if (rows == 5) return w.template compute_tile<5>(u, start, x.stride, y, ahead);
        if (rows == 6) return w.template compute_tile<6>(u, start, x.stride, y, ahead);
    }
}

template <class W>
int64_t n_tiles(const W& w) {
    return (w.N + W::TILE - 1) / W::TILE;
}

// Calls f(u, m, rows, pass, passes) for all tiles u and passes over M rows, which have about the same size; called by
// all threads of a team.
template <class W, class F>
void in_passes(const W& w, int64_t M, F f) {
    const int64_t passes = (M + W::PASS - 1) / W::PASS;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < n_tiles(w) * passes; i++) {
        const int64_t pass = i % passes, m = M * pass / passes;
        f(i / passes, m, int(M * (pass + 1) / passes - m), int(pass), int(passes));
    }
}

// What to prefetch in a pass over tile u
template <class W>
Prefetch next_tile(const W& w, int64_t u, int pass, int passes) {
    return {passes > 1 && u + 1 < n_tiles(w) ? w.at(u + 1) : nullptr, pass, passes};
}

// y (n,) = values + bias
inline void store_row(const float* values, const bf16* bias, bf16* y, int64_t n) {
    if (bias)
        for (int64_t j = 0; j < n; j++) y[j] = narrow(values[j] + widen(bias[j]));
    else
        for (int64_t j = 0; j < n; j++) y[j] = narrow(values[j]);
}

// x (M, K) w^T, called by all threads of a team: f(m, first, size, values) gets outputs [first, first + size) of row m.
template <class W, class F>
void product(const W& w, const Rows& x, int64_t M, F f) {
    constexpr int TILE = W::TILE;
    in_passes(w, M, [&](int64_t u, int64_t m0, int rows, int pass, int passes) {
        float values[ROWS * TILE];
        compute_tile(w, u, x, m0, rows, values, next_tile(w, u, pass, passes));
        const int64_t first = u * TILE, size = std::min<int64_t>(TILE, w.N - first);
        for (int m = 0; m < rows; m++) f(m0 + m, first, size, values + m * TILE);
    });
}

// y (M, N) = x (M, K) w^T + bias, called by all threads of a team
template <class W>
void product(const W& w, const Rows& x, const bf16* bias, bf16* y, int64_t M) {
    product(w, x, M, [&](int64_t m, int64_t first, int64_t size, const float* values) {
        store_row(values, bias ? bias + first : nullptr, y + m * w.N + first, size);
    });
}

template <class W>
void linear(const W& w, const bf16* x, const bf16* bias, bf16* y, int64_t M) {
    static thread_local Scratch<char> scratch;
    const Rows rows = rows_for(w, x, M, scratch);
#pragma omp parallel
    product(w, rows, bias, y, M);
}

// y (n,) = activation(gates) * ups
inline void activate_row(const float* gates, const float* ups, bf16* y, int64_t n, int kind) {
    const auto all = [&](auto activation) {
#pragma omp simd
        for (int64_t j = 0; j < n; j++) y[j] = narrow(activation(gates[j]) * ups[j]);
    };
    if (kind == SILU) all([](float x) { return activate(x, SILU); });
    if (kind == GELU) all([](float x) { return activate(x, GELU); });
    if (kind == GELU_TANH) all([](float x) { return activate(x, GELU_TANH); });
}

// inner (M, I) = activation(x gate^T) * (x up^T), called by all threads of a team
template <class W>
void gated(const W& gate, const W& up, const Rows& x, bf16* inner, int64_t M, int kind) {
    constexpr int TILE = W::TILE;
    in_passes(gate, M, [&](int64_t u, int64_t m0, int rows, int pass, int passes) {
        float gates[ROWS * TILE], ups[ROWS * TILE];
        compute_tile(gate, u, x, m0, rows, gates, next_tile(gate, u, pass, passes));
        compute_tile(up, u, x, m0, rows, ups, next_tile(up, u, pass, passes));
        const int64_t first = u * TILE, size = std::min<int64_t>(TILE, gate.N - first);
        for (int m = 0; m < rows; m++)
            activate_row(gates + m * TILE, ups + m * TILE, inner + (m0 + m) * gate.N + first, size, kind);
    });
}
