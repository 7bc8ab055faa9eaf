/* One pass over a tensor: counts, power sums, largest magnitude, per-channel extremes and squares, tail histogram.
 *
 * The tensor is a matrix of rows (tokens) by channels (features). The pass takes blocks that stay in the first-level
 * cache, and sweeps over each block twice, since the second sweep needs what the first found:
 *
 *   1. on the bits.  The bits of |x|, read as an integer, order like |x|, with NaN above infinity above every number:
 *      the largest integer is the largest magnitude and propagates NaN, and each count is an integer comparison,
 *      whatever the processor does to subnormal numbers.
 *   2. on the values.  With c the block's mean and s a power of two near 1/max|x|, sums of ((x - c) s)^k for k = 1..4
 *      in float32, several partial sums side by side. Scaling by s keeps the fourth power within float32's range,
 *      centring keeps the sums from cancelling. In float64 the pass turns them into sums of x^k and adds these up.
 *
 * native.py compiles this file at first use, with the system's C compiler. A twin in torch operations (summary.py) has
 * the same results up to rounding; it runs where there is no compiler and on accelerators.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __F16C__
#include <immintrin.h>
#endif

#include "stabilitylab/formats/float_bits.h"

enum { FLOAT32, BFLOAT16, FLOAT16 };
/* The layout of a row; summary.py has the same list, and a test compares the two through their numbers. */
enum { COUNT, NONFINITE, ZERO, SUBNORMAL, FP16_LOST, FP8_LOST, OVER_6, OVER_6RMS, MASSIVE, S1, S2, S3, S4, SUMS,
       ABSMAX = SUMS, TAIL_FROM, FIELDS };

#define BLOCK 4096
#define SAMPLE 2048
#define GROUP 32
#define LARGE 65536
#define INFINITE 0x7f800000u
/* The tail histogram: 8 bins an octave from 2^-24 to 2^16; what lies outside counts in the first or last bin. */
#define TAIL_SHIFT 20
#define TAIL_FIRST ((127u - 24u) << 3)
#define TAIL_BINS 320

typedef struct {
    const void *data;      /* rows x channels, contiguous */
    int64_t rows, channels;
    int32_t dtype;
    int32_t fresh;         /* 1: overwrite the outputs; 0: merge with what is there */
    double *row;           /* FIELDS numbers */
    uint32_t *channel_max; /* bits of the largest magnitude of each channel, or NULL */
    float *channel_square; /* sum of squares of each channel, with channel_max */
    uint32_t *tail;        /* TAIL_BINS counts, or NULL */
    float tail_from;       /* in and out: the histogram leaves out magnitudes below it */
    float unused;          /* keeps the size a multiple of 8 bytes */
} Job;

static float from_half(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, fraction = h & 0x3ffu, bits;
    if (exponent == 0) {
        bits = bits_of((float)fraction * 0x1p-24f) | sign;
    } else {
        bits = sign | (exponent == 31 ? INFINITE : (exponent + 112u) << 23) | (fraction << 13);
    }
    return of_bits(bits);
}

static void load(const void *data, int32_t dtype, int64_t first, int64_t n, float *restrict out) {
    const uint16_t *half = (const uint16_t *)data + first;
    if (dtype == BFLOAT16) {
        uint32_t *bits = (uint32_t *)out;
        for (int64_t i = 0; i < n; i++) bits[i] = (uint32_t)half[i] << 16;
        return;
    }
    int64_t i = 0;
#ifdef __F16C__
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(half + i))));
#endif
    for (; i < n; i++) out[i] = from_half(half[i]);
}

INLINE uint32_t magnitude(float x) { return bits_of(x) & 0x7fffffffu; }

static int64_t count_from(const float *restrict x, int64_t n, uint32_t from) {
    int32_t c = 0;
    for (int64_t i = 0; i < n; i++) c += (int32_t)magnitude(x[i]) >= (int32_t)from;
    return c;
}

/* Adds one block's numbers to row[0 .. FIELDS). */
static void add_block(const float *restrict x, int64_t n, uint32_t subnormal, double *row) {
    int32_t high = 0, low = 0x7fffffff;
    float sum = 0;
    for (int64_t i = 0; i < n; i++) {
        int32_t u = (int32_t)magnitude(x[i]);
        high = u > high ? u : high;
        low = u < low ? u : low;
        sum += x[i];
    }
    int64_t nan = 0;
    row[COUNT] += (double)n;
    if ((uint32_t)high >= INFINITE) {
        row[NONFINITE] += (double)count_from(x, n, INFINITE);
        nan = count_from(x, n, INFINITE + 1);
    }
    if (high >= (int32_t)magnitude(6.0f)) row[OVER_6] += (double)(count_from(x, n, magnitude(6.0f)) - nan);
    if (low <= (int32_t)magnitude(0x1p-10f)) {
        int64_t above_zero = n - (low == 0 ? n - count_from(x, n, 1) : 0);
        row[ZERO] += (double)(n - above_zero);
        row[FP8_LOST] += (double)(above_zero - count_from(x, n, magnitude(0x1p-10f) + 1));
        if (low <= (int32_t)magnitude(0x1p-25f))
            row[FP16_LOST] += (double)(above_zero - count_from(x, n, magnitude(0x1p-25f) + 1));
        if (low < (int32_t)subnormal) row[SUBNORMAL] += (double)(above_zero - count_from(x, n, subnormal));
    }
    double absmax = (double)of_bits((uint32_t)high);
    if ((uint32_t)high > INFINITE || row[ABSMAX] < absmax) row[ABSMAX] = absmax;
    if ((uint32_t)high >= INFINITE) {
        /* Nothing to scale: plain summation gives NaN for a NaN, and the right infinity or NaN for an infinity. */
        for (int64_t i = 0; i < n; i++) {
            double v = x[i];
            row[S1] += v, row[S2] += v * v, row[S3] += v * v * v, row[S4] += v * v * v * v;
        }
        return;
    }
    if (high == 0) return;
    /* s = 2^-exponent is near 1/max|x|; clamped, so that both s and 1/s are normal numbers. */
    int exponent;
    frexp(absmax, &exponent);
    exponent = exponent < -124 ? -124 : exponent > 124 ? 124 : exponent;
    const double unit = ldexp(1.0, exponent);
    const float s = (float)ldexp(1.0, -exponent), c = sum / (float)n;
    if (!isfinite(c)) {
        for (int64_t i = 0; i < n; i++) {
            double v = x[i];
            row[S1] += v, row[S2] += v * v, row[S3] += v * v * v, row[S4] += v * v * v * v;
        }
        return;
    }
    float m1 = 0, m2 = 0, m3 = 0, m4 = 0;
    for (int64_t i = 0; i < n; i++) {
        float d = (x[i] - c) * s, d2 = d * d;
        m1 += d;
        m2 += d2;
        m3 += d2 * d;
        m4 += d2 * d2;
    }
    const double k = (double)n, a = (double)c * (double)s, t1 = m1, t2 = m2, t3 = m3, t4 = m4;
    row[S1] += (t1 + k * a) * unit;
    row[S2] += (t2 + 2 * a * t1 + k * a * a) * unit * unit;
    row[S3] += (t3 + 3 * a * t2 + 3 * a * a * t1 + k * a * a * a) * unit * unit * unit;
    row[S4] += (t4 + 4 * a * t3 + 6 * a * a * t2 + 4 * a * a * a * t1 + k * a * a * a * a) * unit * unit * unit * unit;
}

static void add_channels(const float *restrict x, int64_t rows, int64_t channels, uint32_t *restrict high,
                         float *restrict square) {
    int32_t *restrict top = (int32_t *)high;
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4, x += 4 * channels) /* four rows for one access to the sums */
        for (int64_t j = 0; j < channels; j++) {
            const float a = x[j], b = x[j + channels], c = x[j + 2 * channels], d = x[j + 3 * channels];
            const int32_t u = (int32_t)magnitude(a), v = (int32_t)magnitude(b);
            const int32_t w = (int32_t)magnitude(c), z = (int32_t)magnitude(d);
            const int32_t uv = u > v ? u : v, wz = w > z ? w : z, m = uv > wz ? uv : wz;
            top[j] = m > top[j] ? m : top[j];
            square[j] += (a * a + b * b) + (c * c + d * d);
        }
    for (; r < rows; r++, x += channels)
        for (int64_t j = 0; j < channels; j++) {
            const int32_t u = (int32_t)magnitude(x[j]);
            top[j] = u > top[j] ? u : top[j];
            square[j] += x[j] * x[j];
        }
}

static void add_tail(const float *restrict x, int64_t n, uint32_t from, uint32_t *restrict tail) {
    for (int64_t i = 0; i < n; i += GROUP) {
        int64_t end = n;
        if (i + GROUP <= n) { /* few groups have anything above the threshold, and this test is cheap */
            int32_t any = 0;
            for (int64_t j = 0; j < GROUP; j++) any |= (int32_t)magnitude(x[i + j]) >= (int32_t)from;
            if (!any) continue;
            end = i + GROUP;
        }
        for (int64_t j = i; j < end; j++) {
            uint32_t u = magnitude(x[j]);
            if (u < from || u > INFINITE) continue;
            int32_t bin = (int32_t)(u >> TAIL_SHIFT) - (int32_t)TAIL_FIRST;
            tail[bin < 0 ? 0 : bin >= TAIL_BINS ? TAIL_BINS - 1 : bin]++;
        }
    }
}

/* The bits of the magnitude that this share of the elements exceeds, from at most SAMPLE elements at equal distances. */
static uint32_t sampled(const Job *job, double share) {
    uint32_t u[SAMPLE];
    int64_t n = job->rows * job->channels, m = n < SAMPLE ? n : SAMPLE;
    for (int64_t i = 0; i < m; i++) {
        int64_t at = (int64_t)((double)i * (double)n / (double)m);
        float x;
        if (job->dtype == FLOAT32) x = ((const float *)job->data)[at];
        else load(job->data, job->dtype, at, 1, &x);
        u[i] = magnitude(x);
    }
    int64_t k = (int64_t)(share * (double)m), left = 0, right = m - 1;
    while (left < right) { /* Hoare's quickselect, descending */
        uint32_t pivot = u[(left + right) / 2];
        int64_t i = left, j = right;
        while (i <= j) {
            while (u[i] > pivot) i++;
            while (u[j] < pivot) j--;
            if (i <= j) {
                uint32_t t = u[i];
                u[i++] = u[j];
                u[j--] = t;
            }
        }
        if (k <= j) right = j;
        else if (k >= i) left = i;
        else break;
    }
    return u[k];
}

typedef struct {
    const Job *job;
    uint32_t tail_from, over, massive; /* bits; over and massive only in the second pass */
    double row[FIELDS];
    uint32_t *channel_max, *tail;
    float *channel_square;
    int first_pass, with_tail;
} Part;

static void sweep(Part *part, int64_t first_row, int64_t last_row) {
    const Job *job = part->job;
    const int64_t channels = job->channels;
    const uint32_t subnormal = job->dtype == FLOAT16 ? magnitude(0x1p-14f) : 0x00800000u;
    float converted[BLOCK];
    const int64_t step_rows = channels <= BLOCK ? BLOCK / channels : 1;
    for (int64_t r = first_row; r < last_row; r += step_rows) {
        const int64_t rows = r + step_rows < last_row ? step_rows : last_row - r;
        /* A row wider than a block takes several blocks; this one begins at channel j. */
        for (int64_t j = 0; j < channels; j += BLOCK) {
            const int64_t width = channels - j < BLOCK ? channels - j : BLOCK;
            const int64_t at = r * channels + j, n = step_rows > 1 || channels <= BLOCK ? rows * channels : width;
            const float *x = converted;
            if (job->dtype == FLOAT32) x = (const float *)job->data + at;
            else load(job->data, job->dtype, at, n, converted);
            if (part->first_pass) {
                add_block(x, n, subnormal, part->row);
                if (part->channel_max != NULL)
                    add_channels(x, n / width, width, part->channel_max + j, part->channel_square + j);
            } else {
                if (part->over) part->row[OVER_6RMS] += (double)count_from(x, n, part->over);
                if (part->massive) part->row[MASSIVE] += (double)count_from(x, n, part->massive);
            }
            if (part->with_tail) add_tail(x, n, part->tail_from, part->tail);
        }
    }
}

static void add_row(double *row, const double *other) {
    for (int i = 0; i < SUMS; i++) row[i] += other[i];
    for (int i = SUMS; i < FIELDS; i++)
        if (isnan(other[i]) || other[i] > row[i]) row[i] = other[i];
}

/* Runs the pass over all rows, in `threads` parts, and adds them up in order into `total`. */
static void pass(Part *total, int threads) {
    const int64_t rows = total->job->rows, channels = total->job->channels;
    if (threads <= 1) {
        sweep(total, 0, rows);
        return;
    }
    const int64_t block_rows = channels <= BLOCK ? BLOCK / channels : 1, blocks = (rows + block_rows - 1) / block_rows;
    Part *parts = malloc((size_t)threads * sizeof(Part));
    char *scratch = NULL;
    const size_t bytes = (size_t)channels * 8 + TAIL_BINS * 4;
    if (parts != NULL) scratch = calloc((size_t)threads, bytes);
    if (scratch == NULL) { /* no memory for parts: sweep in one thread */
        free(parts);
        sweep(total, 0, rows);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++) {
        Part *part = parts + t;
        *part = *total;
        memset(part->row, 0, sizeof part->row);
        char *mine = scratch + (size_t)t * bytes;
        if (total->channel_max != NULL) {
            part->channel_max = (uint32_t *)mine;
            part->channel_square = (float *)(mine + channels * 4);
        }
        part->tail = (uint32_t *)(mine + channels * 8);
        /* Cut between blocks, so that the blocks and their sums are the same as with one thread. */
        int64_t first = blocks * t / threads * block_rows, last = blocks * (t + 1) / threads * block_rows;
        sweep(part, first, last < rows ? last : rows);
    }
    for (int t = 0; t < threads; t++) {
        add_row(total->row, parts[t].row);
        if (total->channel_max != NULL)
            for (int64_t j = 0; j < channels; j++) {
                if (parts[t].channel_max[j] > total->channel_max[j]) total->channel_max[j] = parts[t].channel_max[j];
                total->channel_square[j] += parts[t].channel_square[j];
            }
        if (total->with_tail)
            for (int b = 0; b < TAIL_BINS; b++) total->tail[b] += parts[t].tail[b];
    }
    free(scratch);
    free(parts);
}

static uint64_t total(const uint32_t *tail) {
    uint64_t sum = 0;
    for (int b = 0; b < TAIL_BINS; b++) sum += tail[b];
    return sum;
}

/* Thresholds are edges of bins, so that any threshold counts a bin either in full or not at all. */
static float edge_at_or_below(uint32_t bits) {
    if (bits >> TAIL_SHIFT <= TAIL_FIRST || bits > INFINITE) return 0;
    const uint32_t last = TAIL_FIRST + TAIL_BINS - 1, bin = bits >> TAIL_SHIFT;
    return of_bits((bin < last ? bin : last) << TAIL_SHIFT);
}

/* The threshold for the next tensor of this site: the highest edge with one element in 500 above it. */
static float next_threshold(const uint32_t *tail, uint64_t n) {
    uint64_t count = 0;
    int b = TAIL_BINS;
    while (b > 0 && count < n / 500 + 2) count += tail[--b];
    return b == 0 ? 0 : of_bits((TAIL_FIRST + (uint32_t)b) << TAIL_SHIFT);
}

static void summarise(Job *job, int threads) {
    const int64_t n = job->rows * job->channels;
    uint32_t counted[TAIL_BINS];
    Part part = {.job = job, .first_pass = 1, .with_tail = job->tail != NULL};
    part.tail = counted;
    part.channel_max = job->channel_max;
    part.channel_square = job->channel_square;
    if (job->fresh && job->channel_max != NULL) {
        memset(job->channel_max, 0, (size_t)job->channels * 4);
        memset(job->channel_square, 0, (size_t)job->channels * 4);
    }
    if (n < LARGE) threads = 1;
    if (job->rows < threads) threads = (int)job->rows;
    if (part.with_tail) {
        if (!(job->tail_from >= 0)) job->tail_from = edge_at_or_below(sampled(job, 0.002));
        part.tail_from = magnitude(job->tail_from);
        memset(counted, 0, sizeof counted);
    }
    pass(&part, threads);
    Part second = {.job = job};
    if (part.with_tail) {
        uint64_t above = total(counted);
        /* The threshold fitted an older tensor: does it fit this one? More elements must lie above it than the one in
         * 1,000 that the statistics need, so that parts with other thresholds can be added. */
        for (int attempt = 0; above < (uint64_t)n / 700 + 2 && job->tail_from > 0; attempt++) {
            job->tail_from = attempt < 2 ? edge_at_or_below(sampled(job, attempt == 0 ? 0.005 : 0.03)) : 0;
            Part again = {.job = job, .with_tail = 1, .tail_from = magnitude(job->tail_from), .tail = counted};
            memset(counted, 0, sizeof counted);
            pass(&again, threads);
            above = total(counted);
        }
        part.row[TAIL_FROM] = job->tail_from;
        job->tail_from = next_threshold(counted, (uint64_t)n);
        const double rms = sqrt(part.row[S2] / (double)n);
        if (6 * rms > 0 && part.row[ABSMAX] >= 6 * rms && rms < 1e37) second.over = magnitude((float)(6 * rms));
        if (part.row[ABSMAX] > 100) {
            double median = (double)of_bits(sampled(job, 0.5));
            second.massive = median < 0.1 ? magnitude(100.0f) + 1 : median < 1e35 ? magnitude((float)(1000 * median)) : 0;
        }
    }
    if (second.over || second.massive) {
        pass(&second, threads);
        add_row(part.row, second.row);
    }
    if (job->fresh) memcpy(job->row, part.row, sizeof part.row);
    else add_row(job->row, part.row);
    if (job->tail != NULL)
        for (int b = 0; b < TAIL_BINS; b++) job->tail[b] = (job->fresh ? 0 : job->tail[b]) + counted[b];
}

/* The threads take small tensors whole, and share the rows of a large one. */
void stabilitylab_summarise(Job *const *jobs, int64_t n, int threads) {
    if (n == 1) {
        summarise(jobs[0], threads);
        return;
    }
    for (int64_t i = 0; i < n; i++)
        if (threads > 1 && jobs[i]->rows * jobs[i]->channels >= LARGE) summarise(jobs[i], threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (int64_t i = 0; i < n; i++)
        if (threads <= 1 || jobs[i]->rows * jobs[i]->channels < LARGE) summarise(jobs[i], 1);
}

/* An integer that orders like x, negative numbers included, and back. */
static inline int32_t ordered(float x) {
    int32_t bits = (int32_t)bits_of(x);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

static float unordered(int32_t u) { return of_bits((uint32_t)(u ^ ((u >> 31) & 0x7fffffff))); }

static void score_range(const float *restrict x, int64_t n, int32_t cutoff, int32_t *highest, int32_t *lowest,
                        int32_t *any_nan) {
    int32_t high = *highest, low = *lowest, nan = 0;
    for (int64_t i = 0; i < n; i++) {
        const int32_t u = ordered(x[i]), hidden = -(u <= cutoff), seen = (u & ~hidden) | (INT32_MAX & hidden);
        high = u > high ? u : high;
        low = seen < low ? seen : low;
        const int32_t size = (int32_t)magnitude(x[i]);
        nan = size > nan ? size : nan;
    }
    *highest = high, *lowest = low;
    *any_nan |= nan > (int32_t)INFINITE;
}

/* A score this far below its row's largest has no weight in any format: it is presumably masked. */
#define DEPTH 1000.0f

/* Range of one row's scores above the cutoff, as ordered integers; the smallest is no more than DEPTH below the largest. */
static void row_range(const void *data, int32_t dtype, int64_t at, int64_t keys, int32_t cutoff, int32_t *highest,
                      int32_t *lowest, int32_t *any_nan) {
    float converted[BLOCK];
    int32_t high = INT32_MIN, low = INT32_MAX;
    for (int pass = 0; pass < 2; pass++) {
        low = INT32_MAX;
        for (int64_t i = 0; i < keys; i += BLOCK) {
            const int64_t m = keys - i < BLOCK ? keys - i : BLOCK;
            const float *x = converted;
            if (dtype == FLOAT32) x = (const float *)data + at + i;
            else load(data, dtype, at + i, m, converted);
            score_range(x, m, cutoff, &high, &low, any_nan);
        }
        if (high <= cutoff || low == INT32_MAX || *any_nan) break;
        const float deepest = unordered(high) - DEPTH;
        if (!(unordered(low) < deepest)) break;
        cutoff = ordered(deepest);
    }
    *highest = high > *highest ? high : *highest;
    *lowest = low < *lowest ? low : *lowest;
}

/* Largest and smallest attention score of each head, of contiguous [batch, heads, rows, keys]; scores <= masked do not count.
 * Merges with the ranges that are there. A NaN score makes the head's maximum NaN. */
void stabilitylab_scores(const void *data, int32_t dtype, int64_t batch, int64_t heads, int64_t rows, int64_t keys,
                         float masked, double *largest, double *negated_smallest) {
    const int32_t cutoff = ordered(masked);
    for (int64_t bh = 0; bh < batch * heads; bh++) {
        int32_t high = INT32_MIN, low = INT32_MAX, nan = 0;
        for (int64_t t = 0; t < rows; t++)
            row_range(data, dtype, (bh * rows + t) * keys, keys, cutoff, &high, &low, &nan);
        const int64_t h = bh % heads;
        double top = nan ? NAN : high > cutoff ? (double)unordered(high) : -INFINITY;
        double bottom = low == INT32_MAX ? INFINITY : (double)unordered(low);
        if (!(top <= largest[h])) largest[h] = isnan(largest[h]) ? NAN : top;
        if (-bottom > negated_smallest[h]) negated_smallest[h] = -bottom;
    }
}

typedef struct {
    const float *weight;   /* contiguous, n numbers */
    float *before;         /* sampled weights as they were before the update */
    int64_t n, stride, sampled;
    const float *gradient; /* n numbers, or NULL */
    const float *first;    /* Adam's moments, n numbers each, or NULL */
    const float *second;
    float correction;      /* second / correction has no initial bias: 1 - beta2^t, or 1 */
    float epsilon2;        /* epsilon^2 */
    double *out;           /* UPDATE_FIELDS numbers; updates.py has the same list */
} Update;

enum { U_COUNT, U_SAMPLED, U_UPDATE2, U_WEIGHT2, U_RATIO2, U_FIRST2, U_SECOND2, U_BELOW, UPDATE_FIELDS };

void stabilitylab_before(Update *const *updates, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        const Update *u = updates[i];
        for (int64_t j = 0; j < u->sampled; j++) u->before[j] = u->weight[j * u->stride];
    }
}

static void after(const Update *u) {
    double *out = u->out;
    double moved = 0, weight = 0, ratio = 0, first = 0, second = 0;
    int64_t below = 0;
    for (int64_t j = 0; j < u->sampled; j++) {
        const double w = u->weight[j * u->stride], d = w - (double)u->before[j];
        moved += d * d;
        weight += (double)u->before[j] * (double)u->before[j];
    }
    if (u->first != NULL && u->second != NULL) {
        const float unbiased = 1.0f / u->correction;
        for (int64_t i = 0; i < u->n; i += BLOCK) {
            const int64_t end = i + BLOCK < u->n ? i + BLOCK : u->n;
            float r = 0;
            double m2 = 0, v2 = 0; /* fourth powers of a gradient do not fit into float32 */
            int32_t c = 0;
            for (int64_t j = i; j < end; j++) {
                const float v = u->second[j] * unbiased;
                m2 += (double)u->first[j] * (double)u->first[j];
                v2 += (double)u->second[j] * (double)u->second[j];
                c += v < u->epsilon2;
            }
            if (u->gradient != NULL)
                for (int64_t j = i; j < end; j++) {
                    const float v = u->second[j] * unbiased, g = u->gradient[j];
                    r += g * g / (v > u->epsilon2 ? v : u->epsilon2);
                }
            ratio += r, first += m2, second += v2, below += c;
        }
    }
    out[U_COUNT] = (double)u->n;
    out[U_SAMPLED] = (double)u->sampled;
    out[U_UPDATE2] = moved;
    out[U_WEIGHT2] = weight;
    out[U_RATIO2] = u->gradient != NULL && u->second != NULL ? ratio : NAN;
    out[U_FIRST2] = u->first != NULL ? first : -1; /* -1: there is no such moment */
    out[U_SECOND2] = u->second != NULL ? second : -1;
    out[U_BELOW] = u->second != NULL ? (double)below : NAN;
}

void stabilitylab_after(Update *const *updates, int64_t n, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (int64_t i = 0; i < n; i++) after(updates[i]);
}

/* Relative rounding error of a length in float32, and of a score. */
#define ROUNDING 1e-5f

/* One call of fused attention: what its log-sum-exp and a few rows tell about its scores (scores.py has the reasoning).
 * Strides are in elements; the last dimension of queries and keys is contiguous. */
typedef struct {
    const void *query, *key;
    int64_t batch, heads, key_heads, queries, keys, width;
    int64_t query_stride[3], key_stride[3]; /* batch, head, position */
    const float *lse;
    int64_t lse_stride[3];
    const void *mask; /* or NULL; broadcast dimensions have stride 0 */
    int64_t mask_stride[4];
    int32_t mask_is_bool, dtype, causal, rows; /* rows: how many to sample, at equal distances, of the first batch element */
    float scale, masked;
    double *largest, *sampled, *negated_smallest, *entropy; /* heads numbers each */
} Attention;

static float mask_at(const Attention *a, int64_t b, int64_t h, int64_t t, int64_t s) {
    const int64_t at = b * a->mask_stride[0] + h * a->mask_stride[1] + t * a->mask_stride[2] + s * a->mask_stride[3];
    if (a->mask_is_bool) return ((const uint8_t *)a->mask)[at] ? 0 : -INFINITY;
    return ((const float *)a->mask)[at];
}

static int sees_any(const Attention *a, int64_t b, int64_t h, int64_t t) {
    if (a->mask == NULL) return 1;
    for (int64_t s = 0; s < a->keys; s++)
        if (mask_at(a, b, h, t, s) > a->masked) return 1;
    return 0;
}

/* Scores of row (b, h, t) into `out`; `q` and `k` are scratch of one head's width. */
static void score_row(const Attention *a, int64_t b, int64_t h, int64_t t, float *q, float *k, float *out) {
    const int64_t width = a->width;
    const int64_t q_at = b * a->query_stride[0] + h * a->query_stride[1] + t * a->query_stride[2];
    const int64_t k_at = b * a->key_stride[0] + h * a->key_heads / a->heads * a->key_stride[1];
    if (a->dtype == FLOAT32) memcpy(q, (const float *)a->query + q_at, (size_t)width * 4);
    else load(a->query, a->dtype, q_at, width, q);
    for (int64_t s = 0; s < a->keys; s++) {
        if (a->causal && s > t) {
            out[s] = -INFINITY;
            continue;
        }
        const int64_t at = k_at + s * a->key_stride[2];
        const float *row = k;
        if (a->dtype == FLOAT32) row = (const float *)a->key + at;
        else load(a->key, a->dtype, at, width, k);
        float dot = 0;
        for (int64_t j = 0; j < width; j++) dot += q[j] * row[j];
        out[s] = dot * a->scale + (a->mask != NULL ? mask_at(a, b, h, t, s) : 0);
    }
}

/* Length of the head's vector at element `at`; `scratch` has room for one vector. */
static float length_of(const void *data, int32_t dtype, int64_t at, int64_t width, float *scratch) {
    const float *x = scratch;
    if (dtype == FLOAT32) x = (const float *)data + at;
    else load(data, dtype, at, width, scratch);
    float square = 0;
    for (int64_t j = 0; j < width; j++) square += x[j] * x[j];
    return sqrtf(square);
}

/* No score of a row exceeds this times the length of its query; infinite where the mask adds a bias. */
static float reach(const Attention *a, int64_t b, int64_t h, float *scratch) {
    if (a->mask != NULL && !a->mask_is_bool) return INFINITY;
    const int64_t first = b * a->key_stride[0] + h * a->key_heads / a->heads * a->key_stride[1];
    float longest = 0;
    for (int64_t s = 0; s < a->keys; s++) {
        const float length = length_of(a->key, a->dtype, first + s * a->key_stride[2], a->width, scratch);
        longest = length > longest ? length : longest;
    }
    return longest * fabsf(a->scale) * (1 + ROUNDING);
}

static double entropy(const float *x, int64_t n, float masked) {
    float high = -INFINITY;
    for (int64_t i = 0; i < n; i++) high = x[i] > high ? x[i] : high;
    if (!(high > masked)) return 0;
    double total = 0, weighted = 0;
    for (int64_t i = 0; i < n; i++)
        if (x[i] > masked) {
            const float d = x[i] - high, e = expf(d);
            total += e;
            weighted += (double)e * d;
        }
    return log(total) - weighted / total;
}

/* Returns 0, or 1 where there is no memory for a row. */
int stabilitylab_attention(const Attention *a) {
    float *scratch = malloc((size_t)(a->keys + 2 * a->width) * sizeof(float));
    if (scratch == NULL) return 1;
    float *scores = scratch, *q = scratch + a->keys, *k = q + a->width;
    for (int64_t h = 0; h < a->heads; h++) {
        float best = -INFINITY, second = -INFINITY;
        int64_t best_b = 0, best_t = 0, nan = 0;
        for (int64_t b = 0; b < a->batch; b++) {
            const float farthest = reach(a, b, h, k);
            for (int64_t t = 0; t < a->queries; t++) {
                const float l = a->lse[b * a->lse_stride[0] + h * a->lse_stride[1] + t * a->lse_stride[2]];
                if (l <= second || !sees_any(a, b, h, t)) continue;
                if (isnan(l)) {
                    nan = 1;
                    continue;
                }
                const int64_t at = b * a->query_stride[0] + h * a->query_stride[1] + t * a->query_stride[2];
                const float c = isinf(farthest) ? l : farthest * length_of(a->query, a->dtype, at, a->width, q);
                const float bound = c < l ? c : l;
                if (bound > best) second = best, best = bound, best_b = b, best_t = t;
                else if (bound > second) second = bound;
            }
        }
        float sampled = -INFINITY, smallest = INFINITY, exact = -INFINITY;
        double sum = 0;
        for (int64_t r = 0; r <= a->rows; r++) {
            const int64_t b = r < a->rows ? 0 : best_b, t = r < a->rows ? (r + 1) * a->queries / a->rows - 1 : best_t;
            score_row(a, b, h, t, q, k, scores);
            float top = -INFINITY;
            for (int64_t s = 0; s < a->keys; s++) top = scores[s] > top ? scores[s] : top;
            for (int64_t s = 0; s < a->keys; s++)
                if (scores[s] > a->masked) {
                    sampled = scores[s] > sampled ? scores[s] : sampled;
                    smallest = scores[s] < smallest && scores[s] > top - DEPTH ? scores[s] : smallest;
                    if (r == a->rows) exact = scores[s] > exact ? scores[s] : exact;
                } else if (isnan(scores[s])) {
                    nan = 1;
                }
            if (r < a->rows) sum += entropy(scores, a->keys, a->masked);
        }
        const float bound = exact > second ? exact : second;
        a->largest[h] = nan ? NAN : bound > sampled ? bound : sampled;
        a->sampled[h] = nan ? NAN : sampled;
        a->negated_smallest[h] = -(double)smallest;
        a->entropy[h] = nan ? NAN : sum / (double)a->rows;
    }
    free(scratch);
    return 0;
}
