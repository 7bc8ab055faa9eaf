"""A second look at a finished log, to both sides: what a detector that sees value by value cannot know.

*Excursions* over a running median T of 2h + 1 values, which a monotone fall passes unchanged: e = x - T. Their scale s is
the median absolute deviation in the neighbourhood (times 1.48), that of their means of four likewise, so each is measured
by the scatter of its own statistic. Out is e > max(7 k^2 s, floor), k from quantiles of e / s over those of a Gaussian,
or a mean of four over 7 k^2 of its own deviations; an excursion lasts while e > 2.5 s, and is more than a hard batch
where at least three values stand over 4 s. This finds what the first 32 values, a short log, or a steep fall hide.

*Steps up for good*: the median of the next w values over that of the last w, beyond 7 deviations of that difference and
1.2 % of the level, with all that follows no less than half as high.

*Slow rises*: the medians of 48 blocks; the last ones stand over the lowest by 8 % and 8 deviations. A level that has
crossed the middle of the rise more than once is a wave, and none.

What overlaps an episode of the first pass is that episode; a hard batch that turns out to have been longer is a spike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stabilitylab.spikes.baseline import LIMIT_SIGMAS, ripple_of
from stabilitylab.spikes.detector import LOSS_FLOOR
from stabilitylab.spikes.episodes import Episode
from stabilitylab.spikes.excursion import HARD_STEPS
from stabilitylab.spikes.stillness import LARGEST

LEAST_VALUES = 20
STATES = ("spike", "divergence")
BACK_SIGMAS = 2.5
MEAN_SHARE = 0.6
STEP_FLOOR = 0.012
RISE_FLOOR = 0.08
RISE_SIGMAS = 8.0
BLOCKS = 48
END_VALUES = 64
MAD = 1.4826
LEAST_REPEATS = 4
NEAR = 32
WAVES = 5  # periods that a wave must have gone through
GAUSS_90, GAUSS_98 = 1.2816, 2.0537
COUNTED_SIGMAS = 4.0
SHORT = 400
END_FACTOR = 1.5

Vector = NDArray[np.float64]
Span = tuple[int, int, str]  # first and last index, kind


def second_look(
    episodes: Sequence[Episode], steps_N: NDArray[np.int64], values_N: Vector, *, signal: str
) -> list[Episode]:
    """``episodes`` with what both sides show, and the level after each.

    Args:
        episodes: of the first pass.
        steps_N: the log's steps; where they go back, the stretch after is looked at for itself.
        values_N: its losses.
        signal: the name that new episodes carry.
    """
    found = list(episodes)
    begin = 0
    for end in [*(np.flatnonzero(np.diff(steps_N) < 0) + 1).tolist(), len(steps_N)]:
        stretch = slice(begin, end)
        found = _look(found, steps_N[stretch], values_N[stretch], signal)
        begin = end
    bursts = [one for one in found if one.kind == "non-finite"]
    found = [one for one in found if not any(_is_part_of(one, burst) for burst in bursts)]
    found = _with_period(sorted(found, key=lambda one: one.onset))
    return [with_end_level(one, steps_N, values_N) if one.signal == signal else one for one in found]


def with_end_level(one: Episode, steps_N: NDArray[np.int64], values_N: Vector) -> Episode:
    """The median of the 64 values after the episode's end beside its level before."""
    if one.end is None or one.height is None or one.to_the_end:
        return one
    after = int(np.searchsorted(steps_N, one.end, side="right"))
    values = values_N[after : after + END_VALUES]
    values = values[np.isfinite(values)]
    return replace(one, end_level=float(np.median(values))) if len(values) >= 4 else one


def _is_part_of(one: Episode, burst: Episode) -> bool:
    """A bad value or two in the steps in which others were not finite are the same event."""
    inside = burst.onset <= one.onset and _end(one) <= _end(burst)
    return one.kind in ("hard-batch", "spike") and inside and _end(one) - one.onset <= HARD_STEPS


def as_one(episodes: Sequence[Episode], *, loss: str, norm: str) -> list[Episode]:
    """An episode of the gradient norm that overlaps one of the loss is the same one: it stands among its precursors.

    Where the norm left at most two steps earlier, the episode began there.
    """
    norms = [one for one in episodes if one.signal == norm and one.kind in STATES]
    joined: list[Episode] = []
    taken: list[Episode] = []
    for one in episodes:
        if one.signal == loss and one.kind in (*STATES, "non-finite"):
            for other in norms:
                if other.onset <= _end(one) and _end(other) >= one.onset:
                    taken.append(other)
                    told = min((t for t in (one.told, other.told) if t is not None), default=None)
                    lead = max(0, one.onset - other.onset)
                    one = replace(one, told=told, precursors={norm: lead, **one.precursors})
            if 0 < (lead := one.precursors.get(norm, 0)) <= HARD_STEPS:
                one = replace(one, onset=one.onset - lead)
        joined.append(one)
    return [one for one in joined if one not in taken]


def _with_period(episodes: list[Episode]) -> list[Episode]:
    """Hard batches that come again after the same number of steps say so: the last, smaller batch of each epoch, say."""
    hard = [one for one in episodes if one.kind == "hard-batch" and one.reason is None]
    if len(hard) < LEAST_REPEATS:
        return episodes
    gaps = np.diff([one.onset for one in hard])
    gap = int(np.median(gaps))
    if gap < 3 or np.mean(np.abs(gaps - gap) <= 1) < 0.8:
        return episodes
    return [replace(one, reason=f"a batch every {gap} steps") if one in hard else one for one in episodes]


def wave_period(steps_N: NDArray[np.int64], values_N: Vector) -> int | None:
    """The period, in steps, of a wave that makes up most of what the loss does about a straight line; else None."""
    values_N, steps_N = values_N[np.isfinite(values_N)], steps_N[np.isfinite(values_N)]
    width = max(1, len(values_N) // 1024)
    count = len(values_N) // width
    if count < 64:
        return None
    blocks_B = np.median(values_N[: count * width].reshape(count, width), axis=1)
    t = np.arange(count)
    blocks_B = blocks_B - np.polyval(np.polyfit(t, blocks_B, 1), t)
    power = np.abs(np.fft.rfft(blocks_B * np.hanning(count))) ** 2
    peak = int(power[WAVES:].argmax()) + WAVES
    if power[peak - 1 : peak + 2].sum() < 0.7 * power.sum():
        return None
    return round(float(steps_N[-1] - steps_N[0]) / peak)


def _look(found: list[Episode], steps_N: NDArray[np.int64], values_N: Vector, signal: str) -> list[Episode]:
    if len(steps_N) < LEAST_VALUES:
        return found
    usable_N = np.abs(values_N) < LARGEST
    own = [one for one in found if one.signal == signal and _within(one, steps_N)]
    for one in own:
        if one.kind in ("dead", "frozen"):
            usable_N &= (steps_N < one.onset) | (steps_N > _end(one))
    steps_N, values_N = steps_N[usable_N], values_N[usable_N]
    if len(steps_N) < LEAST_VALUES:
        return found
    spans = _excursions(steps_N, values_N)
    states = [one for one in own if one.kind in STATES]
    if (span := _step_up(values_N) or _slow_rise(values_N)) is not None:
        spans = [one for one in spans if one[1] < span[0]] + [span]
    for first, last, kind in spans:
        onset, end = int(steps_N[first]), int(steps_N[last])
        if kind == "divergence":
            seen = next((one for one in own if one.kind == "divergence" and _end(one) >= onset), None)
            if seen is not None:  # seen later than it began
                at = int(np.searchsorted(steps_N, seen.onset))
                if seen in found and seen.onset > onset and not _jumps(values_N, at):
                    found[found.index(seen)] = replace(seen, onset=onset)
                continue
            # What began with it is the same, what came later is not.
            end = int(steps_N[min(last, first + NEAR)])
        covering = [one for one in own if one.onset <= end and _end(one) >= onset]
        if any(one.kind not in ("hard-batch", "spike") for one in covering):
            continue
        if kind != "divergence" and any(one in states for one in covering):
            continue
        if kind == "hard-batch" and covering:
            continue
        told = next((one.told for one in covering), None)
        for one in covering:
            found.remove(one)
            own.remove(one)
        found.append(_episode(first, last, kind, steps_N, values_N, signal, told))
    return found


def _within(one: Episode, steps_N: NDArray[np.int64]) -> bool:
    return bool(len(steps_N)) and one.onset <= steps_N[-1] and _end(one) >= steps_N[0]


def _end(one: Episode) -> float:
    return math.inf if one.end is None else one.end


def _episode(
    first: int,
    last: int,
    kind: str,
    steps_N: NDArray[np.int64],
    values_N: Vector,
    signal: str,
    told: int | None,
) -> Episode:
    level = float(np.median(values_N[max(0, first - 16) : first])) if first else float(values_N[0])
    peak = first + int(values_N[first : last + 1].argmax())
    return Episode(
        kind=kind,
        onset=int(steps_N[first]),
        peak=int(steps_N[peak]),
        end=int(steps_N[last]),
        height=float(values_N[peak]) - level,
        signal=signal,
        told=told,
        to_the_end=last == len(values_N) - 1 and kind == "divergence",
        level=level,
    )


def _rolling_median(values_N: Vector, width: int) -> Vector:
    rolling = pd.Series(values_N).rolling(width, center=True, min_periods=1)
    return np.array(rolling.median(), dtype=np.float64)


def running_median(values_N: Vector, half: int) -> Vector:
    """The median of 2 half + 1 values; towards the start of as many as lie before, so that a fall passes unchanged."""
    median_N = _rolling_median(values_N, 2 * half + 1)
    for i in range(min(half, len(values_N))):
        median_N[i] = np.median(values_N[: 2 * i + 1])
    return median_N


def quantum_of(values_N: Vector) -> float:
    """What the values were rounded to, where most neighbours are within eight such units; else 0."""
    steps_N = np.abs(np.diff(values_N[:4096]))
    steps_N = steps_N[steps_N > 0]
    if not len(steps_N):
        return 0.0
    least = float(steps_N.min())
    units_N = steps_N / least
    rounded = bool((np.abs(units_N - np.round(units_N)) < 1e-3).all())
    return least if rounded and float(np.median(units_N)) <= 8 else 0.0


def _scale(residuals_N: Vector, width: int) -> Vector:
    """A local robust deviation, not under half of the whole one."""
    absolute_N = np.abs(residuals_N)
    whole = MAD * float(np.median(absolute_N))
    return np.maximum(MAD * _rolling_median(absolute_N, width), 0.5 * whole)


def _excursions(steps_N: NDArray[np.int64], values_N: Vector) -> list[Span]:
    n = len(values_N)
    half = int(np.clip(n // 5, 5, 25))
    trend_N, scale_N = _trend(values_N, half)
    residual_N = values_N - trend_N
    floor_N = LOSS_FLOOR * np.abs(trend_N)
    positive_N = np.maximum(scale_N, 1e-9 * np.abs(trend_N) + 1e-300)
    q02, q90, q98 = np.quantile(residual_N / positive_N, [0.02, 0.9, 0.98])
    # In a short log the excursion itself is many of the values: there the tail of the lower side speaks for both, if loudly.
    tail = -q02 / GAUSS_98 - 2 / math.sqrt(n) if n < SHORT else min(q98 / GAUSS_98, (q90 / GAUSS_90) ** 3)
    tail = max(1.0, float(tail))
    # A neighbourhood of correlated values says less of their scale.
    unsure = 1 + 8 / n + 0.5 * _correlation(residual_N, float(np.median(scale_N))) ** 2
    limit_N = np.maximum(LIMIT_SIGMAS * tail**2 * unsure * scale_N, floor_N)
    clipped_N = np.minimum(residual_N, 0.8 * limit_N)
    four_N = np.asarray(pd.Series(clipped_N).rolling(4).mean().fillna(0.0))
    scale4_N = np.maximum(_scale(four_N, min(n, 161)), 0.5 * scale_N)
    limit4_N = np.maximum(LIMIT_SIGMAS * tail**2 * unsure * scale4_N, MEAN_SHARE * floor_N)
    seeds = np.flatnonzero((residual_N > limit_N) | ((four_N > limit4_N) & (residual_N > 0)))
    out_N = residual_N > np.maximum(BACK_SIGMAS * scale_N, 0.25 * floor_N)
    interval = float(np.median(np.diff(steps_N)))
    spans: list[Span] = []
    for seed in seeds.tolist():
        if spans and seed <= spans[-1][1]:
            continue
        if not out_N[seed]:
            continue
        first, last = _run(out_N, seed, -1), _run(out_N, seed, 1)
        run = slice(first, last + 1)
        values = max(
            int((residual_N > COUNTED_SIGMAS * scale_N)[run].sum()), int(out_N[run].sum()) - HARD_STEPS - 1
        )
        # In a sparse log a single value out may have lasted for steps.
        lasting = interval > HARD_STEPS
        kind = "spike" if values > HARD_STEPS or lasting else "hard-batch"
        if kind == "spike" and last == n - 1 and values > HARD_STEPS:
            over = residual_N[first:]
            if np.median(over[-max(1, len(over) // 4) :]) >= 0.5 * np.median(over):
                kind = "divergence"
        spans.append((first, last, kind))
    return spans


def _trend(values_N: Vector, half: int) -> tuple[Vector, Vector]:
    """A running median and the deviation about it; in a short log what stands out is bridged, and again."""
    n = len(values_N)
    # Where the fall is steeper than the noise, the median is the value itself: second differences still see the noise.
    bends_N = np.abs(np.diff(values_N, 2, prepend=values_N[0], append=values_N[-1])) / math.sqrt(6)
    least_N = np.maximum(MAD * _rolling_median(bends_N, min(n, 31)), quantum_of(values_N))
    trend_N = running_median(values_N, half)
    for repeat in range(4):
        residual_N = values_N - trend_N
        scale_N = np.maximum(_scale(residual_N, min(n, 101)), least_N)
        if n >= SHORT or repeat == 3:
            break
        # Bridged by straight lines, so that a fall stays one.
        inside = np.flatnonzero(residual_N <= BACK_SIGMAS * scale_N)
        trend_N = running_median(np.interp(np.arange(n), inside, values_N[inside]), half)
    # At the end the window is one-sided, and correlated noise stands further from it.
    scale_N[-half:] *= END_FACTOR
    return trend_N, scale_N


def _run(out_N: NDArray[np.bool_], at: int, direction: int) -> int:
    """The last index out, going on while no more than one in a row is not."""
    n = len(out_N)
    while True:
        if 0 <= at + direction < n and out_N[at + direction]:
            at += direction
        elif 0 <= at + 2 * direction < n and out_N[at + 2 * direction]:
            at += 2 * direction
        else:
            return at


def _step_up(values_N: Vector) -> Span | None:
    n = len(values_N)
    w = int(np.clip(n // 6, 5, 16))
    if n < 4 * w:
        return None
    trailing_N = np.asarray(pd.Series(values_N).rolling(w).median())
    before_N, after_N = trailing_N[w - 1 : n - w], trailing_N[2 * w - 1 :]  # of a step at index w, w + 1, ...
    rise_N = after_N - before_N
    # A median of w values scatters 1.25 times a mean of as many; two are compared, and correlated neighbours count less.
    residual_N = values_N - running_median(values_N, max(w, 16))
    single = max(
        MAD * float(np.median(np.abs(residual_N))), ripple_of(values_N.tolist()), quantum_of(values_N)
    )
    scale = 1.25 * math.sqrt(2 / w) * single * _inflation(residual_N, single)
    at = int(rise_N.argmax())
    rise, level = float(rise_N[at]), float(before_N[at])
    first = at + w
    if rise <= max(LIMIT_SIGMAS * (1 + 16 / n) * scale, STEP_FLOOR * abs(level)):
        return None
    # What rises out of a dip only comes back: the level before the dip counts.
    dip = rise_N[max(0, at - 2 * w) : at].min(initial=0.0)
    if dip < -0.5 * rise and float(np.median(values_N[max(0, first - 4 * w) : first])) > level + 0.5 * rise:
        return None
    rest = values_N[first:]
    later = np.asarray(pd.Series(rest).rolling(w).median())[w - 1 :]
    if later.min(initial=math.inf) < level + 0.5 * rise:
        return None
    # The largest difference is flat over a few places: the step is where the values themselves rise.
    near = range(max(1, first - w // 2), min(n - 1, first + w // 2))
    first = max(near, key=lambda i: values_N[i : i + 3].min() - values_N[max(0, i - 3) : i].max())
    return first, n - 1, "divergence"


def _inflation(residual_N: Vector, scale: float) -> float:
    """How much more a mean of many values scatters, as neighbours are correlated: sqrt((1 + rho) / (1 - rho))."""
    rho = _correlation(residual_N, scale)
    return math.sqrt((1 + rho) / (1 - rho))


def _correlation(residual_N: Vector, scale: float) -> float:
    """Of neighbours, what stands out clipped; between 0 and .95."""
    clipped_N = np.clip(residual_N, -3 * scale, 3 * scale)
    power = float(clipped_N @ clipped_N)
    rho = float(clipped_N[1:] @ clipped_N[:-1]) / power if power else 0.0
    return min(max(rho, 0.0), 0.95)


def _jumps(values_N: Vector, at: int) -> bool:
    """Whether a value stands out of the eight before it: what begins so does not begin slowly."""
    before_N = values_N[max(0, at - 8) : at]
    if len(before_N) < 4 or at >= len(values_N):
        return False
    middle = float(np.median(before_N))
    return float(values_N[at]) - middle > 5 * MAD * float(np.median(np.abs(before_N - middle)))


def _slow_rise(values_N: Vector) -> Span | None:
    n = len(values_N)
    width = max(4, n // BLOCKS)
    count = n // width
    if count < 8:
        return None
    blocks_B = np.median(values_N[n - count * width :].reshape(count, width), axis=1)
    smooth_B = np.asarray(pd.Series(blocks_B).rolling(3, center=True, min_periods=2).median())
    bends = np.abs(np.diff(blocks_B, 2)) / math.sqrt(6)
    scale = max(MAD * float(np.median(bends)), quantum_of(values_N))
    lowest = int(smooth_B.argmin())
    low, last = float(smooth_B[lowest]), float(np.median(blocks_B[-3:]))
    rise = last - low
    if rise <= max(RISE_FLOOR * abs(low), RISE_SIGMAS * scale) or count - lowest < 4:
        return None
    over_B = smooth_B[int(np.argmax(smooth_B < low + 0.5 * rise)) :] > low + 0.5 * rise
    if int((np.diff(over_B.astype(int)) == 1).sum()) > 1:
        return None
    quiet = np.flatnonzero(smooth_B[: count - 1] <= low + max(0.15 * rise, scale))
    first = n - count * width + (int(quiet[-1]) + 1) * width
    return min(first, n - 1), n - 1, "divergence"
