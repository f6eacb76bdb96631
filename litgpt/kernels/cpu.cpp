// What a step of decoding consists of on a CPU: products of a few rows with large weights, and attention from a few
// queries. Both wait for memory, so everything here reads weights, keys and values once, in order, on all threads.
//
// Plain loops for the compiler to vectorise. Rows are bfloat16 outside and float inside. Letters as in attention.py; M rows,
// K inputs, N outputs.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

using bf16 = uint16_t;
constexpr int ROWS = 6;       // rows that share one pass over the weights
constexpr int ROW_UNIT = 32;  // outputs that one thread computes at a time, of weights that lie row by row

inline float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline float widen(bf16 x) { return from_bits(uint32_t(x) << 16); }

inline bf16 narrow(float x) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float exponential(float x) {  // relative error below 3e-7; 0 for what float cannot hold
    float n = std::floor(x * 1.44269504f + 0.5f);
    float f = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    float scale = from_bits(uint32_t((int32_t(std::max(n, -127.0f)) + 127) << 23));
    return x < -87.0f ? 0.0f : p * scale;
}

enum Activation { SILU = 0, GELU = 1, GELU_TANH = 2 };

inline float activate(float x, int kind) {
    if (kind == SILU) return x / (1.0f + exponential(std::min(-x, 80.0f)));
    if (kind == GELU) return 0.5f * x * (1.0f + std::erf(x * 0.70710678f));
    float inner = 1.59576912f * (x + 0.044715f * x * x * x);  // 0.5 (1 + tanh(z)) = 1 / (1 + exp(-2 z))
    return x / (1.0f + exponential(std::min(-inner, 80.0f)));
}

// A weight of any kind: bfloat16 in oneDNN's order, int8, or int4 with its group size
struct Weight {
    int64_t kind, K, N, group;
    const void *w, *scale, *minimum;
    const bf16* bias;
};

#ifdef __AVX512BF16__
using Narrow = bf16;  // what bfloat16 weights are multiplied with: here pairs of products are one instruction
#else
using Narrow = float;
#endif

inline void store(float x, float* target) { *target = x; }
inline void store(float x, bf16* target) { *target = narrow(x); }

// -- weights: each computes UNIT outputs y (M, UNIT) for M rows of x (`Input`), whose length is `inputs()` and whose element k is
// at `place(k)`

// bfloat16 in oneDNN's order for such CPUs: blocks of 64 outputs, within them pairs of inputs, K padded to 32
struct Blocked {
    using Input = Narrow;
    static constexpr int UNIT = 64;
    const uint32_t* w;
    int64_t K;

    Blocked(const uint32_t* w, int64_t K) : w(w), K(K) {}
    explicit Blocked(const Weight& x) : w((const uint32_t*)x.w), K(x.K) {}

    int64_t inputs() const { return (K + 31) / 32 * 32; }
    static int64_t place(int64_t k) { return k; }

    template <int M>
    void unit(int64_t u, const Narrow* x, int64_t stride, float* y) const {
        const int64_t pairs = inputs() / 2;
        const uint32_t* block = w + u * pairs * UNIT;
#ifdef __AVX512BF16__
        __m512 sums[M][4];  // with the weights, what the registers hold
        for (int m = 0; m < M; m++)
            for (int v = 0; v < 4; v++) sums[m][v] = _mm512_setzero_ps();
        for (int64_t p = 0; p < pairs; p++, block += UNIT) {
            __m512bh weights[4];
            for (int v = 0; v < 4; v++) weights[v] = (__m512bh)_mm512_loadu_si512(block + 16 * v);
            for (int m = 0; m < M; m++) {
                uint32_t pair;
                std::memcpy(&pair, x + m * stride + 2 * p, 4);
                const __m512bh inputs = (__m512bh)_mm512_set1_epi32(int(pair));
                for (int v = 0; v < 4; v++) sums[m][v] = _mm512_dpbf16_ps(sums[m][v], weights[v], inputs);
            }
        }
        for (int m = 0; m < M; m++)
            for (int v = 0; v < 4; v++) _mm512_storeu_ps(y + m * UNIT + 16 * v, sums[m][v]);
#else
        float sums[M][UNIT] = {};
        for (int64_t p = 0; p < pairs; p++, block += UNIT) {
            for (int m = 0; m < M; m++) {
                const float a = x[m * stride + 2 * p], b = x[m * stride + 2 * p + 1];
#pragma omp simd
                for (int j = 0; j < UNIT; j++)
                    sums[m][j] += from_bits(block[j] << 16) * a + from_bits(block[j] & 0xffff0000u) * b;
            }
        }
        std::memcpy(y, sums, sizeof sums);
#endif
    }
};

constexpr int LANES = 64;  // sums that are kept apart, so that additions need not wait for each other

// Sums over k of value(k) * x[m][k] for M rows, with `K` values.
template <int M, class V>
inline void row_sums(V value, int64_t K, const float* x, int64_t stride, float* y) {
    float sums[M][LANES] = {};
    int64_t k = 0;
    for (; k + LANES <= K; k += LANES)
        for (int m = 0; m < M; m++)
#pragma omp simd
            for (int l = 0; l < LANES; l++) sums[m][l] += value(k + l) * x[m * stride + k + l];
    for (int m = 0; m < M; m++) {
        float sum = 0;
        for (int l = 0; l < LANES; l++) sum += sums[m][l];
        for (int64_t rest = k; rest < K; rest++) sum += value(rest) * x[m * stride + rest];
        y[m * ROW_UNIT] = sum;
    }
}

// bfloat16 row by row
struct Plain {
    using Input = Narrow;
    static constexpr int UNIT = ROW_UNIT;
    const bf16* w;
    int64_t K, N;

    int64_t inputs() const { return K; }
    static int64_t place(int64_t k) { return k; }

    template <int M>
    void unit(int64_t u, const Narrow* x, int64_t stride, float* y) const {
        for (int64_t n = u * UNIT; n < std::min(N, (u + 1) * UNIT); n++, y++) {
            const bf16* row = w + n * K;
#ifdef __AVX512BF16__
            __m512 sums[M][2];
            for (int m = 0; m < M; m++) sums[m][0] = sums[m][1] = _mm512_setzero_ps();
            int64_t k = 0;
            for (; k + 64 <= K; k += 64)
                for (int i = 0; i < 2; i++) {
                    const __m512bh weights = (__m512bh)_mm512_loadu_si512(row + k + 32 * i);
                    for (int m = 0; m < M; m++)
                        sums[m][i] = _mm512_dpbf16_ps(sums[m][i], weights,
                                                      (__m512bh)_mm512_loadu_si512(x + m * stride + k + 32 * i));
                }
            for (int m = 0; m < M; m++) {
                float sum = _mm512_reduce_add_ps(_mm512_add_ps(sums[m][0], sums[m][1]));
                for (int64_t rest = k; rest < K; rest++) sum += widen(row[rest]) * widen(x[m * stride + rest]);
                y[m * UNIT] = sum;
            }
#else
            row_sums<M>([row](int64_t k) { return widen(row[k]); }, K, x, stride, y);
#endif
        }
    }
};

// 8-bit integers row by row, and a factor for every row
struct Int8 {
    using Input = float;
    static constexpr int UNIT = ROW_UNIT;
    const int8_t* w;
    const float* scale;
    int64_t K, N;

    Int8(const int8_t* w, const float* scale, int64_t K, int64_t N) : w(w), scale(scale), K(K), N(N) {}
    explicit Int8(const Weight& x) : Int8((const int8_t*)x.w, (const float*)x.scale, x.K, x.N) {}

    int64_t inputs() const { return K; }
    static int64_t place(int64_t k) { return k; }

    template <int M>
    void unit(int64_t u, const float* x, int64_t stride, float* y) const {
        for (int64_t n = u * UNIT; n < std::min(N, (u + 1) * UNIT); n++, y++) {
            const int8_t* row = w + n * K;
            row_sums<M>([row](int64_t k) { return float(row[k]); }, K, x, stride, y);
            for (int m = 0; m < M; m++) y[m * ROW_UNIT] *= scale[n];
        }
    }
};

// pairs of 4-bit integers row by row, even columns in the low halves, with a scale and a minimum (float16) for each group of
// columns, of which K is a multiple
template <int GROUP>
struct Int4 {
    using Input = float;
    static constexpr int UNIT = ROW_UNIT;
    const uint8_t* w;
    const uint16_t *scale, *minimum;
    int64_t K, N;

    explicit Int4(const Weight& x)
        : w((const uint8_t*)x.w), scale((const uint16_t*)x.scale), minimum((const uint16_t*)x.minimum), K(x.K), N(x.N) {}

    int64_t inputs() const { return (K + 63) / 64 * 64; }

    // Of every 64 columns, x has first each fourth one, so that a vector of x is what a shift of the integers gives.
    static int64_t place(int64_t k) { return k / 64 * 64 + k % 4 * 16 + k % 64 / 4; }

    static float half(uint16_t x) {  // no infinities
        return from_bits(uint32_t(x & 0x8000) << 16 | uint32_t(x & 0x7fff) << 13) * 5.192296858534828e33f;  // 2^112
    }

    template <int M>
    void unit(int64_t u, const float* x, int64_t stride, float* y) const {
        const int64_t groups = K / GROUP;
        for (int64_t n = u * UNIT; n < std::min(N, (u + 1) * UNIT); n++, y++) {
            const uint8_t* row = w + n * (K / 2);
            const uint16_t *scales = scale + n * groups, *minima = minimum + n * groups;
#ifdef __AVX512BW__
            const __m512 steps = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
            const __m512i low = _mm512_set1_epi32(15);
            // lanes 8 to 15 are columns 32 to 63, whose values are in the second table
            const __m512i table = _mm512_set_epi32(16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0);
            __m512 sums[M][2], first = steps, second = steps;  // the tables: what each integer stands for
            for (int m = 0; m < M; m++) sums[m][0] = sums[m][1] = _mm512_setzero_ps();
            for (int64_t k0 = 0; k0 < K; k0 += 64) {
                const auto values = [&](int64_t g) {
                    return _mm512_fmadd_ps(steps, _mm512_set1_ps(half(scales[g])), _mm512_set1_ps(half(minima[g])));
                };
                if (k0 % GROUP == 0) first = second = values(k0 / GROUP);
                const bool whole = k0 + 64 <= K;
                if (GROUP == 32 && whole) second = values(k0 / GROUP + 1);
                const __m256i bytes = _mm256_maskz_loadu_epi16(whole ? 0xffff : 0x00ff, row + k0 / 2);
                const __m512i words = _mm512_cvtepu16_epi32(bytes);
#pragma GCC unroll 4
                for (int s = 0; s < 4; s++) {
                    // (words >> 4 s) & 15 | table
                    const __m512i index = _mm512_ternarylogic_epi32(_mm512_srli_epi32(words, 4 * s), low, table, 0xea);
                    const __m512 v = _mm512_permutex2var_ps(first, index, second);
                    for (int m = 0; m < M; m++)
                        sums[m][s % 2] =
                            _mm512_fmadd_ps(v, _mm512_loadu_ps(x + m * stride + k0 + 16 * s), sums[m][s % 2]);
                }
            }
            for (int m = 0; m < M; m++) y[m * UNIT] = _mm512_reduce_add_ps(_mm512_add_ps(sums[m][0], sums[m][1]));
#else
            float sums[M] = {};
            for (int64_t g = 0; g < groups; g++) {
                const float a = half(scales[g]), b = half(minima[g]);
                for (int64_t k = g * GROUP; k < (g + 1) * GROUP; k++) {
                    const float v = float(row[k / 2] >> k % 2 * 4 & 15) * a + b;
                    for (int m = 0; m < M; m++) sums[m] += v * x[m * stride + place(k)];
                }
            }
            for (int m = 0; m < M; m++) y[m * UNIT] = sums[m];
#endif
        }
    }
};

template <class F>
void with_weight(const Weight& w, F f) {
    if (w.kind == 0) return f(Blocked(w));
    if (w.kind == 1) return f(Int8(w));
    if (w.group == 32) return f(Int4<32>(w));
    if (w.group == 64) return f(Int4<64>(w));
    f(Int4<128>(w));
}

// Rows as the weight wants them, padded with zeros.
template <class W>
const typename W::Input* rows_for(const W& w, const bf16* x, int64_t M, int64_t K, std::vector<float>& room) {
    const int64_t stride = w.inputs();
    room.assign(M * stride, 0.0f);
    auto* rows = (typename W::Input*)room.data();
    for (int64_t m = 0; m < M; m++)
        for (int64_t k = 0; k < K; k++) store(widen(x[m * K + k]), rows + m * stride + W::place(k));
    return rows;
}

template <class W>
void units(const W& w, int M, int64_t u, const typename W::Input* x, int64_t stride, float* y) {
    switch (M) {
        case 1: return w.template unit<1>(u, x, stride, y);
        case 2: return w.template unit<2>(u, x, stride, y);
        case 3: return w.template unit<3>(u, x, stride, y);
        case 4: return w.template unit<4>(u, x, stride, y);
        case 5: return w.template unit<5>(u, x, stride, y);
        default: return w.template unit<6>(u, x, stride, y);
    }
}

// y (M, N) = x (M, K) w^T + bias, called by all threads of a team
template <class W>
void product(const W& w, const typename W::Input* x, int64_t stride, const bf16* bias, bf16* y, int64_t M, int64_t N) {
    constexpr int UNIT = W::UNIT;
#pragma omp for schedule(static)
    for (int64_t u = 0; u < (N + UNIT - 1) / UNIT; u++) {
        float out[ROWS][UNIT];
        const int64_t first = u * UNIT, size = std::min<int64_t>(UNIT, N - first);
        for (int64_t m0 = 0; m0 < M; m0 += ROWS) {
            const int rows = int(std::min<int64_t>(ROWS, M - m0));
            units(w, rows, u, x + m0 * stride, stride, out[0]);
            for (int m = 0; m < rows; m++)
                for (int64_t j = 0; j < size; j++)
                    y[(m0 + m) * N + first + j] = narrow(out[m][j] + (bias ? widen(bias[first + j]) : 0.0f));
        }
    }
}

template <class W>
void linear(const W& w, const bf16* x, const bf16* bias, bf16* y, int64_t M, int64_t K, int64_t N) {
    static thread_local std::vector<float> room;
    const auto* rows = rows_for(w, x, M, K, room);
#pragma omp parallel
    product(w, rows, w.inputs(), bias, y, M, N);
}

// inner (M, I) = activation(x gate^T) * (x up^T), as `next` wants it, called by all threads of a team
template <class W, class Next>
void gated(const W& gate, const W& up, const Next& next, const typename W::Input* x, typename Next::Input* inner, int64_t M,
           int64_t I, int kind) {
    const int64_t stride = gate.inputs(), inner_stride = next.inputs();
    constexpr int UNIT = W::UNIT;
#pragma omp for schedule(static)
    for (int64_t u = 0; u < (I + UNIT - 1) / UNIT; u++) {
        float gates[ROWS][UNIT], ups[ROWS][UNIT];
        for (int64_t m0 = 0; m0 < M; m0 += ROWS) {
            const int rows = int(std::min<int64_t>(ROWS, M - m0));
            units(gate, rows, u, x + m0 * stride, stride, gates[0]);
            units(up, rows, u, x + m0 * stride, stride, ups[0]);
            for (int m = 0; m < rows; m++)
                for (int64_t j = 0; j < std::min<int64_t>(UNIT, I - u * UNIT); j++)
                    store(activate(gates[m][j], kind) * ups[m][j], inner + (m0 + m) * inner_stride + next.place(u * UNIT + j));
        }
    }
}

// -- attention

constexpr int SPLIT = 64;  // keys that one thread takes at a time
constexpr int MAX_D = 256;

#ifdef __AVX512F__
// The sum of the elements of each of 16 vectors
inline __m512 sums_of_16(__m512* v) {
    // halve the number of vectors four times, each new one with the partial sums of two in alternating places
    for (int i = 0; i < 8; i++)
        v[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    for (int i = 0; i < 4; i++) {
        const __m512d a = _mm512_castps_pd(v[2 * i]), b = _mm512_castps_pd(v[2 * i + 1]);
        v[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    for (int i = 0; i < 2; i++)
        v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(v[0], v[1], 0x88), _mm512_shuffle_f32x4(v[0], v[1], 0xdd));
}
#endif

// With AVX-512 a query's output is the same to the last bit whatever other queries and later keys, which it does not see, are in
// the call: guesses of tokens are checked in calls of many, and should stand or fall as if tokens came one by one. So all of
// SPLIT scores are summed always, and by one piece of code; compilers reorder sums as they see fit, in each place otherwise.

// Turns scores s (SPLIT,) into weights relative to the largest one, `top`; their sum.
__attribute__((noinline)) float weigh(float* s, float* top) {
    float most = -INFINITY, sum = 0;
#pragma omp simd reduction(max : most)
    for (int64_t j = 0; j < SPLIT; j++) most = std::max(most, s[j]);
    const float base = most == -INFINITY ? 0.0f : most;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < SPLIT; j++) {
        s[j] = exponential(s[j] - base);
        sum += s[j];
    }
    *top = most;
    return sum;
}

inline float multiply_add(float a, float b, float c) {  // in one step where there is an instruction: cannot be reordered
#ifdef __FP_FAST_FMAF
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// Attention from R queries (float, scaled) over keys [n0, n1): their maxima, sums and weighted values.
template <int R, int D0>
void attend_part(const float* q, const bf16* k, const bf16* v, int64_t k_stride, int64_t v_stride, const bf16* const* bias,
                 int64_t n, int64_t any_D, float cap, float* top, float* total, float* out) {
    const int64_t D = D0 ? D0 : any_D;
    float scores[R][SPLIT];
    int64_t done = 0;
#ifdef __AVX512F__
    if (D0)
        for (; done < n; done += 16) {
            __m512 sums[R][16];
            for (int j = 0; j < 16; j++) {
                const bf16* key = k + std::min(done + j, n - 1) * k_stride;  // after the last one, it again
                for (int64_t d = 0; d < D0; d += 16) {
                    const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(key + d)));
                    const __m512 keys = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
                    for (int r = 0; r < R; r++) {
                        const __m512 query = _mm512_loadu_ps(q + r * D0 + d);
                        sums[r][j] = d ? _mm512_fmadd_ps(keys, query, sums[r][j]) : _mm512_mul_ps(keys, query);
                    }
                }
            }
            for (int r = 0; r < R; r++) _mm512_storeu_ps(scores[r] + done, sums_of_16(sums[r]));
        }
#endif
    for (int64_t j = done; j < n; j++) {
        const bf16* key = k + j * k_stride;
        for (int r = 0; r < R; r++) {
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t d = 0; d < D; d++) sum += widen(key[d]) * q[r * D + d];
            scores[r][j] = sum;
        }
    }
    for (int r = 0; r < R; r++) {
        float* s = scores[r];
        if (cap > 0)
            for (int64_t j = 0; j < n; j++) s[j] = cap * std::tanh(s[j] / cap);
        if (bias[r])
            for (int64_t j = 0; j < n; j++) s[j] += widen(bias[r][j]);
        for (int64_t j = n; j < SPLIT; j++) s[j] = -INFINITY;
        total[r] = weigh(s, top + r);
    }
    float sums[R][D0 ? D0 : MAX_D] = {};
    for (int64_t j = 0; j < n; j++) {
        const bf16* value = v + j * v_stride;
        for (int r = 0; r < R; r++) {
            const float weight = scores[r][j];
#pragma omp simd
            for (int64_t d = 0; d < D; d++) sums[r][d] = multiply_add(weight, widen(value[d]), sums[r][d]);
        }
    }
    for (int r = 0; r < R; r++) std::memcpy(out + r * D, sums[r], D * sizeof(float));
}

template <int R>
void attend_rows(const float* q, const bf16* k, const bf16* v, int64_t k_stride, int64_t v_stride,
                 const bf16* const* bias, int64_t n, int64_t D, float cap, float* top, float* total, float* out) {
    if (D == 64) return attend_part<R, 64>(q, k, v, k_stride, v_stride, bias, n, D, cap, top, total, out);
    if (D == 128) return attend_part<R, 128>(q, k, v, k_stride, v_stride, bias, n, D, cap, top, total, out);
    attend_part<R, 0>(q, k, v, k_stride, v_stride, bias, n, D, cap, top, total, out);
}

// Attention of one call, in the order in which a team of threads does it: `parts`, then `combine`.
struct Attention {
    int64_t B, H, G, T, N, D;
    float cap;
    const bf16 *k, *v;
    int64_t k_strides[3], v_strides[3];  // of rows, heads, slots
    const bf16* bias;
    int64_t bias_strides[2];  // of rows, queries
    const bf16* sinks;
    float *queries, *sums, *tops, *totals;  // queries (B, H, T, D), scaled

    int64_t shared() const { return H / G * T; }  // queries that attend to the same keys
    int64_t splits() const { return (N + SPLIT - 1) / SPLIT; }
    int64_t room() const { return B * H * T * D + B * G * splits() * shared() * (D + 2); }

    void settle(float* room) {
        queries = room;
        sums = queries + B * H * T * D;
        tops = sums + B * G * splits() * shared() * D;
        totals = tops + B * G * splits() * shared();
    }

    void parts() const {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < B * G * splits(); i++) {
            const int64_t group = i / splits(), b = group / G, g = group % G, n0 = i % splits() * SPLIT;
            const int64_t n = std::min<int64_t>(SPLIT, N - n0);
            const bf16* keys = k + b * k_strides[0] + g * k_strides[1] + n0 * k_strides[2];
            const bf16* values = v + b * v_strides[0] + g * v_strides[1] + n0 * v_strides[2];
            for (int64_t r = 0; r < shared(); r += 4) {
                const int count = int(std::min<int64_t>(4, shared() - r));
                const bf16* rows_bias[4];
                for (int c = 0; c < count; c++)
                    rows_bias[c] = bias ? bias + b * bias_strides[0] + (r + c) % T * bias_strides[1] + n0 : nullptr;
                const int64_t at = i * shared() + r;
                const auto run = count == 1   ? attend_rows<1>
                                 : count == 2 ? attend_rows<2>
                                 : count == 3 ? attend_rows<3>
                                              : attend_rows<4>;
                run(queries + (group * shared() + r) * D, keys, values, k_strides[2], v_strides[2], rows_bias, n, D, cap,
                    tops + at, totals + at, sums + at * D);
            }
        }
    }

    void combine(bf16* y) const {  // (B, T, H, D)
#pragma omp for schedule(static)
        for (int64_t row = 0; row < B * H * T; row++) {
            const int64_t group = row / shared(), r = row % shared(), b = group / G, h = row / T % H, t = row % T;
            float most = sinks ? widen(sinks[h]) : -INFINITY, out[MAX_D] = {};
            for (int64_t s = 0; s < splits(); s++) most = std::max(most, tops[(group * splits() + s) * shared() + r]);
            float total = sinks ? exponential(widen(sinks[h]) - most) : 0.0f;
            for (int64_t s = 0; s < splits(); s++) {
                const int64_t at = (group * splits() + s) * shared() + r;
                const float factor = totals[at] > 0 ? exponential(tops[at] - most) : 0.0f;
                total += factor * totals[at];
                for (int64_t d = 0; d < D; d++) out[d] += factor * sums[at * D + d];
            }
            for (int64_t d = 0; d < D; d++) y[((b * T + t) * H + h) * D + d] = narrow(out[d] / total);
        }
    }
};

// -- all layers of a step

struct Shape {
    int64_t E, H, G, D, I, rope_n, interleave, activation, norm_all_heads;
    float eps, norm_offset, scale, cap, attention_factor, mlp_factor;
};

struct Layer {
    const bf16 *norm_1, *norm_q, *norm_k, *post_attention_norm, *norm_2, *post_mlp_norm, *sinks;
    bf16 *keys, *values;
    int64_t row_stride, head_stride;  // of keys and values; slots lie one after the other
    int64_t rope, plan;               // which of the step's; rope -1: none
    Weight qkv, proj, gate, up, down;
};

struct StepPlan {
    const int64_t* slots;  // (T,) or, if `slots_by_row`, (B, T)
    int64_t slots_by_row, first, N;
    const bf16* bias;
    int64_t bias_strides[2];
};

struct Rope {
    const bf16 *cos, *sin;  // (T, n) with a stride between rows of the batch, sines with their signs
    int64_t row_stride;
};

void norm_row(const bf16* x, const bf16* weight, bf16* y, int64_t size, float eps, float offset) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; i++) sum += widen(x[i]) * widen(x[i]);
    const float factor = 1.0f / std::sqrt(sum / float(size) + eps);
    for (int64_t i = 0; i < size; i++) y[i] = narrow(widen(x[i]) * factor * (widen(weight[i]) + offset));
}

// RoPE for one head in place: halves are pairs, or with `interleave` neighbours, which end up in halves
void turn(bf16* head, const bf16* cos, const bf16* sin, int64_t n, bool interleave) {
    float x[MAX_D], y[MAX_D];
    const int64_t half = n / 2;
    for (int64_t i = 0; i < n; i++) x[interleave ? i % 2 * half + i / 2 : i] = widen(head[i]);
    for (int64_t i = 0; i < half; i++) {
        y[i] = widen(narrow(x[i] * widen(cos[i]))) + x[i + half] * widen(sin[i]);
        y[i + half] = widen(narrow(x[i + half] * widen(cos[i + half]))) + x[i] * widen(sin[i + half]);
    }
    for (int64_t i = 0; i < n; i++) head[i] = narrow(y[i]);
}

// y (M, N) = x (M, K) w^T + bias by all threads of a team, each of which has widened all of x to its own `room`
void team_product(const Weight& w, const bf16* x, bf16* y, int64_t M, std::vector<float>& room) {
    with_weight(w, [&](auto weight) {
        const auto* rows = rows_for(weight, x, M, w.K, room);
        product(weight, rows, weight.inputs(), w.bias, y, M, w.N);
    });
}

// x += factor * norm(y), for rows that each thread has a copy of
void add_rows(std::vector<bf16>& x, const bf16* y, const bf16* norm, float factor, int64_t M, const Shape& shape,
              std::vector<bf16>& room) {
    const int64_t E = shape.E;
    if (norm) {
        room.resize(M * E);
        for (int64_t m = 0; m < M; m++) norm_row(y + m * E, norm, &room[m * E], E, shape.eps, shape.norm_offset);
        y = room.data();
    }
    for (int64_t i = 0; i < M * E; i++)
        x[i] = narrow(widen(x[i]) + (factor == 1.0f ? widen(y[i]) : widen(narrow(widen(y[i]) * factor))));
}

}  // namespace

extern "C" {

void linear_blocked(const bf16* x, const uint32_t* w, const bf16* bias, bf16* y, int64_t M, int64_t K, int64_t N) {
    linear(Blocked{w, K}, x, bias, y, M, K, N);
}

void linear_plain(const bf16* x, const bf16* w, const bf16* bias, bf16* y, int64_t M, int64_t K, int64_t N) {
    linear(Plain{w, K, N}, x, bias, y, M, K, N);
}

void linear_int8(const bf16* x, const int8_t* w, const float* scale, const bf16* bias, bf16* y, int64_t M, int64_t K,
                 int64_t N) {
    linear(Int8{w, scale, K, N}, x, bias, y, M, K, N);
}

void linear_int4(const bf16* x, const uint8_t* w, const uint16_t* scale, const uint16_t* minimum, const bf16* bias, bf16* y,
                 int64_t M, int64_t K, int64_t N, int64_t group) {
    with_weight(Weight{2, K, N, group, w, scale, minimum, bias}, [&](auto weight) { linear(weight, x, bias, y, M, K, N); });
}

// Gated MLP: `first` has the gate's I outputs and then as many more; I is a multiple of 64.
void gated_mlp_blocked(const bf16* x, const uint32_t* first, const uint32_t* second, bf16* y, int64_t M, int64_t K,
                       int64_t I, int64_t N, int kind) {
    static thread_local std::vector<float> room, inner_room;
    const Blocked gate{first, K}, up{first + I * gate.inputs() / 2, K}, down{second, I};
    const auto* rows = rows_for(gate, x, M, K, room);
    inner_room.assign(M * down.inputs(), 0.0f);
    auto* inner = (Narrow*)inner_room.data();
#pragma omp parallel
    {
        gated(gate, up, down, rows, inner, M, I, kind);
        product(down, (const Narrow*)inner, down.inputs(), (const bf16*)nullptr, y, M, N);
    }
}

void rms_norm(const bf16* x, const bf16* weight, bf16* y, int64_t rows, int64_t size, float eps, float offset) {
#pragma omp parallel for schedule(static) if (rows > 64)
    for (int64_t r = 0; r < rows; r++) norm_row(x + r * size, weight, y + r * size, size, eps, offset);
}

// q (B, H, T, D) and keys, values (B, G, N, D) by strides over all but the last dimension, bias (null: none) by strides over
// B, T; sinks (H,) or null; y (B, T, H, D). Scores are squashed into (-cap, cap) if that is positive.
void attend(const bf16* q, const bf16* k, const bf16* v, const bf16* bias, const bf16* sinks, bf16* y, int64_t B, int64_t H,
            int64_t G, int64_t T, int64_t N, int64_t D, const int64_t* strides, float scale, float cap) {
    static thread_local std::vector<float> room;
    const int64_t *qs = strides, *ks = strides + 3, *vs = strides + 6, *bs = strides + 9;
    Attention a{B, H, G, T, N, D, cap, k, v, {ks[0], ks[1], ks[2]}, {vs[0], vs[1], vs[2]}, bias, {bs[0], bs[1]}, sinks,
                nullptr, nullptr, nullptr, nullptr};
    room.resize(a.room());
    a.settle(room.data());
    for (int64_t b = 0; b < B; b++)
        for (int64_t h = 0; h < H; h++)
            for (int64_t t = 0; t < T; t++)
                for (int64_t d = 0; d < D; d++)
                    a.queries[((b * H + h) * T + t) * D + d] = widen(q[b * qs[0] + h * qs[1] + t * qs[2] + d]) * scale;
#pragma omp parallel
    {
        a.parts();
        a.combine(y);
    }
}

// x (B, T, E) through all layers, in place. Threads meet only where one needs what another has computed; what is small, each
// computes for itself.
void decode_layers(const Shape* shape_, const Layer* layers, int64_t n_layers, const StepPlan* plans, const Rope* ropes,
                   bf16* x, int64_t B, int64_t T) {
    const Shape& shape = *shape_;
    const int64_t E = shape.E, H = shape.H, G = shape.G, D = shape.D, M = B * T, heads = H + 2 * G;
    static thread_local std::vector<bf16> shared;
    static thread_local std::vector<float> inner_room, attention_room;
    shared.resize(M * (heads * D + H * D + E));
    bf16 *qkv = shared.data(), *attended = qkv + M * heads * D, *out = attended + M * H * D;
    int64_t inner_stride = 0, most = 0;
    for (int64_t l = 0; l < n_layers; l++) {
        const StepPlan& plan = plans[layers[l].plan];
        Attention a{};
        a.B = B, a.H = H, a.G = G, a.T = T, a.N = plan.N, a.D = D;
        most = std::max(most, a.room());
        with_weight(layers[l].down, [&](auto w) { inner_stride = std::max(inner_stride, w.inputs()); });
    }
    attention_room.resize(most);
    inner_room.assign(M * inner_stride, 0.0f);
    float *inner = inner_room.data(), *attention = attention_room.data();
#pragma omp parallel
    {
        static thread_local std::vector<float> room;
        static thread_local std::vector<bf16> own, normed, post;
        own.assign(x, x + M * E);
        normed.resize(M * E);
        for (int64_t l = 0; l < n_layers; l++) {
            const Layer& layer = layers[l];
            const StepPlan& plan = plans[layer.plan];
            const auto norm = [&](const bf16* weight) {
                for (int64_t m = 0; weight && m < M; m++)
                    norm_row(&own[m * E], weight, &normed[m * E], E, shape.eps, shape.norm_offset);
                return weight ? normed.data() : own.data();
            };
            team_product(layer.qkv, norm(layer.norm_1), qkv, M, room);

            if (shape.norm_all_heads && layer.norm_q) {
#pragma omp for schedule(static)
                for (int64_t m = 0; m < M; m++) {
                    bf16* row = qkv + m * heads * D;
                    norm_row(row, layer.norm_q, row, H * D, shape.eps, shape.norm_offset);
                    norm_row(row + H * D, layer.norm_k, row + H * D, G * D, shape.eps, shape.norm_offset);
                }
            }
            Attention a{B, H, G, T, plan.N, D, shape.cap, layer.keys + plan.first * D, layer.values + plan.first * D,
                        {layer.row_stride, layer.head_stride, D}, {layer.row_stride, layer.head_stride, D}, plan.bias,
                        {plan.bias_strides[0], plan.bias_strides[1]}, layer.sinks, nullptr, nullptr, nullptr, nullptr};
            a.settle(attention);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < M * heads; i++) {
                const int64_t m = i / heads, h = i % heads, b = m / T, t = m % T;
                bf16* head = qkv + i * D;
                if (h < H + G) {
                    const bf16* weight = h < H ? layer.norm_q : layer.norm_k;
                    if (weight && !shape.norm_all_heads) norm_row(head, weight, head, D, shape.eps, shape.norm_offset);
                    if (layer.rope >= 0) {
                        const Rope& rope = ropes[layer.rope];
                        const int64_t at = b * rope.row_stride + t * shape.rope_n;
                        turn(head, rope.cos + at, rope.sin + at, shape.rope_n, shape.interleave);
                    }
                }
                if (h < H) {
                    float* query = a.queries + ((b * H + h) * T + t) * D;
                    for (int64_t d = 0; d < D; d++) query[d] = widen(head[d]) * shape.scale;
                } else {
                    const int64_t g = (h - H) % G, slot = plan.slots[plan.slots_by_row ? m : t];
                    bf16* buffer = h < H + G ? layer.keys : layer.values;
                    std::memcpy(buffer + b * layer.row_stride + g * layer.head_stride + slot * D, head, D * sizeof(bf16));
                }
            }
            a.parts();
            a.combine(attended);
            team_product(layer.proj, attended, out, M, room);
            add_rows(own, out, layer.post_attention_norm, shape.attention_factor, M, shape, post);

            const bf16* mlp_input = norm(layer.norm_2);
            with_weight(layer.down, [&](auto down) {
                auto* rows = (typename decltype(down)::Input*)inner;
                with_weight(layer.gate, [&](auto gate) {
                    const decltype(gate) up(layer.up);
                    gated(gate, up, down, rows_for(gate, mlp_input, M, E, room), rows, M, shape.I, int(shape.activation));
                });
                product(down, (const typename decltype(down)::Input*)rows, down.inputs(), layer.down.bias, out, M, E);
            });
            add_rows(own, out, layer.post_mlp_norm, shape.mlp_factor, M, shape, post);
        }
#pragma omp single
        std::memcpy(x, own.data(), M * E * sizeof(bf16));
    }
}

}  // extern "C"
