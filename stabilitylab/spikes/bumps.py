"""Excursions over a running median, which only the values on both sides show.

A running median T of 2h + 1 values lets a monotone fall pass unchanged: e = x - T. Their scale s is the median absolute deviation
in the neighbourhood (times 1.48), that of their means of four likewise, so each statistic is measured by its own scatter. A value
is out where e > max(7 k^2 s, floor), k from quantiles of e / s over those of a Gaussian, or where a mean of four is over 7 k^2 of
its own deviations. An excursion lasts while e > 2.5 s, and is more than a hard batch where at least three values stand over 4 s.
This finds excursions that the first 32 values, a short log, or a steep fall hide.

A median of fifty follows what rises over a hundred values. So the module does the same with medians of 4 and of 16 neighbours, in
which a slow rise is as sharp as a jump in single values. Each scale is judged by its own scatter, so a wave counts as noise of its
scale. Only a rise of 8 % above what was before counts there.

In a log of every fifth step one value out may stand for several steps, and is a spike if the noise is *even*: it reaches down no
further than a Gaussian's, and its shoulders (1.5 to 3 s) are as full above as below. Otherwise the noise itself throws values out,
and the value is a hard batch.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from stabilitylab.spikes import baseline
from stabilitylab.spikes.baseline import BAND_SIGMAS, DEEPEST, EVEN, GROUP, MAD, RIPPLE, SHOULDER
from stabilitylab.spikes.detector import LOSS_FLOOR
from stabilitylab.spikes.series import rolling_mean, rolling_median
from stabilitylab.spikes.verdict import HARD_STEPS

BACK_SIGMAS = 2.5
MEAN_SHARE = 0.6
GAUSS_90, GAUSS_98 = 1.2816, 2.0537
COUNTED_SIGMAS = 4.0
SHORT = 400
COARSE = (4, 16)
COARSE_FLOOR = 0.08
LEAST_BLOCKS = 32
RISE_BLOCKS = 6
RISE_LEAST = 3
RISE_SHARE = 0.5
END_FACTOR = 1.5
SAMPLED = 65_536

Vector = NDArray[np.float64]
BumpSpan = tuple[int, int, str]  # first and last index, kind


def centred_median(values_N: Vector, width: int) -> Vector:
    """The median of ``width`` values around each one, as far as there are."""
    after = (width - 1) // 2
    return rolling_median(values_N, width - 1 - after, after)


def ripple(values_N: Vector) -> float:
    """``baseline.ripple_of`` of an array."""
    return MAD * RIPPLE * float(np.median(np.abs(np.diff(values_N, 2)))) if len(values_N) > 2 else 0.0


def running_median(values_N: Vector, half: int) -> Vector:
    """The median of 2 half + 1 values; near the start of as many as lie before, so that a fall passes unchanged."""
    median_N = centred_median(values_N, 2 * half + 1)
    for i in range(min(half, len(values_N))):
        median_N[i] = np.median(values_N[: 2 * i + 1])
    return median_N


def quantum_of(values_N: Vector) -> float:
    """The unit that values were rounded to, where most neighbours are within eight such units; else 0."""
    steps_N = np.abs(np.diff(values_N[:4096]))
    steps_N = steps_N[steps_N > 0]
    if not len(steps_N):
        return 0.0
    least = float(steps_N.min())
    units_N = steps_N / least
    rounded = bool((np.abs(units_N - np.round(units_N)) < 1e-3).all())
    return least if rounded and float(np.median(units_N)) <= 8 else 0.0


def _scale(residuals_N: Vector, width: int) -> Vector:
    """A local robust deviation, at least half of the whole log's."""
    absolute_N = np.abs(residuals_N)
    whole = MAD * float(np.median(absolute_N))
    return np.maximum(MAD * _local_median(absolute_N, width), 0.5 * whole)


def _local_median(values_N: Vector, width: int) -> Vector:
    """``centred_median``; a long log takes every fourth value, and as many of them: there a scale changes slowly."""
    n = len(values_N)
    if n <= SAMPLED:
        return centred_median(values_N, width)
    return np.repeat(centred_median(np.ascontiguousarray(values_N[::GROUP]), width), GROUP)[:n]


def _scale_of_fours(four_N: Vector) -> Vector:
    """``_scale`` of running means of four over some 161 values; of every fourth one where there are many."""
    n = len(four_N)
    if n < SHORT:
        return _scale(four_N, min(n, 161))
    scale_K = _scale(np.ascontiguousarray(four_N[GROUP - 1 :: GROUP]), 41)
    return np.append(np.repeat(scale_K, GROUP), np.full(GROUP, scale_K[-1]))[:n]


def sample(values_N: Vector) -> Vector:
    """All values, or 16 pieces spread evenly over a long log: enough for one number about the whole."""
    piece = SAMPLED // 16
    if len(values_N) <= SAMPLED:
        return values_N
    every = len(values_N) // 16
    return np.ascontiguousarray(values_N[: 16 * every].reshape(16, every)[:, :piece]).ravel()


def coarse_excursions(values_N: Vector, width: int) -> list[BumpSpan]:
    """Excursions of medians of ``width`` values, which rise too slowly for single values and fours."""
    count = len(values_N) // width
    if count < LEAST_BLOCKS:
        return []
    skipped = len(values_N) - count * width
    blocks_B = np.median(values_N[skipped:].reshape(count, width), axis=1)
    found = []
    for first, last, kind in excursions(blocks_B, sparse=False, floor=COARSE_FLOOR):
        before_B, within_B = blocks_B[max(0, first - RISE_BLOCKS) : first], blocks_B[first : last + 1]
        # Where a rising plateau ends in a fall, the median stands low without any rise.
        rises = len(before_B) and np.median(within_B) - np.median(before_B) > 0.5 * COARSE_FLOOR * abs(
            float(np.median(before_B))
        )
        if kind != "hard-batch" and rises:
            end = skipped + (last + 1) * width - 1
            found.append((skipped + first * width, end, kind))
    return found


def joined(spans: list[BumpSpan], more: list[BumpSpan]) -> list[BumpSpan]:
    """``spans``, and those of ``more`` that overlap no excursion of the state; each replaces the hard batches that it overlaps."""
    for first, last, kind in more:
        inside = [one for one in spans if one[0] <= last and one[1] >= first]
        if any(one[2] != "hard-batch" for one in inside):
            continue
        spans = sorted([*(one for one in spans if one not in inside), (first, last, kind)])
    return spans


def excursions(values_N: Vector, *, sparse: bool, floor: float = LOSS_FLOOR) -> list[BumpSpan]:
    """Excursions of single values and of means of four.

    Args:
        values_N: finite.
        sparse: whether a value stands for several steps, so that a single one may be a spike.
        floor: the smallest rise that counts, as a share of the running median.
    """
    n = len(values_N)
    half = int(np.clip(n // 5, 5, 25))
    trend_N, scale_N = _trend(values_N, half)
    residual_N = values_N - trend_N
    floor_N = floor * np.abs(trend_N)
    positive_N = np.maximum(scale_N, 1e-9 * np.abs(trend_N) + 1e-300)
    q02, q90, q98 = np.quantile(residual_N / positive_N, [0.02, 0.9, 0.98])
    # In a short log the excursion itself makes up many of the values: there the lower tail, if heavy, stands for both.
    tail = -q02 / GAUSS_98 - 2 / math.sqrt(n) if n < SHORT else min(q98 / GAUSS_98, (q90 / GAUSS_90) ** 3)
    tail = max(1.0, float(tail))
    # Correlated neighbours say less about their scale.
    rho = correlation(residual_N, float(np.median(scale_N)))
    unsure = 1 + 8 / n + rho**2 * (0.5 + 1.5 * math.sqrt((1 + rho) / (1 - rho) / n))
    limit_N = np.maximum(baseline.LIMIT_SIGMAS * tail**2 * unsure * scale_N, floor_N)
    clipped_N = np.minimum(residual_N, 0.8 * limit_N)
    four_N = rolling_mean(clipped_N, GROUP)
    scale4_N = np.maximum(_scale_of_fours(four_N), 0.5 * scale_N)
    limit4_N = np.maximum(baseline.LIMIT_SIGMAS * tail**2 * unsure * scale4_N, MEAN_SHARE * floor_N)
    seeds = np.flatnonzero((residual_N > limit_N) | ((four_N > limit4_N) & (residual_N > 0)))
    out_N = residual_N > np.maximum(BACK_SIGMAS * scale_N, 0.25 * floor_N)
    even = sparse and is_even(residual_N / positive_N)
    spans: list[BumpSpan] = []
    for seed in seeds.tolist():
        if spans and seed <= spans[-1][1]:
            continue
        if not out_N[seed]:
            continue
        first, last = _run(out_N, seed, -1), _run(out_N, seed, 1)
        if not _rises(values_N, residual_N, first, last):
            continue
        run = slice(first, last + 1)
        values = max(
            int((residual_N[run] > COUNTED_SIGMAS * scale_N[run]).sum()),
            int(out_N[run].sum()) - HARD_STEPS - 1,
        )
        # In a sparse log a single value out may stand for several steps, unless the noise itself throws values out.
        kind = "spike" if values > HARD_STEPS or even else "hard-batch"
        if kind == "spike" and last == n - 1 and values > HARD_STEPS:
            over = residual_N[first:]
            if np.median(over[-max(1, len(over) // 4) :]) >= 0.5 * np.median(over):
                kind = "divergence"
        spans.append((first, last, kind))
    return spans


def _rises(values_N: Vector, residual_N: Vector, first: int, last: int) -> bool:
    """Whether it stands over the values before it. The end of a plateau before a drop is over the median of both, but did not
    rise."""
    if not first:
        return True
    before_N, run = values_N[max(0, first - RISE_BLOCKS) : first], slice(first, last + 1)
    before = min(float(np.median(before_N)), float(np.median(before_N[-RISE_LEAST:])))
    return float(np.median(values_N[run])) - before > RISE_SHARE * float(np.median(residual_N[run]))


def deviations(values_N: Vector) -> Vector:
    """The residual of each value over the running median, in units of the scale around it."""
    trend_N, scale_N = _trend(values_N, int(np.clip(len(values_N) // 5, 5, 25)))
    return (values_N - trend_N) / np.maximum(scale_N, 1e-9 * np.abs(trend_N) + 1e-300)


def is_even(deviations_N: Vector) -> bool:
    """Whether noise reaches down no further than a Gaussian's, and its shoulders are even."""
    size_N = np.abs(deviations_N)
    shoulder_N = (size_N > SHOULDER) & (size_N < BAND_SIGMAS)
    high, low = int((shoulder_N & (deviations_N > 0)).sum()), int((shoulder_N & (deviations_N < 0)).sum())
    return int((deviations_N < -DEEPEST).sum()) <= len(deviations_N) // 20_000 and high < EVEN * max(low, 4)


def correlation(residual_N: Vector, scale: float) -> float:
    """The correlation of neighbours, outliers clipped; between 0 and .95."""
    clipped_N = np.clip(residual_N, -3 * scale, 3 * scale)
    power = float(clipped_N @ clipped_N)
    rho = float(clipped_N[1:] @ clipped_N[:-1]) / power if power else 0.0
    return min(max(rho, 0.0), 0.95)


def _trend(values_N: Vector, half: int) -> tuple[Vector, Vector]:
    """A running median and the deviation about it; in a short log, computed again with outliers bridged."""
    n = len(values_N)
    # Where the fall is steeper than the noise, the median is the value itself; second differences still show the noise.
    bends_N = np.abs(np.diff(values_N, 2, prepend=values_N[0], append=values_N[-1])) / math.sqrt(6)
    least_N = np.maximum(MAD * _local_median(bends_N, min(n, 31)), quantum_of(values_N))
    trend_N = running_median(values_N, half)
    for repeat in range(4):
        residual_N = values_N - trend_N
        scale_N = np.maximum(_scale(residual_N, min(n, 101)), least_N)
        if n >= SHORT or repeat == 3:
            break
        # Straight lines bridge them, so that a fall stays a fall.
        inside = np.flatnonzero(residual_N <= BACK_SIGMAS * scale_N)
        trend_N = running_median(np.interp(np.arange(n), inside, values_N[inside]), half)
    # At the end the window is one-sided, and correlated noise stands further from it.
    scale_N[-half:] *= END_FACTOR
    return trend_N, scale_N


def _run(out_N: NDArray[np.bool_], at: int, direction: int) -> int:
    """The last index out, going on over single values that are not."""
    n = len(out_N)
    while True:
        if 0 <= at + direction < n and out_N[at + direction]:
            at += direction
        elif 0 <= at + 2 * direction < n and out_N[at + 2 * direction]:
            at += 2 * direction
        else:
            return at
