// All layers of models in float32 for a few tokens, and caches that score them, as C functions: a library of its own, which few need. Compiled with
// LITGPT_FLOAT32.

#include "by_row.h"
#include "decode.h"
#include "scoring.h"
#include "split.h"

#include <new>

TilesOf::TilesOf(const Weight& w, Scratch<uint32_t>*) : tiles(new (place) Kind<Plain>(Plain(w))) {}

extern "C" int run_layers(const Shape* shape, const Layer* layers, int64_t n_layers, const StepPlan* plans, const Rope* ropes,
                           const Ends* ends, Real* x, void*, int64_t B, int64_t T, const int64_t*, int64_t) {
    if (ends->knows(B * T)) run_decode(*shape, layers, n_layers, plans, ropes, *ends, x, B, T);
    return ends->knows(B * T);
}
