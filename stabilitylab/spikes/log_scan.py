"""A whole log's episodes, scores, and outline for a picture, in bounded memory.

The scan reads logs in their own order, and a step that goes back is a restart. Where more than a quarter of the steps go back, the
log is out of order rather than restarted: the scan then sorts it by step, if it has at most ``SORTABLE`` rows. It keeps up to as
many losses for the second look to both sides (``two_sided.py``).

For a run folder the scan returns the recorded episodes: those that the run responded to and reported elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stabilitylab.errors import InputError
from stabilitylab.logs.log import Log, RowBlock
from stabilitylab.logs.recognise import open_logs
from stabilitylab.spikes.detector import SpikeDetector
from stabilitylab.spikes.episodes import KINDS, Episode, episodes_of
from stabilitylab.spikes.offline import feed, finished
from stabilitylab.spikes.score import SpikeScore
from stabilitylab.spikes.two_sided import as_one, wave_period
from stabilitylab.telemetry import GRADIENT_NORM, LOSS, Event

SORTABLE = 5_000_000
UNSORTED_SHARE = 0.25
_JUDGE_ORDER_FROM = 10


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What a log holds.

    Attributes:
        episodes: in the order of their onsets, their signals under the log's own names.
        values: loss values seen.
        not_logged: rows without a loss.
        sorted: whether the scan had to put the rows in order.
        spike_score: OLMo 2's, over the whole log.
        detrended_spike_score: the same over the residuals of a running median.
        outlines: signal -> its curve, thinned.
        zeros: losses of exactly 0 that no episode holds.
        first_zero: the first one's step.
        period: of a wave in the loss, in steps; None where there is none.
        recorded: whether the episodes are those that the run recorded.
    """

    episodes: list[Episode]
    values: int
    not_logged: int
    sorted: bool
    spike_score: float
    detrended_spike_score: float
    outlines: dict[str, Outline]
    zeros: int = 0
    first_zero: int | None = None
    period: int | None = None
    recorded: bool = False


class Outline:
    """A curve of any length in at most ``most`` bins: their first step, smallest and largest finite value."""

    def __init__(self, most: int = 4096) -> None:
        self.most = most
        self._per_bin = 1
        self._pending: list[tuple[NDArray[np.int64], NDArray[np.float64]]] = []
        self._step = np.empty(0, dtype=np.int64)
        self._low = np.empty(0)
        self._high = np.empty(0)

    def add(self, steps_N: NDArray[np.int64], values_N: NDArray[np.float64]) -> None:
        finite_N = np.isfinite(values_N)
        self._pending.append((steps_N[finite_N], values_N[finite_N]))
        steps_N = np.concatenate([steps for steps, _ in self._pending])
        values_N = np.concatenate([values for _, values in self._pending])
        whole = len(steps_N) // self._per_bin * self._per_bin
        self._pending = [(steps_N[whole:], values_N[whole:])]
        shape = (-1, self._per_bin)
        self._step = np.concatenate([self._step, steps_N[:whole].reshape(shape)[:, 0]])
        self._low = np.concatenate([self._low, values_N[:whole].reshape(shape).min(axis=1)])
        self._high = np.concatenate([self._high, values_N[:whole].reshape(shape).max(axis=1)])
        while len(self._step) > self.most:
            even = len(self._step) // 2 * 2
            if even < len(self._step):
                # The odd bin out goes back as a value of its own; a picture needs only its extremes.
                self._pending[0] = (
                    np.concatenate([self._step[-1:], self._step[-1:], self._pending[0][0]]),
                    np.concatenate([self._low[-1:], self._high[-1:], self._pending[0][1]]),
                )
            self._step = self._step[:even:2]
            self._low = self._low[:even].reshape(-1, 2).min(axis=1)
            self._high = self._high[:even].reshape(-1, 2).max(axis=1)
            self._per_bin *= 2

    def curve(self) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
        """Steps, lows and highs."""
        steps, values = self._pending[0] if self._pending else (self._step[:0], self._low[:0])
        return (
            np.concatenate([self._step, steps]),
            np.concatenate([self._low, values]),
            np.concatenate([self._high, values]),
        )


def scan_log(log: Log) -> Scan:
    """Read ``log`` and find its episodes.

    Raises:
        InputError: the log holds no loss value, a cell is not a number, or it is out of order and too long to sort.
    """
    scanner = _Scanner(log)
    for block in log.blocks():
        scanner.add(block)
        if scanner.out_of_order(_JUDGE_ORDER_FROM * 100):
            break
    if scanner.out_of_order(_JUDGE_ORDER_FROM):
        scanner = _Scanner(log, in_order=True)
        for block in _sorted_blocks(log):
            scanner.add(block)
    return scanner.result()


def listed_episodes(folder: Path) -> list[Episode]:
    """A run folder's episodes, as ``stabilitylab spikes`` numbers them from 1: the recorded ones, or where the run recorded none,
    those that the whole log shows.

    Raises:
        InputError: the folder holds neither.
    """
    from stabilitylab.runs.folder import RunFolder

    recorded = episodes_of(RunFolder(folder).read_events())
    return recorded or scan_log(open_logs((folder,))[0]).episodes


def _sorted_blocks(log: Log) -> Iterator[RowBlock]:
    blocks: list[RowBlock] = []
    rows = 0
    for block in log.blocks():
        rows += len(block)
        if rows > SORTABLE:
            raise InputError(
                f"{log.path} is not in the order of its steps, and too long to sort here "
                f"(over {SORTABLE:,} rows): sort it by step first"
            )
        blocks.append(block)
    whole = RowBlock.concatenate(blocks)
    yield whole.take(np.argsort(whole.steps, kind="stable"))


class _Scanner:
    def __init__(self, log: Log, *, in_order: bool = False) -> None:
        self.log = log
        self.in_order = in_order
        self.detector = SpikeDetector()
        self.events: list[Event] = []
        self.rows = self.values = self.not_logged = self.backward = 0
        self.last_step: int | None = None
        self.plain = SpikeScore()
        self.detrended = SpikeScore(detrend=True)
        self.outlines: dict[str, Outline] = {}
        self.steps: list[NDArray[np.int64]] = []
        self.losses: list[NDArray[np.float64]] = []
        self.recorded = _recorded(log)

    def add(self, block: RowBlock) -> None:
        if self.last_step is not None:
            self.backward += int(block.steps[0] < self.last_step)
        self.backward += int((np.diff(block.steps) < 0).sum())
        self.last_step = int(block.steps[-1])
        self.rows += len(block)
        logged_N, losses_N = block.logged[LOSS], block.values[LOSS]
        self.values += int(logged_N.sum())
        self.not_logged += int((~logged_N).sum())
        self.plain.add(losses_N[logged_N])
        self.detrended.add(losses_N[logged_N])
        for signal in (LOSS, GRADIENT_NORM):
            if signal in block.values:
                logged_N = block.logged[signal]
                outline = self.outlines.setdefault(signal, Outline())
                outline.add(block.steps[logged_N], block.values[signal][logged_N])
        if self.recorded is None:
            self.events += feed(self.detector, block.steps, block.values, block.logged)
        if self.values <= SORTABLE:
            self.steps.append(block.steps[block.logged[LOSS]])
            self.losses.append(losses_N[block.logged[LOSS]])

    def out_of_order(self, at_least: int) -> bool:
        return not self.in_order and self.rows >= at_least and self.backward > UNSORTED_SHARE * self.rows

    def result(self) -> Scan:
        if not self.values:
            raise InputError(
                f"{self.log.path}: the column {self.log.columns[LOSS]!r} holds no values; "
                "name another with --loss"
            )
        whole = self.values <= SORTABLE
        steps_N, losses_N = np.concatenate(self.steps), np.concatenate(self.losses)
        if self.recorded is not None:
            episodes = self.recorded
        else:
            episodes = episodes_of([*self.events, *self.detector.finish()])
            if whole:
                episodes = finished(episodes, steps_N, losses_N, signal=LOSS)
            episodes = as_one(episodes, loss=LOSS, norm=GRADIENT_NORM)
        zero_N = losses_N == 0
        for one in episodes:
            last = steps_N[-1] if one.end is None or one.to_the_end else one.end
            zero_N &= (steps_N < one.onset) | (steps_N > last)
        zero_N &= _is_far_from_zero(losses_N)
        names = self.log.columns
        return Scan(
            episodes=[_named(one, names) for one in episodes],
            zeros=int(zero_N.sum()),
            first_zero=int(steps_N[zero_N][0]) if zero_N.any() else None,
            period=wave_period(steps_N, losses_N) if whole else None,
            recorded=self.recorded is not None,
            values=self.values,
            not_logged=self.not_logged,
            sorted=self.in_order,
            spike_score=self.plain.value,
            detrended_spike_score=self.detrended.value,
            outlines={names[signal]: outline for signal, outline in self.outlines.items()},
        )


def _recorded(log: Log) -> list[Episode] | None:
    """The episodes that a run folder holds; None where the run recorded nothing."""
    if not log.path.is_dir() or log.columns[LOSS] != LOSS:
        return None
    from stabilitylab.runs.folder import RunFolder  # imports pandas, which a text log does not need

    events = RunFolder(log.path).read_events()
    return episodes_of(events) if any(event.kind in KINDS for event in events) else None


def _is_far_from_zero(losses_N: NDArray[np.float64]) -> bool:
    """Whether no loss can be exactly 0: all others are positive and far above."""
    others_N = losses_N[np.isfinite(losses_N) & (losses_N != 0)]
    return bool(len(others_N)) and float(others_N.min()) > 0.1 * float(np.median(others_N))


def _named(one: Episode, names: Mapping[str, str]) -> Episode:
    """Signals under the log's own names."""
    precursors = {names.get(name, name): lead for name, lead in one.precursors.items()}
    return replace(one, signal=names.get(one.signal, one.signal), precursors=precursors)
