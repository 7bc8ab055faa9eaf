"""Running medians and the like for long logs, compiled (``series.c``), with a twin for machines without a compiler.

The system's compiler builds the library at first use. Without one, pandas and the detector's own code do the same some four times
slower. Both find the same, and what they learn from values agrees to the bit.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
import subprocess
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stabilitylab.c_compiler import built, switched_off
from stabilitylab.spikes import baseline as b
from stabilitylab.spikes.degenerate_values import REPEAT_GAIN, Stillness
from stabilitylab.spikes.excursion import Excursions
from stabilitylab.spikes.verdict import END_SHARE

_log = logging.getLogger("stabilitylab")
_SOURCE = Path(__file__).with_name("series.c")
# A fused multiplication would round once where Python rounds twice.
_FLAGS = ("-std=c11", "-ffp-contract=off")
MOST_VALUES = 65_536

Vector = NDArray[np.float64]


class _Quiet(ctypes.Structure):
    _fields_ = (
        ("block", ctypes.c_double * b.BLOCK),
        ("recent", ctypes.c_double * 32),
        ("creep_onset", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("in_block", "in_recent", "over", "creep")),
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled library; None where it cannot be compiled."""
    if switched_off():
        return None
    try:
        loaded = ctypes.CDLL(str(built(_SOURCE, _FLAGS)))
        pointer, integer, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
        for name, arguments in {
            "stabilitylab_quiet": (pointer, pointer, integer, *[pointer] * 6),
            "stabilitylab_still": (pointer, pointer, integer, number, pointer),
            "stabilitylab_rolling_median": (pointer, integer, integer, integer, pointer),
            "stabilitylab_far_out": (pointer, integer, integer, integer, number, pointer, pointer),
        }.items():
            function = getattr(loaded, name)
            function.argtypes = arguments
            function.restype = integer if name == "stabilitylab_quiet" else None
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        _log.info(
            "long logs are judged without a compiler's help, more slowly: %s", " ".join(str(error).split())
        )
        return None
    return loaded


def _constants() -> ctypes.Array[ctypes.c_double]:
    values = (
        *(b.BAND_SIGMAS, b.LIMIT_SIGMAS, b.BAND_SHARE, b.MEAN_SHARE, b.UNSURE, b.UNSURE_CORRELATED),
        *(
            b.CORRELATED,
            b.LEAST,
            b.CLIP,
            b.CLIPPED_SQUARE,
            *b.GAINS,
            b.EARLY_BLOCKS,
            b.TAIL_STEP,
            b.TAIL_DECAY,
        ),
        *(b.MOST_TAIL, b.SHOULDER, b.SHAPE_GAIN, b.FORGET_DEPTH, b.FALL_SIGMAS, b.CREEP_GAIN, b.CREEP_SIGMAS),
        *(b.CREEP_SHARE, b.DOUBLED_SIGMAS, b.RIPPLE, END_SHARE),
    )
    return (ctypes.c_double * len(values))(*values)


def take_quiet(state: Excursions, steps_N: NDArray[np.int64], values_N: Vector) -> int:
    """Feed ordinary values to a quiet signal, up to one that the detector's own code must judge.

    Args:
        state: has no open excursion and knows its noise; left as ``update`` would have left it.
        steps_N: at the usual interval; contiguous.
        values_N: finite; contiguous.

    Returns:
        How many were taken; none before the 16th block, whose learning is special.
    """
    compiled, base = library(), state.baseline
    count = min(len(values_N), MOST_VALUES)
    if compiled is None or base.blocks < max(b.SHAPE_KNOWN, b.EARLY_BLOCKS) or not count:
        return 0
    quiet = _Quiet()
    held, recent = len(state.block), list(state.recent)
    quiet.block[:held] = state.block
    quiet.recent[: len(recent)] = recent
    quiet.creep_onset = math.nan if state.creep_onset is None else state.creep_onset
    quiet.in_block, quiet.in_recent = held, len(recent)
    quiet.over, quiet.creep = state.over, int(state.creep)
    numbers_S = np.array([*base.state(), base.relative_floor, base.absolute_floor], dtype=np.float64)
    width = len(numbers_S) - 2
    states_KS = np.empty((count // b.BLOCK + 1, width))
    ends_K = np.empty(count // b.BLOCK + 1, dtype=np.int64)
    learned = ctypes.c_int64()
    constants = _constants()
    taken: int = compiled.stabilitylab_quiet(
        *(values_N.ctypes.data, steps_N.ctypes.data, count, numbers_S.ctypes.data),
        *(ctypes.byref(quiet), constants, states_KS.ctypes.data, ends_K.ctypes.data, ctypes.byref(learned)),
    )
    if not taken:
        return 0
    if learned.value:
        last = numbers_S[:width].tolist()
        base.restore([int(last[0]), *last[1:]])

        def state_after(block: int) -> tuple[float, ...]:
            row = states_KS[block].tolist()
            return (int(row[0]), *row[1:])

        state.snapshots.add_all(steps_N[ends_K[: learned.value]].tolist(), state_after)
        state.creep_onset = None if math.isnan(quiet.creep_onset) else int(quiet.creep_onset)
        state.learning = False
    state.over = quiet.over
    state.block = list(quiet.block[: quiet.in_block])
    begun = steps_N[max(0, taken - quiet.in_block) : taken].tolist()
    state.block_steps = begun if learned.value else state.block_steps + steps_N[:taken].tolist()
    state.recent.extend(values_N[max(0, taken - 32) : taken].tolist())
    state.recent_steps.extend(steps_N[max(0, taken - b.GROUP) : taken].tolist())
    state.last_step = state.inside = int(steps_N[taken - 1])
    return taken


def take_still(state: Stillness, steps_N: NDArray[np.int64], values_N: Vector) -> None:
    """``Stillness.skip`` of values of which no three in a row are equal."""
    compiled = library()
    if compiled is None:
        steps, values = steps_N.tolist(), values_N.tolist()
        state.skip(steps, values, distinct=False)
        return
    numbers_S = np.array(
        [state.previous, state.equal, state.since, state.repeats, state.longest, state.values],
        dtype=np.float64,
    )
    compiled.stabilitylab_still(
        *(values_N.ctypes.data, steps_N.ctypes.data, len(values_N), REPEAT_GAIN, numbers_S.ctypes.data)
    )
    previous, equal, since, repeats, longest, seen = numbers_S.tolist()
    state.previous, state.repeats = previous, repeats
    state.equal, state.since, state.longest, state.values = int(equal), int(since), int(longest), int(seen)


def rolling_median(values_N: Vector, before: int, after: int = 0) -> Vector:
    """The median of each value with ``before`` values before it and ``after`` after it, as far as there are.

    Args:
        values_N: without NaN.
    """
    compiled = library()
    if compiled is None:
        import pandas as pd

        if not after:
            return np.array(pd.Series(values_N).rolling(before + 1, min_periods=1).median(), dtype=np.float64)
        padded = pd.Series(np.concatenate([values_N, np.full(after, np.nan)]))
        rolling = padded.rolling(before + after + 1, min_periods=1).median()
        return np.array(rolling[after:], dtype=np.float64)
    values_N = np.ascontiguousarray(values_N, dtype=np.float64)
    median_N = np.empty(len(values_N))
    compiled.stabilitylab_rolling_median(
        values_N.ctypes.data, len(values_N), before, after, median_N.ctypes.data
    )
    return median_N


def rolling_mean(values_N: Vector, width: int) -> Vector:
    """The mean of each value and the ``width`` - 1 before it; 0 where there are fewer."""
    mean_N = np.zeros(len(values_N))
    if len(values_N) >= width:
        end = len(values_N) - width + 1
        mean_N[width - 1 :] = sum(values_N[k : end + k] for k in range(width)) / width
    return mean_N


def far_out(values_N: Vector, window: int, minimum: int, sigmas: float, size_N: Vector) -> NDArray[np.bool_]:
    """Where a value stands ``sigmas`` deviations from the mean of the window before it.

    Args:
        values_N: finite.
        window: values before each one, itself excluded.
        minimum: values that a window needs.
        size_N: the size that rounding scales with: deviations under 1e-9 of it count as none.
    """
    compiled = library()
    if compiled is None:
        import pandas as pd

        series = pd.Series(values_N)
        rolling = series.rolling(window, min_periods=minimum)
        mean, deviation = rolling.mean().shift(1), rolling.std(ddof=0).shift(1)
        least = np.maximum(sigmas * deviation, 1e-9 * np.abs(size_N) + 1e-300)
        return np.asarray(((series - mean).abs() >= least) & deviation.notna(), dtype=np.bool_)
    values_N, size_N = np.ascontiguousarray(values_N), np.ascontiguousarray(size_N)
    out_N = np.empty(len(values_N), dtype=np.int8)
    compiled.stabilitylab_far_out(
        *(values_N.ctypes.data, len(values_N), window, minimum, sigmas, size_N.ctypes.data, out_N.ctypes.data)
    )
    return out_N.astype(np.bool_)
