// Products of matrices in float: C (M, N) = A (M, K) B (K, N), where elements of A lie at any strides and rows of B and C are
// contiguous.

#pragma once

#include "simd/simd.h"

constexpr int COLUMN_VECTORS = output_vectors(6);  // of a tile of 6 rows: what registers hold

struct Strided {  // a matrix, by the strides of rows and columns
    const float* data;
    int64_t row, column;
};

// M rows and V vectors of columns of C = A B, or C + A B
template <int M, int V>
inline void product_tile(Strided a, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t K, bool add) {
    Floats sums[M][V];
    UNROLLED for (int m = 0; m < M; m++)
        UNROLLED for (int v = 0; v < V; v++) sums[m][v] = add ? load(c + m * ldc + v * LANES) : zeros();
    for (int64_t k = 0; k < K; k++) {
        Floats column[V];
        UNROLLED for (int v = 0; v < V; v++) column[v] = load(b + k * ldb + v * LANES);
        UNROLLED for (int m = 0; m < M; m++) {
            const Floats x = all(a.data[m * a.row + k * a.column]);
            UNROLLED for (int v = 0; v < V; v++) sums[m][v] = multiply_add(x, column[v], sums[m][v]);
        }
    }
    UNROLLED for (int m = 0; m < M; m++)
        UNROLLED for (int v = 0; v < V; v++) store(c + m * ldc + v * LANES, sums[m][v]);
}

template <int V>
inline void product_columns(Strided a, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t M, int64_t K, bool add) {
    int64_t m = 0;
    const auto rest = [&] { return Strided{a.data + m * a.row, a.row, a.column}; };
    for (; m + 6 <= M; m += 6) product_tile<6, V>(rest(), b, ldb, c + m * ldc, ldc, K, add);
    for (; m + 2 <= M; m += 2) product_tile<2, V>(rest(), b, ldb, c + m * ldc, ldc, K, add);
    for (; m < M; m++) product_tile<1, V>(rest(), b, ldb, c + m * ldc, ldc, K, add);
}

// N is a multiple of 16
inline void multiply(Strided a, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t M, int64_t N, int64_t K, bool add) {
    int64_t n = 0;
    for (; n + LANES * COLUMN_VECTORS <= N; n += LANES * COLUMN_VECTORS)
        product_columns<COLUMN_VECTORS>(a, b + n, ldb, c + n, ldc, M, K, add);
    for (; n < N; n += LANES) product_columns<1>(a, b + n, ldb, c + n, ldc, M, K, add);
}
