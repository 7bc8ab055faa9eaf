/* Attention, one head at a time, in blocks of queries whose scores stay in the first-level cache:
 *
 *     q^ = c R q,  k^ = R k        R: rotation by position, or the identity;  c: scale;  ': transposed
 *     S = d q^ k^' + bias,  P = softmax(S) (kept),  Y = P V
 *     dV = P' dY,  dS = P * (dY V' - sum_d dY Y),  dq = c d R' dS k^,  dk = R' (d dS' q^)
 *
 * Keys that a block of queries may not see (bias -inf) weigh 0 in every sum. The kernel leaves them out, in whole vectors, where
 * nothing could turn that 0 into a NaN: half of the work under a causal mask, with the same bits.
 *
 * In a half format the kernel rounds whatever a half kernel would multiply or store: q^, k^, q^ k^' (which overflows where it would
 * there), P, and in the backward pass d dS, dq and dk; it keeps P in its 16 bits. There it takes sum_j P dP for sum_d dY Y, since a
 * rounded Y would move all of a row's dS to one side (2510.04212).
 */

typedef struct {
    int64_t batch, tokens, heads, width; /* B, T, H, D */
    const float *qkv;                    /* [B, T, 3, H, D] */
    const float *cosine, *sine;          /* [B, T, groups, pairs], or NULL; width = 2 groups pairs */
    int64_t groups, pairs, turn_stride;  /* turn_stride: from row to row of B, 0 where all rotate alike */
    const float *bias;                   /* [B, H, T, T] by strides, the last one 1 */
    int64_t bias_stride[3];
    float scale, divisor;
    int64_t kind;  /* of the formats above */
    void *weights; /* P, [B, H, T, T], in 16 bits where the format is half */
    float *mixed;   /* Y, [B, T, H, D] */
    const float *grad; /* dY, [B, T, H, D] */
    float *grad_qkv;   /* [B, T, 3, H, D] */
    float *largest;    /* largest score of each head, NaN left out, [B, H], or NULL */
    int32_t *seen;     /* each block of queries sees keys [first, last), [B, H, blocks, 2]; the forward pass fills it */
} Attention;

/* out[t, :padded] = factor R x[t], zeros beyond the width; direction -1 rotates back. Rounds where half kernels would store. */
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

/* The same in fp32 for heads of 16 that rotate as one group: compilers do not vectorise loops this short. */
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

/* Not inlined: inside attention compilers do not vectorise it. */
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

/* max |x|; NaN if any element is. */
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

/* Sets the range of keys [seen[0], seen[1]) that these queries see; all keys where one query sees none, as its weights are NaN. */
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
    for (int64_t u = 0; u < count; u++) /* short: most queries see themselves */
        if (bias[u * stride + t + u] == -INFINITY && !any_seen(bias + u * stride, T)) low = 0, high = T;
    seen[0] = (int32_t)low, seen[1] = (int32_t)high;
}

static int64_t blocks_of(int64_t T) { return (T + BLOCK - 1) / BLOCK; }

/* Returns 0, or 1 where there is no memory. */
INLINE int attention(const Attention *a, int kind) {
    int64_t T = a->tokens, H = a->heads, D = a->width, Dp = whole(D), Tp = whole(T), row = 3 * H * D;
    int lost = 0;
#pragma omp parallel reduction(| : lost)
    {
        float *q = room(T * Dp * 3 + Dp * Tp + BLOCK * Tp), *k = q + T * Dp, *v = k + T * Dp, *across = v + T * Dp;
        float *scores = across + Dp * Tp;
        int32_t span[2 * blocks_of(T)]; /* of the last row of B: its heads mostly see the same keys */
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
                    float *mixed = across + Dp * Tp; /* the scores are used up: Y goes to their memory first */
                    product(count, Dp, high - low, (float *)a->weights + (i * T + t) * T + low, T, 1, v + low * Dp, Dp, mixed, Dp);
                    for (int64_t u = 0; u < count; u++)
                        memcpy(a->mixed + ((b * T + t + u) * H + h) * D, mixed + u * Dp, (size_t)D * 4);
                } else {
                    float *mixed = q + t * Dp; /* so are these queries */
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
    /* In fp32 d multiplies q^ and dq; in a half format it multiplies dS, before the rounding. */
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
            /* For each block of keys, the queries [first_by, last_by) are those of the blocks that see any of it. */
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
