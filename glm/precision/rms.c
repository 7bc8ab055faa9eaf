/* RMSNorm in one sweep a row each way, in fp32:
 *
 *     y = g x r,  r = 1 / sqrt(mean x^2 + eps)
 *     dx = r (g dy - x r^2 mean(g dy x)),  dg = sum over rows of dy x r
 *
 * The sum over rows goes in their order, a group of columns at a time, so that results do not depend on the number of threads.
 * rms.py compiles it at first use; threads are torch's own OpenMP pool.
 */
#include <math.h>
#include <stdint.h>

#define GROUP 64 /* columns for which one thread sums the gradients of the gain */

/* x, y [N, C], g [C] or NULL, r [N]. */
void glm_rms_norm(int64_t N, int64_t C, float epsilon, const float *x, const float *g, float *y, float *r) {
#pragma omp parallel for
    for (int64_t n = 0; n < N; n++) {
        const float *restrict row = x + n * C;
        float *restrict out = y + n * C;
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t c = 0; c < C; c++) squares += row[c] * row[c];
        float inverse = r[n] = 1 / sqrtf(squares / C + epsilon);
        if (g)
            for (int64_t c = 0; c < C; c++) out[c] = row[c] * inverse * g[c];
        else
            for (int64_t c = 0; c < C; c++) out[c] = row[c] * inverse;
    }
}

/* dy, dx [N, C], dg [C]; dg is NULL where g is. */
void glm_rms_norm_backward(int64_t N, int64_t C, const float *x, const float *g, const float *r, const float *dy, float *dx, float *dg) {
#pragma omp parallel for
    for (int64_t n = 0; n < N; n++) {
        const float *restrict row = x + n * C, *restrict up = dy + n * C;
        float *restrict out = dx + n * C;
        float along = 0;
        if (g) {
#pragma omp simd reduction(+ : along)
            for (int64_t c = 0; c < C; c++) along += g[c] * up[c] * row[c];
        } else {
#pragma omp simd reduction(+ : along)
            for (int64_t c = 0; c < C; c++) along += up[c] * row[c];
        }
        float inverse = r[n], off = along / C * inverse * inverse;
        if (g)
            for (int64_t c = 0; c < C; c++) out[c] = inverse * (g[c] * up[c] - row[c] * off);
        else
            for (int64_t c = 0; c < C; c++) out[c] = inverse * (up[c] - row[c] * off);
    }
    if (!dg) return;
#pragma omp parallel for
    for (int64_t first = 0; first < C; first += GROUP) {
        int64_t count = C - first < GROUP ? C - first : GROUP;
        float sum[GROUP] = {0};
        for (int64_t n = 0; n < N; n++) {
            const float *restrict row = x + n * C + first, *restrict up = dy + n * C + first;
            float inverse = r[n];
#pragma omp simd
            for (int64_t c = 0; c < count; c++) sum[c] += up[c] * row[c] * inverse;
        }
        for (int64_t c = 0; c < count; c++) dg[first + c] = sum[c];
    }
}
