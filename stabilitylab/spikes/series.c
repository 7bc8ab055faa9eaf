/* The fast path through long logs: ordinary values of a signal, rolling medians, and the spike score's windows.

   The Python twins are baseline.py with excursion.py, degenerate_values.py, and pandas. From ordinary values this code learns
   the same baseline to the bit: the same operations in the same order, compiled without fusing or reordering. Where a
   value may begin an excursion, the pass ends before it, and Python judges. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 16
#define GROUP 4
#define RECENT 32

/* The fields of Baseline that change, in their order, then its floors. */
typedef struct {
    double blocks, level, scale1, scale4, scale16, ripple, tail, lower_tail, upper, lower, deepest, slow, lowest, quantum;
    double relative_floor, absolute_floor;
} Baseline;
#define STATE 14

/* The constants of baseline.py, in the order in which compiled.py gives them. */
typedef struct {
    double band_sigmas, limit_sigmas, band_share, mean_share, unsure, unsure_correlated, correlated, least, clip;
    double clipped_square, gain1, gain4, gain16, early_blocks, tail_step, tail_decay, most_tail, shoulder, shape_gain;
    double forget_depth, fall_sigmas, creep_gain, creep_sigmas, creep_share, doubled_sigmas, ripple, end_share;
} Constants;

typedef struct {
    double block[BLOCK], recent[RECENT];
    double creep_onset; /* NaN: none */
    int64_t in_block, in_recent, over, creep;
} Quiet;

static inline double larger(double a, double b) { return b > a ? b : a; }  /* Python's max keeps the first of equals */
static inline double smaller(double a, double b) { return b < a ? b : a; }

static void sort(double *x, int n) {
    for (int i = 1; i < n; i++) {
        double v = x[i];
        int j = i;
        for (; j > 0 && x[j - 1] > v; j--) x[j] = x[j - 1];
        x[j] = v;
    }
}

static double median(const double *x, int n) {
    double s[RECENT];
    memcpy(s, x, n * sizeof *s);
    sort(s, n);
    return n % 2 ? s[n / 2] : 0.5 * (s[n / 2 - 1] + s[n / 2]);
}

static double sigma_of(const Baseline *b) { return larger(larger(b->scale1, b->ripple), b->quantum); }

static double floor_of(const Baseline *b) { return larger(b->relative_floor * fabs(b->level), b->absolute_floor); }

static double unsure(const Baseline *b, const Constants *c) {
    int correlated = b->ripple < c->correlated * b->scale1;
    return 1.0 + (correlated ? c->unsure_correlated : c->unsure) / b->blocks;
}

static double factor_of(const Baseline *b) {
    if (b->tail <= b->lower_tail) return b->tail;
    double skewed = b->upper / larger(b->lower, 1e-3) - 1.5;
    return b->lower_tail + (b->tail - b->lower_tail) * smaller(1.0, larger(0.0, skewed));
}

static double moved(double scale, const double *values, int n, double gain, int two_sided, const Constants *c) {
    double bound = c->clip * scale, total = 0.0;
    for (int i = 0; i < n; i++) {
        double x = values[i];
        if (x > 0.0) total += x > bound ? bound * bound : x * x;
    }
    if (!two_sided) total *= 2.0;
    return scale * exp(gain * (total / (n * scale * scale * c->clipped_square) - 1.0));
}

static void see_quantum(Baseline *b, const double *x) {
    double steps[BLOCK];
    int n = 0;
    for (int i = 0; i + 1 < BLOCK; i++)
        if (x[i] != x[i + 1]) steps[n++] = fabs(x[i] - x[i + 1]);
    if (!n) return;
    sort(steps, n);
    double least = steps[0];
    int rounded = 0;
    for (int i = 0; i < n; i++) rounded += fabs(steps[i] / least - nearbyint(steps[i] / least)) < 1e-3;
    b->quantum = rounded == n && steps[n / 2] <= 8 * least ? least : 0.0;
}

static void learn_shape(Baseline *b, const double *residuals, const Constants *c) {
    double sigma = sigma_of(b), reach = c->band_sigmas * sigma_of(b) * b->lower_tail;
    double wide = c->band_sigmas * sigma, near = c->shoulder * sigma, before = 0.0, lowest = 0.0;
    int high = 0, low = 0, runs = 0;
    for (int i = 0; i < BLOCK; i++) {
        double r = residuals[i];
        if (r < 0.0) {
            lowest = smaller(lowest, r);
            low += -wide < r && r < -near;
            runs += r < -reach && -reach <= before;
        } else {
            high += near < r && r < wide;
        }
        before = r;
    }
    double gain = larger(c->shape_gain, 1 / b->blocks);
    b->upper += gain * ((double)high / BLOCK - b->upper);
    b->lower += gain * ((double)low / BLOCK - b->lower);
    b->deepest = larger(c->forget_depth * b->deepest, sigma > 0.0 ? -lowest / sigma : 0.0);
    b->lower_tail =
        smaller(c->most_tail, larger(1.0, b->lower_tail * c->tail_decay * pow(c->tail_step, (double)runs)));
}

static void learn(Baseline *b, const double *block, const Constants *c) {
    double residuals[BLOCK], clipped[BLOCK], fours[GROUP], bends[BLOCK], level = b->level;
    double middle = median(block, BLOCK);
    if (middle < level) {
        double slope = (middle - level) / BLOCK, start = middle - slope * (BLOCK - 1) / 2;
        for (int i = 0; i < BLOCK; i++) residuals[i] = block[i] - start - slope * i;
    } else {
        for (int i = 0; i < BLOCK; i++) residuals[i] = block[i] - level;
    }
    double floor = larger(larger(b->quantum, 1e-9 * fabs(level)), c->least);
    double early = 1 / (b->blocks + c->early_blocks);
    double gain1 = larger(c->gain1, early), gain4 = larger(c->gain4, early), gain16 = larger(c->gain16, early);
    b->scale1 = moved(larger(b->scale1, floor), residuals, BLOCK, gain1, 0, c);
    double clip = c->band_sigmas * b->scale1 * b->tail, total = 0.0;
    for (int i = 0; i < BLOCK; i++) clipped[i] = residuals[i] < clip ? residuals[i] : clip;
    for (int k = 0; k < BLOCK / GROUP; k++) {
        double sum = 0.0;
        for (int i = 0; i < GROUP; i++) sum += clipped[k * GROUP + i];
        fours[k] = sum / GROUP;
    }
    for (int i = 0; i < BLOCK; i++) total += clipped[i];
    double mean = total / BLOCK;
    b->scale4 = smaller(moved(larger(b->scale4, 0.25 * floor), fours, BLOCK / GROUP, gain4, 0, c), b->scale1);
    b->scale16 = smaller(moved(larger(b->scale16, 0.1 * floor), &mean, 1, gain16, 0, c), b->scale4);
    for (int i = 0; i + 2 < BLOCK; i++) bends[i] = c->ripple * fabs(block[i] - 2 * block[i + 1] + block[i + 2]);
    b->ripple = moved(larger(b->ripple, floor), bends, BLOCK - 2, gain1, 1, c);
    b->level = middle;
    b->tail = larger(1.0, b->tail * c->tail_decay);
    if (middle >= level)
        for (int i = 0; i < BLOCK; i++) residuals[i] = block[i] - middle;
    learn_shape(b, residuals, c);
    b->blocks += 1;
    if (b->quantum) see_quantum(b, block);
    b->slow += c->creep_gain * (b->level - b->slow);
    if (b->slow < b->lowest) b->lowest = b->slow;
}

static double creep_of(const Baseline *b, const Constants *c) {
    if (!(b->slow > b->lowest)) return 0.0;
    double share = b->relative_floor ? c->creep_share * fabs(b->lowest) : 0.0;
    double limit = larger(larger(larger(c->creep_sigmas * sigma_of(b), share), b->absolute_floor), 1e-300);
    if (b->relative_floor && b->lowest > sigma_of(b))
        limit = smaller(limit, larger(c->doubled_sigmas * sigma_of(b), b->lowest));
    return (b->slow - b->lowest) / limit;
}

/* Take values in until one may begin an excursion; returns the number of values taken.

   states: the baseline's STATE numbers after each learned block; block_ends: the index of that block's last value. */
int64_t stabilitylab_quiet(const double *values, const int64_t *steps, int64_t count, Baseline *base, Quiet *quiet,
                           const Constants *c, double *states, int64_t *block_ends, int64_t *blocks_learned) {
    int64_t learned = 0, at = 0;
    double *block = quiet->block, *recent = quiet->recent;
    while (at < count) {
        double level = base->level, sigma = sigma_of(base), floor = floor_of(base), k = factor_of(base);
        double u = unsure(base, c);
        double limit = larger(c->limit_sigmas * sigma * (k * k) * u, floor);
        double band = larger(c->band_sigmas * sigma * k, c->band_share * floor);
        double odd = larger(c->band_sigmas * sigma * base->tail, c->band_share * floor);
        double scale = larger(base->scale4, sigma * (0.5 + 0.5 / larger(1, base->blocks)));
        double limit4 = larger(c->limit_sigmas * scale * k * u, c->mean_share * floor);
        scale = larger(larger(base->scale16, 0.7 * base->scale4), sigma / 4);
        double limit16 = larger(c->limit_sigmas * scale * u, c->mean_share * floor);
        double clip4 = larger(3 * sigma * k, 1.25 * limit4), clip16 = larger(3 * sigma * k, 1.5 * limit16);
        int full = 0;
        for (; at < count && !full; at++) {
            double value = values[at], residual = value - level;
            int64_t n = quiet->in_recent;
            if (residual > limit) goto stop;
            if (n >= GROUP) {
                double top = larger(larger(larger(recent[n - 1], recent[n - 2]), recent[n - 3]), recent[n - 4]);
                if (!(level - top <= c->fall_sigmas * sigma || value - top <= limit)) goto stop;
            }
            if (residual > -band && n >= 3 * GROUP) {
                const double *last = recent + n - (3 * GROUP - 1);
                double mean = 0.0;
                for (int i = 2 * GROUP; i < 3 * GROUP - 1; i++) mean += smaller(last[i] - level, clip4);
                mean = (smaller(residual, clip4) + mean) / GROUP;
                if (mean <= limit4) {
                    double first = 0.0, second = 0.0;
                    for (int i = 0; i < GROUP; i++) {
                        first += larger(last[i] - level, -clip4);
                        second += larger(last[GROUP + i] - level, -clip4);
                    }
                    mean -= smaller(0.0, larger(first, second) / GROUP);
                }
                if (mean > limit4) goto stop;
            }
            int64_t filled = quiet->in_block;
            int over = residual > odd && !(filled && block[filled - 1] - level > odd);
            block[filled] = value;
            if (filled == BLOCK - 1) {
                double mean = 0.0;
                for (int i = 0; i < BLOCK; i++) mean += smaller(block[i] - level, clip16);
                if (mean / BLOCK > limit16) goto stop;
                Baseline next = *base;
                if (quiet->over + over)
                    next.tail = smaller(c->most_tail, next.tail * pow(c->tail_step, (double)(quiet->over + over)));
                learn(&next, block, c);
                if (quiet->creep) {
                    double crept = creep_of(&next, c);
                    if (crept >= 1.0) goto stop;
                    if (crept < c->end_share) quiet->creep_onset = NAN;
                    else if (isnan(quiet->creep_onset)) quiet->creep_onset = (double)steps[at];
                }
                *base = next;
                memcpy(states + learned * STATE, base, STATE * sizeof *states);
                block_ends[learned++] = at;
                quiet->in_block = quiet->over = 0;
                full = 1;
            } else {
                quiet->in_block++;
                quiet->over += over;
            }
            if (n == RECENT) {
                memmove(recent, recent + 1, (RECENT - 1) * sizeof *recent);
                n--;
            }
            recent[n] = value;
            quiet->in_recent = n + 1;
        }
    }
stop:
    *blocks_learned = learned;
    return at;
}

/* degenerate_values.py's ``skip``: state is previous, equal, since, repeats, longest, values. */
void stabilitylab_still(const double *values, const int64_t *steps, int64_t count, double gain, double *state) {
    double previous = state[0], equal = state[1], since = state[2], repeats = state[3], longest = state[4];
    double seen = state[5];
    for (int64_t i = 0; i < count; i++) {
        seen += 1;
        if (values[i] != previous) {
            if (seen > 1) {
                double base = 1 - larger(gain, 1 / seen), kept = equal == 1 ? base : pow(base, equal);
                repeats = kept * repeats + (1 - kept) * (equal - 1) / equal;
                longest = larger(longest, equal);
            }
            equal = 1;
            previous = values[i];
            since = (double)steps[i];
        } else {
            equal += 1;
        }
    }
    state[0] = previous, state[1] = equal, state[2] = since, state[3] = repeats, state[4] = longest, state[5] = seen;
}

/* The number of sorted numbers below value; without branches, which noise would make unpredictable. */
static int64_t place(const double *sorted, int64_t n, double value) {
    const double *low = sorted;
    while (n > 0) {
        int64_t half = (n + 1) / 2;
        low += low[half - 1] < value ? half : 0;
        n -= half;
    }
    return low - sorted;
}

/* out[i]: the median of those of x[i - before .. i + after] that exist. */
void stabilitylab_rolling_median(const double *x, int64_t n, int64_t before, int64_t after, double *out) {
    double *sorted = malloc((before + after + 2) * sizeof *sorted);
    int64_t held = 0;
    for (int64_t i = -after; i < n; i++) {
        int64_t in = i + after, gone = i - before - 1;
        if (gone >= 0 && in < n) { /* shift what lies between the two places by one */
            int64_t from = place(sorted, held, x[gone]), to = place(sorted, held, x[in]);
            if (to > from) {
                to--;
                memmove(sorted + from, sorted + from + 1, (to - from) * sizeof *sorted);
            } else {
                memmove(sorted + to + 1, sorted + to, (from - to) * sizeof *sorted);
            }
            sorted[to] = x[in];
        } else if (gone >= 0) {
            int64_t at = place(sorted, held, x[gone]);
            memmove(sorted + at, sorted + at + 1, (--held - at) * sizeof *sorted);
        } else if (in < n) {
            int64_t at = place(sorted, held, x[in]);
            memmove(sorted + at + 1, sorted + at, (held++ - at) * sizeof *sorted);
            sorted[at] = x[in];
        }
        if (i >= 0) out[i] = held % 2 ? sorted[held / 2] : (sorted[held / 2] + sorted[held / 2 - 1]) / 2;
    }
    free(sorted);
}

/* Compensated sums, which keep what rounding drops (Neumaier 1974). */
typedef struct {
    double sum, rest;
} Sum;

static void add(Sum *s, double x) {
    double t = s->sum + x;
    s->rest += fabs(s->sum) >= fabs(x) ? (s->sum - t) + x : (x - t) + s->sum;
    s->sum = t;
}

static double within(double x) { return fabs(x) < 1e100 ? x : copysign(1e100, x); }  /* so that its square is finite */

/* out[i]: whether |x_i - mean| >= sigmas * deviation of the window before it; 0 where that holds fewer than `minimum`. */
void stabilitylab_far_out(const double *x, int64_t n, int64_t window, int64_t minimum, double sigmas,
                          const double *size, int8_t *out) {
    Sum first = {0, 0}, second = {0, 0};
    double centre = n ? x[0] : 0.0;
    for (int64_t i = 0; i < n; i++) {
        int64_t held = i < window ? i : window;
        out[i] = 0;
        if (held >= minimum) {
            double mean = (first.sum + first.rest) / held;
            double square = (second.sum + second.rest) / held - mean * mean;
            double deviation = square > 0 ? sqrt(square) : 0.0;
            double least = larger(sigmas * deviation, 1e-9 * fabs(size[i]) + 1e-300);
            out[i] = fabs(x[i] - centre - mean) >= least;
        }
        double value = within(x[i] - centre);
        add(&first, value);
        add(&second, value * value);
        if (i >= window) {
            value = within(x[i - window] - centre);
            add(&first, -value);
            add(&second, -(value * value));
        }
    }
}
