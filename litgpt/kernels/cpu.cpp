// The kernels of inference on CPUs as C functions, which ops.py calls. Letters as in attention.py; M rows, K inputs, N outputs.

#include "decode.h"
#include "likeliest.h"
#include "prefill.h"
#include "scoring.h"

extern "C" {

void linear_blocked(const bf16* x, const uint32_t* w, const bf16* bias, bf16* y, int64_t M, int64_t K, int64_t N) {
    linear({BLOCKED, K, N, 0, w, nullptr, nullptr, bias}, x, y, M);
}

void linear_plain(const bf16* x, const bf16* w, const bf16* bias, bf16* y, int64_t M, int64_t K, int64_t N) {
    linear({PLAIN_ROWS, K, N, 0, w, nullptr, nullptr, bias}, x, y, M);
}

void linear_int8(const bf16* x, const int8_t* w, const float* scale, const bf16* bias, bf16* y, int64_t M, int64_t K,
                 int64_t N) {
    linear({INT8_ROWS, K, N, 0, w, scale, nullptr, bias}, x, y, M);
}

void linear_int4(const bf16* x, const uint8_t* w, const uint16_t* scale, const uint16_t* minimum, const bf16* bias,
                 bf16* y, int64_t M, int64_t K, int64_t N, int64_t group) {
    linear({INT4_PAIRS, K, N, group, w, scale, minimum, bias}, x, y, M);
}

// Gated MLP: `first` has the gate's I outputs and then as many more; I is a multiple of 64.
void gated_mlp_blocked(const bf16* x, const uint32_t* first, const uint32_t* second, bf16* y, int64_t M, int64_t K,
                       int64_t I, int64_t N, int kind) {
    static thread_local Scratch<char> scratch;
    static thread_local Scratch<bf16> inner;
    const TilesOf gate({BLOCKED, K, I, 0, first}), up({BLOCKED, K, I, 0, (*gate).at(I / BLOCK_TILE)}),
        down({BLOCKED, I, N, 0, second});
    const Rows rows = rows_for(*gate, x, M, scratch);
    bf16* shared = inner.get(M * I);
#pragma omp parallel num_threads(Team::mine().threads())
    {
        static thread_local Scratch<char> own;
        gated(*gate, *up, rows, shared, M, kind);
        product(*down, rows_for(*down, shared, M, own), nullptr, y, M);
    }
}

void rms_norm(const bf16* x, const bf16* weight, bf16* y, int64_t rows, int64_t size, float eps, float offset) {
#pragma omp parallel for num_threads(Team::mine().threads()) schedule(static) if (rows > 64)
    for (int64_t r = 0; r < rows; r++) norm_row(x + r * size, weight, y + r * size, size, eps, offset);
}

// q (B, H, T, D) and keys, values (B, G, N, D) by strides over all but the last dimension, bias (null: none) by strides
// over B, T; sinks (H,) or null; y (B, T, H, D). `encoded`: null, or keys and values in place of k and v; or of the first ones
// (`sealed` and `newest` as for `Attention`). Scores are soft-capped to (-cap, cap) if `cap` is positive.
void attend(const bf16* q, const bf16* k, const bf16* v, const Vectors* encoded, const int64_t* sealed, int64_t newest,
            const bf16* bias, const bf16* sinks, bf16* y, int64_t B, int64_t H, int64_t G, int64_t T, int64_t N, int64_t D,
            const int64_t* strides, float scale, float cap) {
    static thread_local Scratch<float> scratch;
    static thread_local KvSplits splits;
    const int64_t *qs = strides, *ks = strides + 3, *vs = strides + 6, *bs = strides + 9;
    splits.find(B, G, T, N, bias, bs);
    Attention a{B, H, G, T, N, D, scale, cap, k, v, {ks[0], ks[1], ks[2]}, {vs[0], vs[1], vs[2]}, bias, {bs[0], bs[1]},
                sinks, &splits, nullptr, encoded, sealed, newest};
    a.use_scratch(scratch.get(a.scratch_size()));
    for (int64_t b = 0; b < B; b++)
        for (int64_t h = 0; h < H; h++)
            for (int64_t t = 0; t < T; t++) {
                bf16 query[MAX_D];
                std::memcpy(query, q + b * qs[0] + h * qs[1] + t * qs[2], D * sizeof(bf16));
                a.set_query((b * H + h) * T + t, query);
            }
#pragma omp parallel num_threads(Team::mine().threads())
    {
        a.attend_splits();
        a.combine(y);
    }
}

// The same where queries are the last T of N consecutive positions, and each sees the last `window` keys up to its own.
void attend_causally(const bf16* q, const bf16* k, const bf16* v, const bf16* sinks, bf16* y, int64_t B, int64_t H,
                     int64_t G, int64_t T, int64_t N, int64_t D, int64_t window, const int64_t* strides, float scale,
                     float cap) {
    const int64_t *qs = strides, *ks = strides + 3, *vs = strides + 6;
    const auto row = [&](int64_t b) {
        return CausalAttention{H, G, T, N, D, window, scale, cap, q + b * qs[0], k + b * ks[0], v + b * vs[0], sinks,
                               {qs[1], qs[2]}, {ks[1], ks[2]}, {vs[1], vs[2]}, y + b * T * H * D};
    };
    const int64_t tasks = row(0).tasks();
#pragma omp parallel for num_threads(Team::mine().threads()) schedule(dynamic)
    for (int64_t i = 0; i < B * tasks; i++) row(i / tasks).run(i % tasks);
}

// Weights that queries give to keys, summed over them and the heads that share keys (or the largest of them): out (B, G, N).
// See `SeenWeights`; strides of rows, heads and tokens, first of q.
void see_weights(const bf16* q, const bf16* k, const Vectors* encoded, const bf16* sinks, const int64_t* ends,
                 float* by_head, float* out, int64_t B, int64_t H, int64_t G, int64_t n, int64_t N, int64_t D,
                 const int64_t* strides, float scale, float cap, int largest) {
    SeenWeights{B, H, G, n, N, D, scale, cap, q, k, sinks, encoded, strides, strides + 3, ends, largest != 0}.of_groups(
        by_head, out);
}

void move_slots(char* buffer, const int64_t* rows, const int64_t* index, int64_t B, int64_t G, int64_t C, int64_t n,
                int64_t bytes) {
    move_slots_of_rows(buffer, rows, index, B, G, C, n, bytes);
}

// The best of N scores of each of `count` rows and heads: see `ScorePolicy.best`
void choose_slots(const float* scores, int64_t* index, int64_t count, int64_t N, int64_t n_sink, int64_t recent, int64_t kept) {
    for (int64_t i = 0; i < count; i++) find_best(scores + i * N, N, n_sink, recent, kept, index + i * kept);
}

// The likeliest of N tokens for each of B rows of logits, or -1: see likeliest.h
void find_likeliest(const bf16* logits, int64_t* tokens, int64_t B, int64_t N) {
    for (int64_t b = 0; b < B; b++) tokens[b] = likeliest(logits + b * N, N);
}

// Whether the processor multiplies bfloat16 twice as fast as float. Then products of many rows are as fast here as in
// libraries.
int multiplies_fast() {
#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    return 1;
#else
    return 0;
#endif
}

// x (B, T, E) through all layers and the final norm, in place, or what `ends` says. Where plans have segments, `scratch` is needed
// (see `Prefill`), and `output_tokens` is as in `run_prefill`. Returns 0 for tokens that are not in the table.
int run_layers(const Shape* shape, const Layer* layers, int64_t n_layers, const StepPlan* plans, const Rope* ropes,
               const Ends* ends, bf16* x, bf16* scratch, int64_t B, int64_t T, const int64_t* output_tokens,
               int64_t n_output_tokens) {
    if (plans->n_segments || plans->n_tails)
        run_prefill(*shape, layers, n_layers, plans, ropes, x, scratch, B, T, output_tokens, n_output_tokens);
    else if (ends->knows(B * T))
        run_decode(*shape, layers, n_layers, plans, ropes, *ends, x, B, T);
    else
        return 0;
    return 1;
}

}  // extern "C"
