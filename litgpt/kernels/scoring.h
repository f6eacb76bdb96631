// What caches that score tokens need, as C functions of the library of their type. Included once in each.

#pragma once

#include "tails.h"

extern "C" {

// See `Tails`. `counts` has its numbers; `strides` of rows, heads and tokens of q, k and v.
void run_tails(const ScoredCache* cache, const int64_t* counts, const Real* q, const Real* k, const Real* v, const int64_t* strides,
               const int64_t* rows, const int64_t* held, const int64_t* shift, const TailStep* steps, Real* y, int32_t* log) {
    Tails{*cache, counts[0], counts[1], counts[2], q, k, v, strides, strides + 3, strides + 6, rows, held, shift, steps, y, log}
        .run_all();
}

void run_looks(const Look* looks, int64_t count) { run_all_looks(looks, count); }

}  // extern "C"
