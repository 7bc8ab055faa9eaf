/* Gradients of weights; and gated GELU, y = a g(b), g(b) = b F(b), F and f the normal distribution and its density:
 *
 *     da = dy g(b),  db = dy a (F(b) + b f(b))
 */

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

/* F(x) = (1 + erf(z)) / 2, z = x / sqrt 2. erf is z times a polynomial in z^2 for |z| < 1, and 1 - e^(-z Q(z)) beyond; both are
 * fits to float64's erf, with errors below fp32's last bit. */
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

/* raised [N, 2 I] = [a, b] -> y [N, I] = a b F(b), and F(b) unless it is NULL. */
void glm_gated_gelu(int64_t N, int64_t I, const float *raised, float *y, float *cumulated) {
#pragma omp parallel for
    for (int64_t n = 0; n < N; n++) {
        const float *a = raised + 2 * n * I, *b = a + I;
        float *into = y + n * I;
        if (cumulated) {
            float *f = cumulated + n * I;
#pragma omp simd
            for (int64_t i = 0; i < I; i++) {
                f[i] = normal(b[i]);
                into[i] = a[i] * (b[i] * f[i]);
            }
        } else {
#pragma omp simd
            for (int64_t i = 0; i < I; i++) into[i] = a[i] * (b[i] * normal(b[i]));
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

/* The same in a half format, computed in fp32 and rounded once; the backward pass computes F(b) again. */
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
        for (int64_t first = 0; first < I; first += BLOCK) { /* a and b apart: compilers do not vectorise both at once */
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
