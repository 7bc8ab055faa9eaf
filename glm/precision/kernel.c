/* What a small model's step spends its time on, in fp32 on a CPU: attention over heads, gradients of weights, gated GELU.
 *
 * All products are one routine, C = A B: a tile of C stays in registers while k runs, a row of B is loaded as vectors, an element
 * of A is broadcast. A is read by two strides, so that a transpose costs nothing; B is row by row, and what is not is copied once.
 * The order of a sum over k is that of k: results depend neither on the number of threads nor on the tile that an element is in.
 *
 * Attention is computed a head at a time, in blocks of queries whose scores stay in the first-level cache:
 *
 *     q' = c R q,  k' = R k        R: rotation by position, or nothing;  c: scale
 *     S = d q' k'' + bias,  P = softmax(S) (kept),  Y = P V
 *     dV = P' dY,  dS = P * (dY V' - sum_d dY Y),  dq = c d R' dS k',  dk = R' (d dS' q')
 *
 * Gated GELU, y = a g(b), g(b) = b F(b), F the normal distribution: da = dy g(b), db = dy a (F(b) + b f(b)).
 *
 * NaN and infinity go through as they do in the torch operations. Compiled at first use by the system's C compiler
 * (glm/precision/kernel.py); threads are torch's own OpenMP pool.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
#define INLINE static inline __attribute__((always_inline))
/* Rows of a tile: 6 x 4 vectors take 24 registers of AVX-512's 32, 6 x 2 12 of AVX2's 16. One vector across, twice as many: a sum waits
 * for its last addition, so some ten of them must be under way. */
#define ROWS 6
#define NARROW 12
#if LANES == 16
#define WIDE 4
#else
#define WIDE 2
#endif
#define BLOCK 48 /* queries whose scores are at hand together */

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

/* C[m, n] = sum_k A[m a_m + k a_k] B[k ldb + n]; N >= LANES. The last columns may be computed twice, alike. */
static void product(int64_t M, int64_t N, int64_t K, const float *A, int64_t a_m, int64_t a_k, const float *B, int64_t ldb,
                    float *C, int64_t ldc) {
    int64_t n = 0;
    for (; n + WIDE * LANES <= N; n += WIDE * LANES) strip(WIDE, M, K, A, a_m, a_k, B + n, ldb, C + n, ldc);
    for (; n + LANES <= N; n += LANES) strip(1, M, K, A, a_m, a_k, B + n, ldb, C + n, ldc);
    if (n < N) strip(1, M, K, A, a_m, a_k, B + N - LANES, ldb, C + N - LANES, ldc);
}

/* exp(x) for x <= 0, NaN for NaN, 0 below -87: 2^n e^r, |r| <= log(2) / 2, e^r a polynomial (Cephes' expf), within 2 ulp. */
INLINE float exp_below(float x) {
    float at = x < -87.0f ? -87.0f : x;
    float n = at * 1.44269504f + 12582912.0f; /* 1.5 2^23: the sum's last bit is 1, so it is rounded to an integer */
    int32_t bits;
    memcpy(&bits, &n, 4);
    n -= 12582912.0f;
    float r = at - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    bits = (int32_t)((uint32_t)(bits + 127) << 23);
    float power;
    memcpy(&power, &bits, 4);
    return x < -87.0f ? 0.0f : p * power;
}

typedef struct {
    int64_t batch, tokens, heads, width; /* B, T, H, D */
    const float *qkv;                    /* [B, T, 3, H, D] */
    const float *cosine, *sine;          /* [B, T, groups, pairs], or NULL; width = 2 groups pairs */
    int64_t groups, pairs, turn_stride;  /* turn_stride: from row to row of B, 0 where all turn alike */
    const float *bias;                   /* [B, H, T, T] by strides, the last one 1 */
    int64_t bias_stride[3];
    float scale, divisor;
    float *weights; /* P, [B, H, T, T] */
    float *mixed;   /* Y, [B, T, H, D] */
    const float *grad; /* dY, [B, T, H, D] */
    float *grad_qkv;   /* [B, T, 3, H, D] */
} Attention;

/* out[t, :padded] = factor R x[t], zeros beyond the width; direction -1 turns back. */
INLINE void turned(const Attention *a, int64_t b, const float *x, int64_t from, float *out, int64_t to, int64_t padded,
                   float factor, float direction, int turns) {
    int64_t D = a->width, R = a->pairs;
    for (int64_t t = 0; t < a->tokens; t++) {
        const float *row = x + t * from;
        float *into = out + t * to;
        if (turns && a->cosine) {
            const float *cosine = a->cosine + b * a->turn_stride + t * a->groups * R;
            const float *sine = a->sine + b * a->turn_stride + t * a->groups * R;
            for (int64_t g = 0; g < a->groups; g++) {
                const float *one = row + 2 * g * R, *two = one + R, *c = cosine + g * R, *s = sine + g * R;
                for (int64_t r = 0; r < R; r++) {
                    into[2 * g * R + r] = factor * (one[r] * c[r] - direction * (two[r] * s[r]));
                    into[2 * g * R + R + r] = factor * (two[r] * c[r] + direction * (one[r] * s[r]));
                }
            }
        } else
            for (int64_t d = 0; d < D; d++) into[d] = factor * row[d];
        for (int64_t d = D; d < padded; d++) into[d] = 0;
    }
}

INLINE void transposed(int64_t rows, int64_t columns, const float *x, int64_t ldx, float *out, int64_t ldo) {
    for (int64_t i = 0; i < columns; i++)
        for (int64_t j = 0; j < rows; j++) out[i * ldo + j] = x[j * ldx + i];
}

static int64_t whole(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

static float *room(int64_t floats) {
    void *found = NULL;
    return posix_memalign(&found, 64, (size_t)(floats * 4)) ? NULL : found;
}

/* 0: done; 1: no memory. */
int glm_attention(const Attention *a) {
    int64_t T = a->tokens, H = a->heads, D = a->width, Dp = whole(D), Tp = whole(T), row = 3 * H * D;
    int lost = 0;
#pragma omp parallel reduction(| : lost)
    {
        float *q = room(T * Dp * 3 + Dp * Tp + BLOCK * Tp), *k = q + T * Dp, *v = k + T * Dp, *across = v + T * Dp;
        float *scores = across + Dp * Tp;
        if (!q) lost = 1;
        else memset(across, 0, (size_t)(Dp * Tp) * 4);
#pragma omp for
        for (int64_t i = 0; i < a->batch * H; i++) {
            if (lost) continue;
            int64_t b = i / H, h = i % H;
            const float *first = a->qkv + b * T * row + h * D;
            turned(a, b, first, row, q, Dp, Dp, a->scale, 1, 1);
            turned(a, b, first + H * D, row, k, Dp, Dp, 1, 1, 1);
            turned(a, b, first + 2 * H * D, row, v, Dp, Dp, 1, 1, 0);
            transposed(T, D, k, Dp, across, Tp);
            for (int64_t t = 0; t < T; t += BLOCK) {
                int64_t count = T - t < BLOCK ? T - t : BLOCK;
                product(count, Tp, D, q + t * Dp, Dp, 1, across, Tp, scores, Tp);
                for (int64_t u = 0; u < count; u++) {
                    float *s = scores + u * Tp, *p = a->weights + (i * T + t + u) * T;
                    const float *bias = a->bias + b * a->bias_stride[0] + h * a->bias_stride[1] + (t + u) * a->bias_stride[2];
                    float top = -INFINITY, total = 0;
#pragma omp simd reduction(max : top)
                    for (int64_t j = 0; j < T; j++) {
                        s[j] = a->divisor * s[j] + bias[j];
                        top = s[j] > top ? s[j] : top;
                    }
#pragma omp simd reduction(+ : total)
                    for (int64_t j = 0; j < T; j++) {
                        s[j] = exp_below(s[j] - top);
                        total += s[j];
                    }
                    total = 1 / total;
                    for (int64_t j = 0; j < T; j++) p[j] = s[j] * total;
                }
                float *mixed = across + Dp * Tp; /* the scores are used up: their room takes Y before it is put where it belongs */
                product(count, Dp, T, a->weights + (i * T + t) * T, T, 1, v, Dp, mixed, Dp);
                for (int64_t u = 0; u < count; u++)
                    memcpy(a->mixed + ((b * T + t + u) * H + h) * D, mixed + u * Dp, (size_t)D * 4);
            }
        }
        free(q);
    }
    return lost;
}

int glm_attention_backward(const Attention *a) {
    int64_t T = a->tokens, H = a->heads, D = a->width, Dp = whole(D), Tp = whole(T), row = 3 * H * D;
    int lost = 0;
#pragma omp parallel reduction(| : lost)
    {
        float *q = room(T * Dp * 5 + Dp * Tp + T * Tp), *k = q + T * Dp, *v = k + T * Dp, *y = v + T * Dp, *out = y + T * Dp;
        float *across = out + T * Dp, *scores = across + Dp * Tp;
        if (!q) lost = 1;
        else memset(across, 0, (size_t)(Dp * Tp) * 4);
#pragma omp for
        for (int64_t i = 0; i < a->batch * H; i++) {
            if (lost) continue;
            int64_t b = i / H, h = i % H;
            const float *first = a->qkv + b * T * row + h * D, *p = a->weights + i * T * T;
            const float *grad = a->grad + (b * T * H + h) * D, *mixed = a->mixed + (b * T * H + h) * D;
            float *into = a->grad_qkv + b * T * row + h * D;
            turned(a, b, first, row, q, Dp, Dp, a->divisor * a->scale, 1, 1);
            turned(a, b, first + H * D, row, k, Dp, Dp, 1, 1, 1);
            turned(a, b, first + 2 * H * D, row, v, Dp, Dp, 1, 1, 0);
            turned(a, b, grad, H * D, y, Dp, Dp, 1, 1, 0);
            transposed(T, D, v, Dp, across, Tp);
            for (int64_t t = 0; t < T; t += BLOCK) {
                int64_t count = T - t < BLOCK ? T - t : BLOCK;
                product(count, Tp, D, y + t * Dp, Dp, 1, across, Tp, scores + t * Tp, Tp);
                for (int64_t u = t; u < t + count; u++) {
                    float *s = scores + u * Tp, off = 0;
                    const float *w = p + u * T;
#pragma omp simd reduction(+ : off)
                    for (int64_t d = 0; d < D; d++) off += y[u * Dp + d] * mixed[u * H * D + d];
                    for (int64_t j = 0; j < T; j++) s[j] = w[j] * (s[j] - off);
                }
            }
            product(T, Dp, T, p, 1, T, y, Dp, out, Dp);
            turned(a, b, out, Dp, into + 2 * H * D, row, D, 1, 1, 0);
            product(T, Dp, T, scores, Tp, 1, k, Dp, out, Dp);
            turned(a, b, out, Dp, into, row, D, a->divisor * a->scale, -1, 1);
            product(T, Dp, T, scores, 1, Tp, q, Dp, out, Dp);
            turned(a, b, out, Dp, into + H * D, row, D, 1, -1, 1);
        }
        free(q);
    }
    return lost;
}

/* dW[o, i] = sum_n g[n, o] x[n, i], and db[o] = sum_n g[n, o] unless it is NULL; inputs >= LANES. */
void glm_weight_gradient(int64_t N, int64_t outputs, int64_t inputs, const float *g, const float *x, float *dW, float *db) {
    int64_t blocks = (outputs + BLOCK - 1) / BLOCK;
#pragma omp parallel for
    for (int64_t i = 0; i < blocks; i++) {
        int64_t o = i * BLOCK, count = outputs - o < BLOCK ? outputs - o : BLOCK;
        product(count, inputs, N, g + o, 1, outputs, x, inputs, dW + o * inputs, inputs);
        if (db) {
            for (int64_t j = o; j < o + count; j++) db[j] = 0;
            for (int64_t n = 0; n < N; n++)
                for (int64_t j = o; j < o + count; j++) db[j] += g[n * outputs + j];
        }
    }
}

/* F(x) = (1 + erf(z)) / 2, z = x / sqrt 2: erf by a polynomial in z^2 for |z| < 1, 1 - e^(-z Q(z)) beyond; both were fitted to
 * float64's and err by less than the last bit. */
INLINE float normal(float x) {
    float z = x * 0.707106781f, s = z * z, t = z < 0 ? -z : z;
    t = t > 4 ? 4.0f : t;
    float near = 7.853979844e-05f;
    near = near * s - 8.010232450e-04f;
    near = near * s + 5.188332586e-03f;
    near = near * s - 2.685381491e-02f;
    near = near * s + 1.128358524e-01f;
    near = near * s - 3.761262584e-01f;
    near = near * s + 1.283791657e-01f;
    near = near * z + z;
    float far = -2.106430346e-04f;
    far = far * t + 3.186945180e-03f;
    far = far * t - 2.279845805e-02f;
    far = far * t + 1.051161324e-01f;
    far = far * t + 6.358314832e-01f;
    far = far * t + 1.128480037e+00f;
    far = 1 - exp_below(-t * far);
    far = z < 0 ? -far : far;
    return 0.5f * (1 + (t < 1 ? near : far));
}

/* raised [N, 2 I] = [a, b] -> y [N, I] = a b F(b), and F(b) for the way back. */
void glm_gated_gelu(int64_t N, int64_t I, const float *raised, float *y, float *cumulated) {
#pragma omp parallel for
    for (int64_t n = 0; n < N; n++) {
        const float *a = raised + 2 * n * I, *b = a + I;
        float *into = y + n * I, *f = cumulated + n * I;
#pragma omp simd
        for (int64_t i = 0; i < I; i++) {
            f[i] = normal(b[i]);
            into[i] = a[i] * (b[i] * f[i]);
        }
    }
}

void glm_gated_gelu_backward(int64_t N, int64_t I, const float *raised, const float *cumulated, const float *dy,
                             float *grad) {
#pragma omp parallel for
    for (int64_t n = 0; n < N; n++) {
        const float *a = raised + 2 * n * I, *b = a + I, *f = cumulated + n * I, *g = dy + n * I;
        float *da = grad + 2 * n * I, *db = da + I;
#pragma omp simd
        for (int64_t i = 0; i < I; i++) {
            float density = 0.398942280f * exp_below(-0.5f * b[i] * b[i]);
            da[i] = g[i] * (b[i] * f[i]);
            db[i] = g[i] * a[i] * (f[i] + b[i] * density);
        }
    }
}

/* Rows of logits become the gradients of their losses: softmax (1 + 2 c z) - onehot, z = log sum exp; loss[n] = z - logit + c z^2. */
void glm_cross_entropy(int64_t N, int64_t V, float *logits, const int64_t *target, float z_loss, float *loss) {
#pragma omp parallel for
    for (int64_t n = 0; n < N; n++) {
        float *x = logits + n * V, top = -INFINITY, total = 0, aimed = x[target[n]];
#pragma omp simd reduction(max : top)
        for (int64_t v = 0; v < V; v++) top = x[v] > top ? x[v] : top;
#pragma omp simd reduction(+ : total)
        for (int64_t v = 0; v < V; v++) {
            x[v] = exp_below(x[v] - top);
            total += x[v];
        }
        float z = logf(total) + top, factor = (1 + 2 * z_loss * z) / total;
        for (int64_t v = 0; v < V; v++) x[v] *= factor;
        x[target[n]] -= 1;
        loss[n] = top - aimed + logf(total) + z_loss * z * z;
    }
}
