/* Rounds numbers to a scaled format and back, in one sweep over the blocks: read, largest, scale, round, write.
 *
 *     s = scale of A = max |x| in the block        k = |x| / s in steps of the element, rounded        x^ = sign(x) s k step
 *
 * The results equal those of the torch operations in block_scaled.py and number_format.py bit for bit (these also give the
 * formulas' sources): every operation here is one of theirs, in their order, without contraction or reassociation. Only exact steps
 * differ: a step of the format is a power of two, so the kernel multiplies by its inverse; it compares |x| by its bits, where NaN is
 * above infinity.
 *
 * The matrix lies row by row. The caller does not transpose a transposed operand but its blocks, so the same code handles blocks of
 * 1 x 32 along the summed dimension on either side. The kernel goes through a band of as many rows as a block has in chunks that
 * stay in the cache: it takes the largest of each column, then of each group of columns, and spreads the scale over them again, all
 * in vectors.
 *
 * kernel.py compiles it at first use; threads are torch's own OpenMP pool.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "float_bits.h"

#define CHUNK 512 /* columns of a chunk, or as many as a block has */

enum { FP32, E8M0, E4M3 };

typedef struct {
    int32_t mantissa, bias, largest_exponent; /* of the element */
    int32_t scale, round_up;                  /* how the scale is stored */
    float largest;                            /* the element's largest finite number */
    float infinite, nan;                      /* what infinity and NaN become */
} Format;

/* Rounds x to the element's numbers: to nearest, ties to even, or stochastically, by adding drawn in [0, 1) and rounding down. */
INLINE float rounded(float x, const Format *f, float drawn, int stochastic) {
    uint32_t bits = bits_of(x), sign = bits & 0x80000000u, size = bits & 0x7fffffffu;
    int32_t exponent = (int32_t)(size >> 23) - 127, least = 1 - f->bias;
    exponent = exponent < least ? least : exponent;
    float step = of_bits((uint32_t)(exponent + 127 - f->mantissa) << 23);
    float count = of_bits(size) * of_bits((uint32_t)(127 - exponent + f->mantissa) << 23);
    count = stochastic ? floorf(count + drawn) : rintf(count);
    float near = count * step;
    near = near > f->largest ? f->largest : near;
    near = size > 0x7f800000u ? f->nan : size == 0x7f800000u ? f->infinite : near;
    return of_bits(bits_of(near) | sign);
}

static const Format SCALE = {3, 7, 8, 0, 0, 448.0f, NAN, NAN};

/* From a block's largest magnitude: `before` divides its numbers before the rounding (fp32 scales) or multiplies them (all other
 * scales), `after` multiplies them after it. */
INLINE void scaled(uint32_t largest_bits, const Format *f, float whole, float *before, float *after) {
    float largest = of_bits(largest_bits);
    if (f->scale == FP32) {
        float scale = largest / f->largest;
        scale = scale == 0 ? 1.0f : scale;
        *before = *after = isfinite(scale) ? scale : NAN;
    } else if (f->scale == E8M0) {
        int32_t field;
        if (f->round_up) {
            uint32_t ratio = bits_of(largest / f->largest);
            field = (int32_t)(ratio >> 23) + ((ratio & 0x7fffffu) > 0);
        } else
            field = (int32_t)(largest_bits >> 23) - f->largest_exponent;
        field = field < 0 ? 0 : field > 254 ? 254 : field;
        /* 2^-127, the smallest scale and the inverse of the largest, is subnormal. */
        *after = largest_bits >= 0x7f800000u ? NAN : of_bits(field ? (uint32_t)field << 23 : 0x400000u);
        *before = largest_bits >= 0x7f800000u ? NAN : of_bits(field == 254 ? 0x400000u : (uint32_t)(254 - field) << 23);
    } else {
        float block = rounded(largest / f->largest / whole, &SCALE, 0, 0);
        *before = block == 0 ? 0.0f : (1.0f / whole) / block;
        *after = whole * block;
    }
}

INLINE uint32_t size_of(float x) { return bits_of(x) & 0x7fffffffu; }

/* The bits of the largest |x|. */
static uint32_t largest_of(int64_t count, const float *x) {
    uint32_t top = 0;
#pragma omp parallel for simd reduction(max : top)
    for (int64_t i = 0; i < count; i++) top = size_of(x[i]) > top ? size_of(x[i]) : top;
    return top;
}

INLINE void row(int64_t count, const float *restrict x, const float *restrict drawn, const float *restrict before,
                const float *restrict after, float *restrict out, const Format *given, int divide, int stochastic) {
    const Format f = *given;
#pragma omp simd
    for (int64_t j = 0; j < count; j++) {
        float quotient = divide ? x[j] / before[j] : x[j] * before[j];
        out[j] = after[j] * rounded(quotient, &f, stochastic ? drawn[j] : 0, stochastic);
    }
}

/* x, drawn (or NULL), out [rows, columns]; a block is down x across, 0: all of them. Three numbers for each column of a block lie
 * on the stack: the caller makes sure that they fit. */
void stabilitylab_round(int64_t rows, int64_t columns, int64_t down, int64_t across, const float *x, const float *drawn, float *out,
                        const Format *f) {
    int64_t all = !down && !across;
    float whole = 0;
    uint32_t top = all || f->scale == E4M3 ? largest_of(rows * columns, x) : 0;
    if (f->scale == E4M3) {
        whole = of_bits(top) / (448.0f * f->largest);
        whole = whole == 0 ? 1.0f : whole;
    }
    down = all ? 1 : down ? down : rows;
    across = all ? CHUNK : across && across < columns ? across : columns;
    int64_t width = across < CHUNK ? CHUNK / across * across : across;
    int64_t bands = (rows + down - 1) / down, chunks = (columns + width - 1) / width;
#pragma omp parallel for collapse(2)
    for (int64_t band = 0; band < bands; band++)
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            int64_t first = chunk * width, count = columns - first < width ? columns - first : width;
            int64_t begin = band * down, end = begin + down < rows ? begin + down : rows;
            uint32_t most[count];
            float before[count], after[count];
            for (int64_t j = 0; j < count; j++) most[j] = all ? top : 0;
            for (int64_t r = begin; !all && r < end; r++) {
                const float *restrict given = x + r * columns + first;
#pragma omp simd
                for (int64_t j = 0; j < count; j++) most[j] = size_of(given[j]) > most[j] ? size_of(given[j]) : most[j];
            }
            for (int64_t j = 0; j < count; j += across) {
                int64_t ends = j + across < count ? j + across : count;
                uint32_t largest = most[j];
                for (int64_t i = j; i < ends; i++) largest = most[i] > largest ? most[i] : largest;
                scaled(largest, f, whole, before + j, after + j);
                for (int64_t i = j + 1; i < ends; i++) before[i] = before[j], after[i] = after[j];
            }
            for (int64_t r = begin; r < end; r++) {
                int64_t at = r * columns + first;
                if (drawn && f->scale == FP32) row(count, x + at, drawn + at, before, after, out + at, f, 1, 1);
                else if (drawn) row(count, x + at, drawn + at, before, after, out + at, f, 0, 1);
                else if (f->scale == FP32) row(count, x + at, NULL, before, after, out + at, f, 1, 0);
                else row(count, x + at, NULL, before, after, out + at, f, 0, 0);
            }
        }
}
