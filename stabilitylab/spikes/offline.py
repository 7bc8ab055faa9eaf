"""The episodes of a whole log at once: the online detector at speed, then a second look to both sides.

*First pass.* Nearly every value of a training log is ordinary, and an ordinary block of sixteen passes as a whole: the fast path
compares its largest value, largest rise and largest mean of four with the limits, and where none comes near one, gives the block to
``Baseline.learn``, as the detector would have value by value. Everything else goes through the detector itself. So the events are
those of the online detector, to the last bit; a test checks that. Each signal has its own pointer, and the furthest back that needs
attention comes first.

*Second pass.* ``two_sided.py`` finds what only the values on both sides show, and ``smoothing.py`` undoes the smoothing of a log
that was smoothed before it was written.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stabilitylab.errors import InputError
from stabilitylab.spikes.baseline import BLOCK, GROUP
from stabilitylab.spikes.degenerate_values import LARGEST
from stabilitylab.spikes.detector import SpikeDetector
from stabilitylab.spikes.episodes import Episode, episodes_of
from stabilitylab.spikes.excursion import Excursions
from stabilitylab.spikes.reasons import changes
from stabilitylab.spikes.series import MOST_VALUES, library, take_quiet, take_still
from stabilitylab.spikes.smoothing import smoothing_factor, undone
from stabilitylab.spikes.two_sided import second_look
from stabilitylab.telemetry import LOSS, LOSS_SCALES, SKIPPED, Event

# The fast path's preparation does not pay for fewer values.
_SLOW_BELOW = 256
_SHARP = ("hard-batch", "spike", "divergence")


def find_episodes(
    steps: ArrayLike | None, values: ArrayLike, *, signal: str = LOSS, finish: bool = True
) -> list[Episode]:
    """The episodes of one loss curve.

    Args:
        steps: whole numbers, one per value; None: 0, 1, 2, ...
        values: the losses; NaN and infinity are values that were seen.
        signal: the name the episodes carry.
        finish: the log ends here, so the function closes and judges open episodes and takes the second look, to both sides; False:
            only what the detector has reported so far.

    Raises:
        InputError: steps and values differ in length, or are not one-dimensional.
    """
    values_N = np.asarray(values, dtype=np.float64)
    steps_N = np.arange(len(values_N)) if steps is None else np.asarray(steps)
    if values_N.ndim != 1 or steps_N.shape != values_N.shape:
        raise InputError(
            f"steps and values must be lists of one length, got shapes {steps_N.shape}, {values_N.shape}"
        )
    steps_N = steps_N.astype(np.int64)
    detector = SpikeDetector(loss=signal)
    events = feed(detector, steps_N, {signal: values_N})
    if not finish:
        return episodes_of(events)
    return finished(episodes_of([*events, *detector.finish()]), steps_N, values_N, signal=signal)


def finished(
    episodes: list[Episode], steps_N: NDArray[np.int64], values_N: NDArray[np.float64], *, signal: str
) -> list[Episode]:
    """The first pass's episodes of a log that is over, after a second look and with any smoothing undone."""
    found = second_look(episodes, steps_N, values_N, signal=signal)
    usable_N = np.abs(values_N) < LARGEST
    if not bool((np.diff(steps_N) > 0).all()):
        return found
    own = [one for one in found if one.signal == signal]
    factor = smoothing_factor(steps_N[usable_N], values_N[usable_N], own)
    if factor is None:
        return found
    raw_N = values_N.copy()
    raw_N[usable_N] = undone(values_N[usable_N], factor)
    detector = SpikeDetector(loss=signal)
    events = feed(detector, steps_N, {signal: raw_N})
    reason = f"seen after undoing an exponential mean of {factor:.3g}"
    sharp = second_look(episodes_of([*events, *detector.finish()]), steps_N, raw_N, signal=signal)
    sharp = [replace(one, reason=one.reason or reason) for one in sharp if one.kind in _SHARP]
    rest = [one for one in found if one.signal != signal or one.kind not in _SHARP]
    return sorted([*rest, *sharp], key=lambda one: one.onset)


def feed_losses(
    detector: SpikeDetector, steps_N: NDArray[np.int64], values_N: NDArray[np.float64]
) -> list[Event]:
    """``detector.update`` for each loss in turn."""
    return feed(detector, steps_N, {detector.loss: values_N})


def feed(
    detector: SpikeDetector,
    steps_N: NDArray[np.int64],
    values: Mapping[str, NDArray[np.float64]],
    logged: Mapping[str, NDArray[np.bool_]] | None = None,
) -> list[Event]:
    """``detector.update`` for each row in turn; where steps go back, also ``detector.finish`` for what it judged before.

    Args:
        detector: left as after the last row.
        steps_N: whole numbers.
        values: signal -> one number per row.
        logged: signal -> whether the row holds it; None: all do.
    """
    events: list[Event] = []
    last = detector.loss_excursions.last_step
    back_N = np.flatnonzero(np.diff(steps_N, prepend=steps_N[:1] if last is None else last) < 0)
    for begin, end in zip([0, *back_N.tolist()], [*back_N.tolist(), len(steps_N)], strict=True):
        if begin in back_N:
            events += detector.finish()  # a log keeps its superseded values, so their episodes count
        rows = slice(begin, end)
        if begin < end:
            there = {name: column[rows] for name, column in (logged or {}).items()}
            events += _feed(detector, steps_N[rows], {n: v[rows] for n, v in values.items()}, there)
    return events


def _feed(
    detector: SpikeDetector,
    steps_N: NDArray[np.int64],
    values: Mapping[str, NDArray[np.float64]],
    logged: Mapping[str, NDArray[np.bool_]],
) -> list[Event]:
    count = len(steps_N)
    columns = [
        _Column(detector, name, steps_N, column, logged.get(name), fast=count >= _SLOW_BELOW)
        for name, column in values.items()
    ]
    events: list[Event] = []
    # Judge the loss last, as in ``update``: by then its companions of the same step are known.
    columns.sort(key=lambda column: column.name == detector.loss)
    steps = steps_N.tolist()
    while True:
        for column in columns:
            column.go_on(bound=min((c.row for c in columns if c is not column), default=count))
        row = min(column.row for column in columns)
        if row >= count:
            return events
        at = [column for column in columns if column.row == row]
        events += detector.update(
            steps[row], {column.name: float(column.values_N[column.at]) for column in at}
        )
        for column in at:
            column.at += 1


class _Column:
    """One signal's logged values, and which of them the detector itself must see."""

    def __init__(
        self,
        detector: SpikeDetector,
        name: str,
        steps_N: NDArray[np.int64],
        values_N: NDArray[np.float64],
        logged_N: NDArray[np.bool_] | None,
        *,
        fast: bool,
    ) -> None:
        self.detector, self.name = detector, name
        rows_N = np.arange(len(steps_N)) if logged_N is None else np.flatnonzero(logged_N)
        values_N = values_N[rows_N]
        self.rows_N = np.append(rows_N, len(steps_N))
        self.values_N = values_N
        self.at = 0
        self.end = len(values_N)
        self.is_loss = name == detector.loss
        self.quiet_rows = False
        if detector.ignores(name):
            self.quiet_rows = True
            if name in LOSS_SCALES:  # its constant stretches are counted, too
                self.odd = list(range(self.end))
            elif name == SKIPPED:
                self.odd = np.flatnonzero(values_N != 0).tolist()
            else:
                self.odd = np.flatnonzero(changes(name, values_N)).tolist()
            return
        if not fast:
            self.odd = list(range(self.end))
            return
        steps_N = steps_N[rows_N]
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            odd_N = ~(np.abs(values_N) < LARGEST)
            if not self.is_loss:
                odd_N |= values_N <= 0
                values_N = np.log(np.where(odd_N, 1.0, values_N))
            gaps_N = np.diff(steps_N, prepend=steps_N[:1] - 1)
            odd_N[1:] |= gaps_N[1:] != gaps_N[:-1]
            odd_N[:1] = True  # the detector checks whether it continues what came before
            if self.is_loss:
                equal_N = np.diff(values_N, prepend=np.nan) == 0
                odd_N[1:] |= equal_N[1:] & equal_N[:-1]
            self.blocks = (
                None if library() is not None else _Blocks(values_N, odd_N, equal_N if self.is_loss else None)
            )
        self.numbers_N, self.steps_N, self.gaps_N = values_N, np.ascontiguousarray(steps_N), gaps_N
        self.odd = np.flatnonzero(odd_N).tolist()

    @property
    def row(self) -> int:
        return int(self.rows_N[self.at])

    def go_on(self, bound: int) -> None:
        """Take ordinary values in, up to one that the detector itself must see."""
        if self.at >= self.end:
            return
        i = bisect_left(self.odd, self.at)
        end = self.odd[i] if i < len(self.odd) else self.end
        if self.quiet_rows:
            if end > self.at:
                self.detector.reasons.pass_over(self.name, float(self.values_N[end - 1]))
            self.at = end
            return
        if end == self.at or not self.detector.is_quiet(self.name):
            return
        state = self.detector.loss_excursions if self.is_loss else self.detector.companion(self.name)
        if self.is_loss:
            # The loss may not run ahead of its companions.
            end = min(end, int(np.searchsorted(self.rows_N, bound)))
        self._take(state, end)

    def _take(self, state: Excursions, end: int) -> None:
        at = self.at
        if state.open is not None or state.learning or self.gaps_N[at] != state.interval:
            return
        if self.blocks is not None:
            self.at = self.blocks.take(self, state, end)
            return
        while at < end:
            taken = take_quiet(state, self.steps_N[at:end], self.numbers_N[at:end])
            if self.is_loss and taken:
                rows = slice(at, at + taken)
                take_still(self.detector.stillness, self.steps_N[rows], self.numbers_N[rows])
            at += taken
            if taken < MOST_VALUES:
                break
        self.at = at


class _Blocks:
    """The fast path without a compiler: whole blocks whose largest values show that they are ordinary."""

    def __init__(
        self, values_N: NDArray[np.float64], odd_N: NDArray[np.bool_], equal_N: NDArray[np.bool_] | None
    ):
        self.numbers: list[float] = values_N.tolist()
        self.repeats: list[int] = [] if equal_N is None else np.cumsum(equal_N).tolist()
        padded_N = np.concatenate([np.full(GROUP, np.inf), values_N])
        before = np.lib.stride_tricks.sliding_window_view(padded_N, GROUP)[:-1]
        self.rises: list[float] = (values_N - before.max(axis=1)).tolist()
        sums_N = np.cumsum(np.where(odd_N, 0.0, np.clip(values_N, -1e30, 1e30)))
        four_N = sums_N.copy()
        four_N[GROUP:] = sums_N[GROUP:] - sums_N[:-GROUP]
        four_N /= GROUP
        self.fours: list[float] = four_N.tolist()
        climb_N = np.full(len(four_N), np.inf)
        climb_N[2 * GROUP :] = four_N[2 * GROUP :] - np.maximum(four_N[GROUP:-GROUP], four_N[: -2 * GROUP])
        self.climbs: list[float] = climb_N.tolist()

    def take(self, column: _Column, state: Excursions, end: int) -> int:
        """Take blocks in, up to one that the detector itself must see; returns the place reached."""
        base, at = state.baseline, column.at
        if at < GROUP or len(state.recent) < GROUP:
            return at
        numbers = self.numbers
        near = 0.99
        while at < end:
            stop = at + BLOCK - len(state.block)
            if stop > end:
                break
            chunk = numbers[at:stop]
            level = base.level
            limit = base.limit()
            if (
                max(chunk) - level > near * base.band()
                or max(self.rises[at:stop]) > near * limit
                or max(self.fours[at:stop]) - level > near * base.limit_of_four()
                or max(self.climbs[at:stop]) > near * base.limit_of_four()
            ):
                break
            block = state.block + chunk
            if sum(block) / BLOCK - level > near * base.limit_of_block():
                break
            if state.creep and base.creep() > 0.4:
                break
            steps = column.steps_N[at:stop].tolist()
            state.block = block
            state.block_steps += steps
            state.recent.extend(chunk)
            state.recent_steps.extend(steps[-GROUP:])
            step = state.last_step = state.inside = steps[-1]
            if column.is_loss:
                distinct = self.repeats[stop - 1] == self.repeats[at - 1]
                column.detector.stillness.skip(steps, chunk, distinct=distinct)
            at = stop
            state.learn_block(step)
        return at
