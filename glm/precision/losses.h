/* Cross-entropy and z-loss of rows of logits. */

/* Replaces rows of logits by their gradients, softmax (1 + 2 c z) - onehot, z = log sum exp; loss[n] = z - logit + c z^2. */
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
