/* Multiplies heads by their gates, in one sweep each way: y = s(z) m, s the logistic function, z one number a head.
 *
 *     dm = s dy,  dz = s (1 - s) sum over the head of dy m
 *
 * gate.py compiles it at first use; threads are torch's own OpenMP pool.
 */
#include <math.h>
#include <stdint.h>

static inline float logistic(float z) { return 1 / (1 + expf(-z)); }

/* z [N], m, y [N, D]: N heads of all tokens. */
void glm_gate(int64_t N, int64_t D, const float *z, const float *m, float *y) {
#pragma omp parallel for
    for (int64_t n = 0; n < N; n++) {
        const float *restrict in = m + n * D;
        float *restrict out = y + n * D;
        float s = logistic(z[n]);
        for (int64_t d = 0; d < D; d++) out[d] = s * in[d];
    }
}

void glm_gate_backward(int64_t N, int64_t D, const float *z, const float *m, const float *dy, float *dz, float *dm) {
#pragma omp parallel for
    for (int64_t n = 0; n < N; n++) {
        const float *restrict in = m + n * D, *restrict up = dy + n * D;
        float *restrict out = dm + n * D;
        float s = logistic(z[n]), along = 0;
#pragma omp simd reduction(+ : along)
        for (int64_t d = 0; d < D; d++) {
            along += up[d] * in[d];
            out[d] = s * up[d];
        }
        dz[n] = s * (1 - s) * along;
    }
}
