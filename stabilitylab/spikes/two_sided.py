"""A second look at a finished log, to both sides: what the online detector, which sees value by value, cannot know.

Excursions over a running median (``bumps.py``), steps up for good and slow rises (``sustained_rises.py``) join what the first pass
found. A finding that overlaps an episode of the first pass is the same episode; a hard batch that turns out longer is a spike. A
divergence that falls back at once within 512 values was a long spike with a flat top. In a sparse log, a single value that the
noise itself explains is no spike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from stabilitylab.spikes.bumps import (
    COARSE,
    BumpSpan,
    Vector,
    coarse_excursions,
    deviations,
    excursions,
    is_even,
    joined,
)
from stabilitylab.spikes.degenerate_values import LARGEST
from stabilitylab.spikes.episodes import Episode
from stabilitylab.spikes.sustained_rises import is_recovering, jumps, slow_rise, step_up
from stabilitylab.spikes.verdict import FIRST_CHECK, HARD_STEPS

LEAST_VALUES = 20
STATES = ("spike", "divergence")
END_VALUES = 64
LEAST_REPEATS = 4
NEAR = 32
WAVES = 5  # least periods of a wave
BACK_VALUES = 512
BACK_WIDTH = 16


def second_look(
    episodes: Sequence[Episode], steps_N: NDArray[np.int64], values_N: Vector, *, signal: str
) -> list[Episode]:
    """``episodes``, those that both sides show added, with the level after each.

    Args:
        episodes: of the first pass.
        steps_N: the log's steps; where they go back, the function looks at the stretch after by itself.
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
    # Where a slow rise moved the onset earlier, the values right after it do not decide.
    as_told = {(one.signal, one.onset) for one in episodes}
    found = [
        _came_back(one, steps_N, values_N)
        if one.signal == signal and (one.signal, one.onset) in as_told
        else one
        for one in found
    ]
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


def as_one(episodes: Sequence[Episode], *, loss: str, norm: str) -> list[Episode]:
    """An episode of the gradient norm that overlaps one of the loss is the same one: it stands among its precursors.

    Where the norm left at most two steps earlier, the episode began there.
    """
    norms = [one for one in episodes if one.signal == norm and one.kind in STATES]
    merged: list[Episode] = []
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
        merged.append(one)
    return [one for one in merged if one not in taken]


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
    """``found`` with what one stretch of rising steps shows: added, replaced, or begun earlier."""
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
    interval = float(np.median(np.diff(steps_N)))
    if interval > HARD_STEPS and not is_even(deviations(values_N)):
        calmer = [_not_lasting(one) for one in own]
        found = [one for one in found if one not in own] + calmer
        own = calmer
    states = [one for one in own if one.kind in STATES]
    for first, last, kind in _spans(values_N, sparse=interval > HARD_STEPS):
        onset, end = int(steps_N[first]), int(steps_N[last])
        if kind == "divergence":
            seen = next((one for one in own if one.kind == "divergence" and _end(one) >= onset), None)
            if seen is not None:  # the detector saw it later than it began
                at = int(np.searchsorted(steps_N, seen.onset))
                if seen in found and seen.onset > onset and not jumps(values_N, at):
                    found[found.index(seen)] = replace(seen, onset=onset)
                continue
            # An episode that began with it is the same, a later one is not.
            end = int(steps_N[min(last, first + NEAR)])
        covering = [one for one in own if one.onset <= end and _end(one) >= onset]
        if _says_as_much(covering, kind, states):
            continue
        told = next((one.told for one in covering), None)
        for one in covering:
            found.remove(one)
            own.remove(one)
        found.append(_episode(first, last, kind, steps_N, values_N, signal, told))
    return found


def _spans(values_N: Vector, *, sparse: bool) -> list[BumpSpan]:
    """Excursions, fine and coarse, and the rise that lasts, if any: it replaces what comes after its first value."""
    spans = excursions(values_N, sparse=sparse)
    for width in COARSE:
        spans = joined(spans, coarse_excursions(values_N, width))
    if (rise := step_up(values_N) or slow_rise(values_N)) is not None:
        if not is_recovering(values_N, rise[0]):
            return [one for one in spans if one[1] < rise[0]] + [rise]
        if not any(one[1] >= rise[0] for one in spans):
            spans.append((rise[0], rise[1], "spike"))
    return spans


def _says_as_much(covering: Sequence[Episode], kind: str, states: Sequence[Episode]) -> bool:
    """Whether the first pass' episodes in the same steps already say what a new one of ``kind`` would."""
    return (
        any(one.kind not in ("hard-batch", "spike") for one in covering)
        or (kind != "divergence" and any(one in states for one in covering))
        or (kind == "hard-batch" and bool(covering))
    )


def _came_back(one: Episode, steps_N: NDArray[np.int64], values_N: Vector) -> Episode:
    """A divergence that falls back at once within 512 values was a spike: a long one with a flat top."""
    if one.kind != "divergence" or one.level is None or one.to_the_end:
        return one
    first = int(np.searchsorted(steps_N, one.onset))
    values_N = values_N[first : first + BACK_VALUES + BACK_WIDTH]
    values_N = values_N[np.abs(values_N) < LARGEST]
    if len(values_N) < 3 * BACK_WIDTH:
        return one
    medians_N = np.median(np.lib.stride_tricks.sliding_window_view(values_N, BACK_WIDTH), axis=1)
    high = float(np.median(values_N[:FIRST_CHECK])) - one.level
    before_N, after_N = medians_N[:-BACK_WIDTH], medians_N[BACK_WIDTH:]
    back = np.flatnonzero((after_N < one.level + 0.5 * high) & (before_N - after_N > 0.5 * high))
    if high <= 0 or not len(back):
        return one
    out = np.flatnonzero(values_N[: int(back[0]) + 2 * BACK_WIDTH] > one.level + 0.5 * high)
    return replace(one, kind="spike", end=int(steps_N[first + int(out[-1])]))


def _not_lasting(one: Episode) -> Episode:
    """A single value out that the noise itself explains."""
    return replace(one, kind="hard-batch") if one.kind == "spike" and one.onset == one.end else one


def _is_part_of(one: Episode, burst: Episode) -> bool:
    """Whether it is a bad value or two in the steps in which others were not finite: the same event."""
    inside = burst.onset <= one.onset and _end(one) <= _end(burst)
    return one.kind in ("hard-batch", "spike") and inside and _end(one) - one.onset <= HARD_STEPS


def _with_period(episodes: list[Episode]) -> list[Episode]:
    """Give hard batches that return after the same number of steps that period: the last, smaller batch of each epoch, say."""
    hard = [one for one in episodes if one.kind == "hard-batch" and one.reason is None]
    if len(hard) < LEAST_REPEATS:
        return episodes
    gaps = np.diff([one.onset for one in hard])
    gap = int(np.median(gaps))
    if gap < 3 or np.mean(np.abs(gaps - gap) <= 1) < 0.8:
        return episodes
    return [replace(one, reason=f"a batch every {gap} steps") if one in hard else one for one in episodes]


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
