// What a step of decoding consists of on a CPU: products of a few rows with large weights, and attention from a few
// queries. Both wait for memory, so everything here reads weights, keys and values once, in order, on all threads.
//
// Plain loops for the compiler to vectorise. Rows are bfloat16 outside and float inside. Letters as in attention.py; M rows,
// K inputs, N outputs.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using bf16 = uint16_t;
constexpr int UNIT = 64;  // outputs that one thread computes at a time
constexpr int ROWS = 4;   // rows that share one pass over the weights

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

// -- weights: each computes UNIT outputs for M rows of x

// bfloat16 in oneDNN's order for such CPUs: blocks of 64 outputs, within them pairs of inputs, K padded to 32
struct Blocked {
    const uint32_t* w;
    int64_t K;

    static int64_t inputs(int64_t K) { return (K + 31) / 32 * 32; }

    template <int M>
    void unit(int64_t u, const float* x, int64_t stride, float* y) const {
        const int64_t pairs = inputs(K) / 2;
        const uint32_t* block = w + u * pairs * UNIT;
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
    }
};

// bfloat16 row by row
struct Plain {
    const bf16* w;
    int64_t K, N;

    static int64_t inputs(int64_t K) { return K; }

    template <int M>
    void unit(int64_t u, const float* x, int64_t stride, float* y) const {
        for (int64_t j = 0; j < std::min<int64_t>(UNIT, N - u * UNIT); j++) {
            const bf16* row = w + (u * UNIT + j) * K;
            for (int m = 0; m < M; m++) {
                float sum = 0;
                const float* xm = x + m * stride;
#pragma omp simd reduction(+ : sum)
                for (int64_t k = 0; k < K; k++) sum += widen(row[k]) * xm[k];
                y[m * UNIT + j] = sum;
            }
        }
    }
};

// 8-bit integers row by row, and a factor for every row
struct Int8 {
    const int8_t* w;
    const float* scale;
    int64_t K, N;

    static int64_t inputs(int64_t K) { return K; }

    template <int M>
    void unit(int64_t u, const float* x, int64_t stride, float* y) const {
        for (int64_t j = 0; j < std::min<int64_t>(UNIT, N - u * UNIT); j++) {
            const int8_t* row = w + (u * UNIT + j) * K;
            for (int m = 0; m < M; m++) {
                float sum = 0;
                const float* xm = x + m * stride;
#pragma omp simd reduction(+ : sum)
                for (int64_t k = 0; k < K; k++) sum += float(row[k]) * xm[k];
                y[m * UNIT + j] = sum * scale[u * UNIT + j];
            }
        }
    }
};

// Rows as floats, padded with zeros to what the weight reads.
const float* widen_rows(const bf16* x, int64_t M, int64_t K, int64_t padded, std::vector<float>& room) {
    room.assign(M * padded, 0.0f);
    for (int64_t m = 0; m < M; m++)
        for (int64_t k = 0; k < K; k++) room[m * padded + k] = widen(x[m * K + k]);
    return room.data();
}

template <class W>
void units(const W& w, int M, int64_t u, const float* x, int64_t stride, float* y) {
    switch (M) {
        case 1: return w.template unit<1>(u, x, stride, y);
        case 2: return w.template unit<2>(u, x, stride, y);
        case 3: return w.template unit<3>(u, x, stride, y);
        default: return w.template unit<4>(u, x, stride, y);
    }
}

// y (M, N) = x (M, K) w^T + bias, called by all threads of a team
template <class W>
void product(const W& w, const float* x, int64_t stride, const bf16* bias, bf16* y, int64_t M, int64_t N) {
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
    const int64_t stride = W::inputs(K);
    const float* rows = widen_rows(x, M, K, stride, room);
#pragma omp parallel
    product(w, rows, stride, bias, y, M, N);
}

// Gated MLP: `first` has the gate's I outputs and then as many more; I is a multiple of UNIT.
template <class W>
void gated_mlp(const W& first, const W& second, const bf16* x, bf16* y, int64_t M, int64_t K, int64_t I, int64_t N,
               int kind) {
    static thread_local std::vector<float> room, inner_room;
    const int64_t stride = W::inputs(K), inner_stride = W::inputs(I);
    const float* rows = widen_rows(x, M, K, stride, room);
    inner_room.assign(M * inner_stride, 0.0f);
    float* inner = inner_room.data();
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t u = 0; u < I / UNIT; u++) {
            float gate[ROWS][UNIT], up[ROWS][UNIT];
            for (int64_t m0 = 0; m0 < M; m0 += ROWS) {
                const int count = int(std::min<int64_t>(ROWS, M - m0));
                units(first, count, u, rows + m0 * stride, stride, gate[0]);
                units(first, count, u + I / UNIT, rows + m0 * stride, stride, up[0]);
                for (int m = 0; m < count; m++)
                    for (int j = 0; j < UNIT; j++)
                        inner[(m0 + m) * inner_stride + u * UNIT + j] = activate(gate[m][j], kind) * up[m][j];
            }
        }
        product(second, (const float*)inner, inner_stride, (const bf16*)nullptr, y, M, N);
    }
}

// -- attention

constexpr int SPLIT = 256;  // keys that one thread takes at a time
constexpr int MAX_D = 256;

// Attention from R queries (float, scaled) over keys [n0, n1): their maxima, sums and weighted values.
template <int R, int D0>
void attend_part(const float* q, const bf16* k, const bf16* v, int64_t k_stride, int64_t v_stride, const bf16* const* bias,
                 int64_t n, int64_t any_D, float cap, float* top, float* total, float* out) {
    const int64_t D = D0 ? D0 : any_D;
    float scores[R][SPLIT];
    for (int64_t j = 0; j < n; j++) {
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
        float most = -INFINITY;
#pragma omp simd reduction(max : most)
        for (int64_t j = 0; j < n; j++) most = std::max(most, s[j]);
        const float base = most == -INFINITY ? 0.0f : most;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < n; j++) {
            s[j] = exponential(s[j] - base);
            sum += s[j];
        }
        top[r] = most;
        total[r] = sum;
    }
    float sums[R][D0 ? D0 : MAX_D] = {};
    for (int64_t j = 0; j < n; j++) {
        const bf16* value = v + j * v_stride;
        for (int r = 0; r < R; r++) {
            const float weight = scores[r][j];
#pragma omp simd
            for (int64_t d = 0; d < D; d++) sums[r][d] += weight * widen(value[d]);
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

void gated_mlp_blocked(const bf16* x, const uint32_t* first, const uint32_t* second, bf16* y, int64_t M, int64_t K,
                       int64_t I, int64_t N, int kind) {
    gated_mlp(Blocked{first, K}, Blocked{second, I}, x, y, M, K, I, N, kind);
}

void rms_norm(const bf16* x, const bf16* weight, bf16* y, int64_t rows, int64_t size, float eps, float offset) {
#pragma omp parallel for schedule(static) if (rows > 64)
    for (int64_t r = 0; r < rows; r++) {
        const bf16* in = x + r * size;
        bf16* out = y + r * size;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < size; i++) sum += widen(in[i]) * widen(in[i]);
        const float factor = 1.0f / std::sqrt(sum / float(size) + eps);
        for (int64_t i = 0; i < size; i++) out[i] = narrow(widen(in[i]) * factor * (widen(weight[i]) + offset));
    }
}

// q (B, H, T, D) and keys, values (B, G, N, D) by strides over all but the last dimension, bias (null: none) by strides over
// B, T; sinks (H,) or null; y (B, T, H, D). Scores are squashed into (-cap, cap) if that is positive.
void attend(const bf16* q, const bf16* k, const bf16* v, const bf16* bias, const bf16* sinks, bf16* y, int64_t B, int64_t H,
            int64_t G, int64_t T, int64_t N, int64_t D, const int64_t* strides, float scale, float cap) {
    static thread_local std::vector<float> room;
    const int64_t *qs = strides, *ks = strides + 3, *vs = strides + 6, *bs = strides + 9;
    const int64_t shared = H / G * T;  // queries that attend to the same keys
    const int64_t splits = (N + SPLIT - 1) / SPLIT, items = B * G * splits;
    room.resize(B * G * shared * D + items * shared * (D + 2));
    float* queries = room.data();
    float *sums = queries + B * G * shared * D, *tops = sums + items * shared * D, *totals = tops + items * shared;
    for (int64_t b = 0; b < B; b++)
        for (int64_t h = 0; h < H; h++)
            for (int64_t t = 0; t < T; t++)
                for (int64_t d = 0; d < D; d++)
                    queries[((b * H + h) * T + t) * D + d] = widen(q[b * qs[0] + h * qs[1] + t * qs[2] + d]) * scale;
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < items; i++) {
            const int64_t group = i / splits, b = group / G, g = group % G, n0 = i % splits * SPLIT;
            const int64_t n = std::min<int64_t>(SPLIT, N - n0);
            const bf16 *keys = k + b * ks[0] + g * ks[1] + n0 * ks[2], *values = v + b * vs[0] + g * vs[1] + n0 * vs[2];
            for (int64_t r = 0; r < shared;) {
                const bf16* rows_bias[4];
                const int64_t left = shared - r, at = i * shared + r;
                const int count = left >= 4 ? 4 : int(left);
                for (int c = 0; c < count; c++)
                    rows_bias[c] = bias ? bias + b * bs[0] + (r + c) % T * bs[1] + n0 : nullptr;
                const float* rows = queries + (group * shared + r) * D;
                const auto run = count == 1   ? attend_rows<1>
                                 : count == 2 ? attend_rows<2>
                                 : count == 3 ? attend_rows<3>
                                              : attend_rows<4>;
                run(rows, keys, values, ks[2], vs[2], rows_bias, n, D, cap, tops + at, totals + at, sums + at * D);
                r += count;
            }
        }
#pragma omp for schedule(static)
        for (int64_t row = 0; row < B * H * T; row++) {
            const int64_t group = row / shared, r = row % shared, b = group / G, h = row / T % H, t = row % T;
            float most = sinks ? widen(sinks[h]) : -INFINITY, out[MAX_D] = {};
            for (int64_t s = 0; s < splits; s++) most = std::max(most, tops[(group * splits + s) * shared + r]);
            float total = sinks ? exponential(widen(sinks[h]) - most) : 0.0f;
            for (int64_t s = 0; s < splits; s++) {
                const int64_t at = (group * splits + s) * shared + r;
                const float factor = totals[at] > 0 ? exponential(tops[at] - most) : 0.0f;
                total += factor * totals[at];
                for (int64_t d = 0; d < D; d++) out[d] += factor * sums[at * D + d];
            }
            for (int64_t d = 0; d < D; d++) y[((b * T + t) * H + h) * D + d] = narrow(out[d] / total);
        }
    }
}

}  // extern "C"
