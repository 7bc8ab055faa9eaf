/* What a small model's step spends its time on, on a CPU: attention over heads, gradients of weights, gated GELU.
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
 * What a block of queries may not see (bias -inf) weighs 0 in every sum, and is left out in whole vectors where nothing there could make
 * a NaN of that 0: half of the work under a causal mask, to the same bits.
 *
 * Gated GELU, y = a g(b), g(b) = b F(b), F the normal distribution: da = dy g(b), db = dy a (F(b) + b f(b)).
 *
 * All arithmetic is in fp32. In a half format what would be an operand, or would be stored, is rounded to it: q', k', q' k'' (which
 * overflows where it would), P, and on the way back d dS, dq and dk; P is kept in its 16 bits. There sum_d dY Y is sum_j P dP, since a
 * rounded Y would move all of a row's dS to one side (2510.04212).
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
typedef int32_t mask __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
#define EIGHT 8
typedef float eight __attribute__((vector_size(4 * EIGHT)));
typedef float loose8 __attribute__((vector_size(4 * EIGHT), aligned(4), may_alias));
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

/* Formats of what is given and kept. */
enum { FP32, FP16, BF16 };

INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

INLINE float of_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

/* The nearest number of a half format, of two as near the even one; NaN stays. */
INLINE float rounded(float x, int kind) {
    if (kind == FP32) return x;
    uint32_t bits = bits_of(x), drop = kind == BF16 ? 16 : 13;
    float near = of_bits((bits + (1u << (drop - 1)) - 1 + (bits >> drop & 1)) >> drop << drop);
    if (kind == FP16) {
        /* Beneath 2^-14 numbers are 2^-24 apart, as fp32's are in [.5, 1). */
        float size = of_bits(bits & 0x7fffffff), small = (size + 0.5f) - 0.5f;
        uint32_t sign = bits & 0x80000000;
        near = size < 6.103515625e-05f ? of_bits(bits_of(small) | sign) : near;
        near = of_bits(bits_of(near) & 0x7fffffff) >= 65536.0f ? of_bits(0x7f800000 | sign) : near;
    }
    return x != x ? x : near;
}

/* The 16 bits of a number that is rounded already. */
INLINE uint16_t code_of(float x, int kind) {
    uint32_t bits = bits_of(x), size = bits & 0x7fffffff;
    if (kind == BF16) return (uint16_t)(bits >> 16 | (x != x ? 0x40 : 0));
    uint32_t small = (uint32_t)(int32_t)(of_bits(size < 0x38800000 ? size : 0) * 16777216.0f);
    uint32_t code = size < 0x38800000 ? small : (size >> 13) - (112u << 10);
    code = size >= 0x7f800000 ? 0x7c00u | (size > 0x7f800000 ? 0x200u : 0) : code;
    return (uint16_t)(code | (bits >> 16 & 0x8000));
}

INLINE float of_code(uint16_t code, int kind) {
    if (kind == BF16) return of_bits((uint32_t)code << 16);
    uint32_t size = code & 0x7fff, sign = (uint32_t)(code & 0x8000) << 16;
    uint32_t bits = (size << 13) + (112u << 23);
    bits = size < 0x400 ? bits_of((float)(int32_t)size * 5.9604644775390625e-08f) : bits;
    bits = size >= 0x7c00 ? size << 13 | 0x7f800000 : bits;
    return of_bits(bits | sign);
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
    int64_t kind;  /* of the formats above */
    void *weights; /* P, [B, H, T, T], in 16 bits where the format is half */
    float *mixed;   /* Y, [B, T, H, D] */
    const float *grad; /* dY, [B, T, H, D] */
    float *grad_qkv;   /* [B, T, 3, H, D] */
    float *largest;    /* score of each head that is a number, [B, H], or NULL */
    int32_t *seen;     /* keys from, and up to, that each block of queries takes part with, [B, H, blocks, 2]; the way there fills it */
} Attention;

/* out[t, :padded] = factor R x[t], zeros beyond the width; direction -1 turns back. Rounded where half kernels would store it. */
INLINE void turned_in(const Attention *a, int64_t b, const float *x, int64_t from, float *out, int64_t to, int64_t padded,
                      float factor, float direction, int turns, int kind) {
    int64_t D = a->width, R = a->pairs, groups = a->groups;
    for (int64_t t = 0; t < a->tokens; t++) {
        const float *restrict row = x + t * from;
        float *restrict into = out + t * to;
        if (turns && a->cosine) {
            for (int64_t g = 0; g < groups; g++) {
                const float *restrict cosine = a->cosine + b * a->turn_stride + (t * groups + g) * R;
                const float *restrict sine = a->sine + b * a->turn_stride + (t * groups + g) * R;
                const float *restrict one = row + 2 * g * R, *restrict two = one + R;
                float *restrict low = into + 2 * g * R, *restrict high = low + R;
                for (int64_t r = 0; r < R; r++)
                    low[r] = rounded(rounded(one[r], kind) * cosine[r] - direction * (rounded(two[r], kind) * sine[r]), kind);
                for (int64_t r = 0; r < R; r++)
                    high[r] = rounded(rounded(two[r], kind) * cosine[r] + direction * (rounded(one[r], kind) * sine[r]), kind);
            }
            for (int64_t d = 0; d < D; d++) into[d] = rounded(factor * into[d], kind);
        } else
            for (int64_t d = 0; d < D; d++) into[d] = rounded(factor * rounded(row[d], kind), kind);
        for (int64_t d = D; d < padded; d++) into[d] = 0;
    }
}

/* The same in fp32 for heads of 16 that turn as one group: compilers make no vectors of so few numbers. */
static void turned_16(const Attention *a, int64_t b, const float *restrict x, int64_t from, float *restrict out, int64_t to,
                      float factor, float direction, int turns) {
    const float *cosine = turns ? a->cosine : NULL, *sine = a->sine;
    int64_t first = b * a->turn_stride;
    for (int64_t t = 0; t < a->tokens; t++, x += from, out += to) {
        eight one = *(const loose8 *)x, two = *(const loose8 *)(x + EIGHT), low = one, high = two;
        if (cosine) {
            eight c = *(const loose8 *)(cosine + first + t * EIGHT), s = *(const loose8 *)(sine + first + t * EIGHT);
            low = one * c - direction * (two * s);
            high = two * c + direction * (one * s);
        }
        *(loose8 *)out = factor * low;
        *(loose8 *)(out + EIGHT) = factor * high;
    }
}

/* Not inlined: in the midst of attention compilers make no vectors of it. */
static __attribute__((noinline)) void turned(const Attention *a, int64_t b, const float *x, int64_t from, float *out, int64_t to,
                                             int64_t padded, float factor, float direction, int turns, int kind) {
    int plain = !turns || !a->cosine || a->groups == 1;
    if (kind == FP32 && a->width == 2 * EIGHT && padded == a->width && plain)
        turned_16(a, b, x, from, out, to, factor, direction, turns);
    else if (kind == FP32) turned_in(a, b, x, from, out, to, padded, factor, direction, turns, FP32);
    else if (kind == FP16) turned_in(a, b, x, from, out, to, padded, factor, direction, turns, FP16);
    else turned_in(a, b, x, from, out, to, padded, factor, direction, turns, BF16);
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

/* max |x|; NaN where one is. */
INLINE float largest_of(const float *x, int64_t n) {
    uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < n; i++) {
        uint32_t size = bits_of(x[i]) & 0x7fffffff; /* NaN's bits are above infinity's */
        largest = size > largest ? size : largest;
    }
    return of_bits(largest);
}

INLINE int any_seen(const float *bias, int64_t count) {
    int any = 0;
    for (int64_t j = 0; j < count; j++) any |= bias[j] != -INFINITY;
    return any;
}

/* Keys [seen[0], seen[1]) hold all that these queries see; all keys where one of them sees none: its weights are NaN. */
static void see(const float *bias, int64_t stride, int64_t T, int64_t t, int64_t count, int32_t *seen) {
    const vec none = (vec){0} - INFINITY;
    int64_t low = T, high = 0;
    for (int64_t j = 0; j < T; j += LANES) {
        int any = 0;
        if (j + LANES <= T) {
            mask sees = {0};
            for (int64_t u = 0; u < count; u++) sees |= *(const loose *)(bias + u * stride + j) != none;
            for (int lane = 0; lane < LANES; lane++) any |= sees[lane];
        } else
            for (int64_t u = 0; u < count; u++) any |= any_seen(bias + u * stride + j, T - j);
        if (any) low = j < low ? j : low, high = j + LANES < T ? j + LANES : T;
    }
    for (int64_t u = 0; u < count; u++) /* most see themselves */
        if (bias[u * stride + t + u] == -INFINITY && !any_seen(bias + u * stride, T)) low = 0, high = T;
    seen[0] = (int32_t)low, seen[1] = (int32_t)high;
}

static int64_t blocks_of(int64_t T) { return (T + BLOCK - 1) / BLOCK; }

/* 0: done; 1: no memory. */
INLINE int attention(const Attention *a, int kind) {
    int64_t T = a->tokens, H = a->heads, D = a->width, Dp = whole(D), Tp = whole(T), row = 3 * H * D;
    int lost = 0;
#pragma omp parallel reduction(| : lost)
    {
        float *q = room(T * Dp * 3 + Dp * Tp + BLOCK * Tp), *k = q + T * Dp, *v = k + T * Dp, *across = v + T * Dp;
        float *scores = across + Dp * Tp;
        int32_t span[2 * blocks_of(T)]; /* of the row of B that was looked at last: its heads mostly see alike */
        int64_t looked_at = -1;
        if (!q) lost = 1;
        else memset(across, 0, (size_t)(Dp * Tp) * 4);
#pragma omp for
        for (int64_t i = 0; i < a->batch * H; i++) {
            if (lost) continue;
            int64_t b = i / H, h = i % H;
            const float *first = a->qkv + b * T * row + h * D;
            turned(a, b, first, row, q, Dp, Dp, a->scale, 1, 1, kind);
            turned(a, b, first + H * D, row, k, Dp, Dp, 1, 1, 1, kind);
            turned(a, b, first + 2 * H * D, row, v, Dp, Dp, 1, 1, 0, FP32);
            transposed(T, D, k, Dp, across, Tp);
            float largest = -INFINITY;
            /* No product can overflow, and no 0 meets an infinity or NaN. */
            float bound = (float)D * largest_of(q, T * Dp) * largest_of(k, T * Dp);
            int tame = bound < (kind == FP16 ? 32768.0f : 1e38f) && bound * fabsf(a->divisor) < 1e38f;
            tame = tame && largest_of(v, T * Dp) < INFINITY;
            for (int64_t t = 0; t < T; t += BLOCK) {
                int64_t count = T - t < BLOCK ? T - t : BLOCK;
                int32_t *seen = a->seen + (i * blocks_of(T) + t / BLOCK) * 2;
                seen[0] = 0, seen[1] = (int32_t)T;
                if (tame) {
                    int32_t *of_block = span + t / BLOCK * 2;
                    const float *bias = a->bias + b * a->bias_stride[0] + h * a->bias_stride[1] + t * a->bias_stride[2];
                    if (b != looked_at || a->bias_stride[1]) see(bias, a->bias_stride[2], T, t, count, of_block);
                    memcpy(seen, of_block, 2 * sizeof(int32_t));
                }
                int64_t low = seen[0], high = seen[1];
                product(count, whole(high) - low, D, q + t * Dp, Dp, 1, across + low, Tp, scores + low, Tp);
                for (int64_t u = 0; u < count; u++) {
                    float *s = scores + u * Tp;
                    int64_t kept = (i * T + t + u) * T;
                    const float *bias = a->bias + b * a->bias_stride[0] + h * a->bias_stride[1] + (t + u) * a->bias_stride[2];
                    float top = -INFINITY, total = 0;
#pragma omp simd reduction(max : top)
                    for (int64_t j = low; j < high; j++) {
                        s[j] = a->divisor * rounded(s[j], kind) + bias[j];
                        top = s[j] > top ? s[j] : top;
                    }
                    largest = top > largest ? top : largest;
#pragma omp simd reduction(+ : total)
                    for (int64_t j = low; j < high; j++) {
                        s[j] = exp_below(s[j] - top);
                        total += s[j];
                    }
                    total = 1 / total;
                    if (!(total < INFINITY)) seen[0] = 0, seen[1] = (int32_t)T; /* all of its weights are NaN */
                    if (kind == FP32) {
                        float *p = (float *)a->weights + kept;
                        for (int64_t j = 0; j < low; j++) p[j] = 0 * total;
                        for (int64_t j = high; j < T; j++) p[j] = 0 * total;
                        for (int64_t j = low; j < high; j++) p[j] = s[j] * total;
                    } else {
                        uint16_t *p = (uint16_t *)a->weights + kept;
                        for (int64_t j = 0; j < low; j++) p[j] = code_of(0 * total, kind);
                        for (int64_t j = high; j < T; j++) p[j] = code_of(0 * total, kind);
#pragma omp simd
                        for (int64_t j = low; j < high; j++) {
                            s[j] = rounded(s[j] * total, kind);
                            p[j] = code_of(s[j], kind);
                        }
                    }
                }
                if (kind == FP32) {
                    float *mixed = across + Dp * Tp; /* the scores are used up: their room takes Y before it is put in its place */
                    product(count, Dp, high - low, (float *)a->weights + (i * T + t) * T + low, T, 1, v + low * Dp, Dp, mixed, Dp);
                    for (int64_t u = 0; u < count; u++)
                        memcpy(a->mixed + ((b * T + t + u) * H + h) * D, mixed + u * Dp, (size_t)D * 4);
                } else {
                    float *mixed = q + t * Dp; /* as are these queries */
                    product(count, Dp, high - low, scores + low, Tp, 1, v + low * Dp, Dp, mixed, Dp);
                    for (int64_t u = 0; u < count; u++)
                        memcpy(a->mixed + ((b * T + t + u) * H + h) * D, mixed + u * Dp, (size_t)D * 4);
                }
            }
            if (tame) looked_at = b;
            if (a->largest) a->largest[i] = largest;
        }
        free(q);
    }
    return lost;
}

int glm_attention(const Attention *a) {
    return a->kind == FP16 ? attention(a, FP16) : a->kind == BF16 ? attention(a, BF16) : attention(a, FP32);
}

INLINE int attention_backward(const Attention *a, int kind) {
    int64_t T = a->tokens, H = a->heads, D = a->width, Dp = whole(D), Tp = whole(T), row = 3 * H * D, blocks = blocks_of(T);
    /* In fp32 d goes into q' and dq, else into dS, which it is rounded with. */
    float scale = kind == FP32 ? a->divisor * a->scale : a->scale;
    int lost = 0;
#pragma omp parallel reduction(| : lost)
    {
        float *q = room(T * Dp * 5 + Dp * Tp + T * Tp + (kind == FP32 ? 0 : T * T)), *k = q + T * Dp, *v = k + T * Dp;
        int64_t first_by[blocks], last_by[blocks];
        float *y = v + T * Dp, *out = y + T * Dp, *across = out + T * Dp, *scores = across + Dp * Tp, *wide = scores + T * Tp;
        if (!q) lost = 1;
        else memset(across, 0, (size_t)(Dp * Tp) * 4);
#pragma omp for
        for (int64_t i = 0; i < a->batch * H; i++) {
            if (lost) continue;
            int64_t b = i / H, h = i % H;
            const float *first = a->qkv + b * T * row + h * D, *p = (const float *)a->weights + i * T * T;
            const float *grad = a->grad + (b * T * H + h) * D, *mixed = a->mixed + (b * T * H + h) * D;
            float *into = a->grad_qkv + b * T * row + h * D;
            if (kind != FP32) {
                const uint16_t *codes = (const uint16_t *)a->weights + i * T * T;
#pragma omp simd
                for (int64_t j = 0; j < T * T; j++) wide[j] = of_code(codes[j], kind);
                p = wide;
            }
            turned(a, b, first, row, q, Dp, Dp, scale, 1, 1, kind);
            turned(a, b, first + H * D, row, k, Dp, Dp, 1, 1, 1, kind);
            turned(a, b, first + 2 * H * D, row, v, Dp, Dp, 1, 1, 0, FP32);
            turned(a, b, grad, H * D, y, Dp, Dp, 1, 1, 0, FP32);
            transposed(T, D, v, Dp, across, Tp);
            float of_y = largest_of(y, T * Dp), of_v = largest_of(v, T * Dp);
            int tame = (float)D * of_y * of_v < 1e38f && largest_of(q, T * Dp) < INFINITY && largest_of(k, T * Dp) < INFINITY;
            const int32_t *seen = a->seen + i * blocks * 2;
            /* Queries [first_by, last_by) are those of the blocks that see some of a block of keys. */
            for (int64_t m = 0; m < blocks; m++) first_by[m] = tame ? T : 0, last_by[m] = tame ? 0 : T;
            for (int64_t t = 0; t < T; t += BLOCK) {
                int64_t count = T - t < BLOCK ? T - t : BLOCK, low = tame ? seen[t / BLOCK * 2] : 0;
                int64_t high = tame ? seen[t / BLOCK * 2 + 1] : T;
                for (int64_t m = low / BLOCK; m < blocks_of(high); m++) {
                    first_by[m] = t < first_by[m] ? t : first_by[m];
                    last_by[m] = t + count > last_by[m] ? t + count : last_by[m];
                }
                product(count, whole(high) - low, D, y + t * Dp, Dp, 1, across + low, Tp, scores + t * Tp + low, Tp);
                for (int64_t u = t; u < t + count; u++) {
                    float *s = scores + u * Tp, off = 0;
                    const float *w = p + u * T;
                    memset(s, 0, (size_t)low * 4);
                    memset(s + high, 0, (size_t)(Tp - high) * 4);
                    if (kind == FP32) {
#pragma omp simd reduction(+ : off)
                        for (int64_t d = 0; d < D; d++) off += y[u * Dp + d] * mixed[u * H * D + d];
                        for (int64_t j = low; j < high; j++) s[j] = w[j] * (s[j] - off);
                    } else {
#pragma omp simd reduction(+ : off)
                        for (int64_t j = low; j < high; j++) off += w[j] * s[j];
#pragma omp simd
                        for (int64_t j = low; j < high; j++) s[j] = rounded(a->divisor * (w[j] * (s[j] - off)), kind);
                    }
                }
            }
            for (int64_t m = 0; m < blocks; m++) {
                int64_t j = m * BLOCK, count = T - j < BLOCK ? T - j : BLOCK, from = first_by[m], K = last_by[m] - from;
                product(count, Dp, K, p + from * T + j, 1, T, y + from * Dp, Dp, out + j * Dp, Dp);
            }
            turned(a, b, out, Dp, into + 2 * H * D, row, D, 1, 1, 0, FP32);
            for (int64_t t = 0; t < T; t += BLOCK) {
                int64_t count = T - t < BLOCK ? T - t : BLOCK, low = tame ? seen[t / BLOCK * 2] : 0;
                int64_t K = (tame ? seen[t / BLOCK * 2 + 1] : T) - low;
                product(count, Dp, K, scores + t * Tp + low, Tp, 1, k + low * Dp, Dp, out + t * Dp, Dp);
            }
            turned(a, b, out, Dp, into, row, D, scale, -1, 1, kind);
            for (int64_t m = 0; m < blocks; m++) {
                int64_t j = m * BLOCK, count = T - j < BLOCK ? T - j : BLOCK, from = first_by[m], K = last_by[m] - from;
                product(count, Dp, K, scores + from * Tp + j, 1, Tp, q + from * Dp, Dp, out + j * Dp, Dp);
            }
            turned(a, b, out, Dp, into + H * D, row, D, 1, -1, 1, kind);
        }
        free(q);
    }
    return lost;
}

int glm_attention_backward(const Attention *a) {
    return a->kind == FP16   ? attention_backward(a, FP16)
           : a->kind == BF16 ? attention_backward(a, BF16)
                             : attention_backward(a, FP32);
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

/* The same in a half format, computed in fp32 and rounded once; F(b) is computed again on the way back. */
INLINE void half_gelu(int64_t N, int64_t I, const uint16_t *raised, uint16_t *y, int kind) {
#pragma omp parallel for
    for (int64_t n = 0; n < N; n++) {
        const uint16_t *a = raised + 2 * n * I, *b = a + I;
        uint16_t *into = y + n * I;
#pragma omp simd
        for (int64_t i = 0; i < I; i++) {
            float wide = of_code(b[i], kind);
            into[i] = code_of(rounded(of_code(a[i], kind) * (wide * normal(wide)), kind), kind);
        }
    }
}

INLINE void half_gelu_backward(int64_t N, int64_t I, const uint16_t *raised, const uint16_t *dy, uint16_t *grad, int kind) {
#pragma omp parallel for
    for (int64_t n = 0; n < N; n++) {
        const uint16_t *a = raised + 2 * n * I, *b = a + I, *g = dy + n * I;
        uint16_t *da = grad + 2 * n * I, *db = da + I;
        for (int64_t first = 0; first < I; first += BLOCK) { /* of a and b by themselves: compilers make no vectors of both at once */
            int64_t count = I - first < BLOCK ? I - first : BLOCK;
            float of_a[BLOCK], of_b[BLOCK];
#pragma omp simd
            for (int64_t i = 0; i < count; i++) {
                float wide = of_code(b[first + i], kind), up = of_code(g[first + i], kind), below = normal(wide);
                float density = 0.398942280f * exp_below(-0.5f * wide * wide);
                of_a[i] = up * (wide * below);
                of_b[i] = up * of_code(a[first + i], kind) * (below + wide * density);
            }
#pragma omp simd
            for (int64_t i = 0; i < count; i++) da[first + i] = code_of(rounded(of_a[i], kind), kind);
#pragma omp simd
            for (int64_t i = 0; i < count; i++) db[first + i] = code_of(rounded(of_b[i], kind), kind);
        }
    }
}

void glm_half_gelu(int64_t N, int64_t I, int64_t kind, const uint16_t *raised, uint16_t *y) {
    if (kind == FP16) half_gelu(N, I, raised, y, FP16);
    else half_gelu(N, I, raised, y, BF16);
}

void glm_half_gelu_backward(int64_t N, int64_t I, int64_t kind, const uint16_t *raised, const uint16_t *dy, uint16_t *grad) {
    if (kind == FP16) half_gelu_backward(N, I, raised, dy, grad, FP16);
    else half_gelu_backward(N, I, raised, dy, grad, BF16);
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
