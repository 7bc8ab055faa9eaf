/* One routine makes all products, C = A B: a tile of C stays in registers while k runs, each step loads a row of B as vectors and
 * broadcasts elements of A. Two strides address A, so a transpose costs nothing; B lies row by row, and callers copy once what does
 * not. Each sum runs over k in order: results depend neither on the number of threads nor on the tile that an element is in.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "stabilitylab/formats/float_bits.h"

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t mask __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
#define EIGHT 8
typedef float eight __attribute__((vector_size(4 * EIGHT)));
typedef float loose8 __attribute__((vector_size(4 * EIGHT), aligned(4), may_alias));
/* Rows of a tile: 6 x 4 vectors take 24 of AVX-512's 32 registers, 6 x 2 take 12 of AVX2's 16. A tile of one vector across has
 * twice as many rows: each sum waits for its last addition, so some ten sums must be under way. */
#define ROWS 6
#define NARROW 12
#if LANES == 16
#define WIDE 4
#else
#define WIDE 2
#endif
#define BLOCK 48 /* queries whose scores stay in the cache together */

INLINE void tile(int rows, int across, int64_t K, const float *restrict A, int64_t a_m, int64_t a_k, const float *restrict B,
                 int64_t ldb, float *restrict C, int64_t ldc) {
    vec sum[NARROW][WIDE];
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < across; j++) sum[i][j] = (vec){0};
    for (int64_t k = 0; k < K; k++) {
        vec b[WIDE];
        for (int j = 0; j < across; j++) b[j] = *(const loose *)(B + k * ldb + j * LANES);
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < across; j++) sum[i][j] += A[i * a_m + k * a_k] * b[j];
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < across; j++) *(loose *)(C + i * ldc + j * LANES) = sum[i][j];
}

INLINE void strip(int across, int64_t M, int64_t K, const float *A, int64_t a_m, int64_t a_k, const float *B, int64_t ldb,
                  float *C, int64_t ldc) {
    int64_t m = 0;
    if (across == 1)
        for (; m + NARROW <= M; m += NARROW) tile(NARROW, 1, K, A + m * a_m, a_m, a_k, B, ldb, C + m * ldc, ldc);
    for (; m + ROWS <= M; m += ROWS) tile(ROWS, across, K, A + m * a_m, a_m, a_k, B, ldb, C + m * ldc, ldc);
    for (; m + 2 <= M; m += 2) tile(2, across, K, A + m * a_m, a_m, a_k, B, ldb, C + m * ldc, ldc);
    if (m < M) tile(1, across, K, A + m * a_m, a_m, a_k, B, ldb, C + m * ldc, ldc);
}

/* C[m, n] = sum_k A[m a_m + k a_k] B[k ldb + n]; N >= LANES. May compute the last columns twice, with the same result. */
static void product(int64_t M, int64_t N, int64_t K, const float *A, int64_t a_m, int64_t a_k, const float *B, int64_t ldb,
                    float *C, int64_t ldc) {
    int64_t n = 0;
    for (; n + WIDE * LANES <= N; n += WIDE * LANES) strip(WIDE, M, K, A, a_m, a_k, B + n, ldb, C + n, ldc);
    for (; n + LANES <= N; n += LANES) strip(1, M, K, A, a_m, a_k, B + n, ldb, C + n, ldc);
    if (n < N) strip(1, M, K, A, a_m, a_k, B + N - LANES, ldb, C + N - LANES, ldc);
}
