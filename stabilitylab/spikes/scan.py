"""A log read from end to end: its episodes, scores, and an outline for a picture, in bounded memory.

Logs are taken as they come, and a step that goes back is a restart. When more than a quarter of the steps go
back, the log is not in order rather than restarted: it is then sorted by step, if it has at most ``SORTABLE``
rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from stabilitylab.errors import InputError
from stabilitylab.logs.log import Block, Log
from stabilitylab.spikes.detector import SpikeDetector
from stabilitylab.spikes.episodes import Episode, episodes_of
from stabilitylab.spikes.offline import feed_losses
from stabilitylab.spikes.score import SpikeScore
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
        sorted: the rows had to be put in order.
        spike_score: OLMo 2's, over the whole log.
        detrended_spike_score: the same over the residuals of a running median.
        outlines: signal -> its curve, thinned.
    """

    episodes: list[Episode]
    values: int
    not_logged: int
    sorted: bool
    spike_score: float
    detrended_spike_score: float
    outlines: dict[str, Outline]


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
                # The odd bin out is put back as a value of its own; its extremes are what a picture needs of
                # it.
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
        InputError: it holds no loss value, a cell is not a number, or it is out of order and too long to
        sort.
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


def _sorted_blocks(log: Log) -> Iterator[Block]:
    blocks: list[Block] = []
    rows = 0
    for block in log.blocks():
        rows += len(block)
        if rows > SORTABLE:
            raise InputError(
                f"{log.path} is not in the order of its steps, and too long to sort here "
                f"(over {SORTABLE:,} rows): sort it by step first"
            )
        blocks.append(block)
    whole = Block.concatenate(blocks)
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

    def add(self, block: Block) -> None:
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
        if block.values.keys() == {LOSS}:
            self.events += feed_losses(self.detector, block.steps, losses_N)
        else:
            self._feed_rows(block)

    def _feed_rows(self, block: Block) -> None:
        signals = list(block.values)
        columns = [
            [value if logged else None for value, logged in zip(values, there, strict=True)]
            for values, there in ((block.values[s].tolist(), block.logged[s].tolist()) for s in signals)
        ]
        for step, *row in zip(block.steps.tolist(), *columns, strict=True):
            values = {s: value for s, value in zip(signals, row, strict=True) if value is not None}
            self.events += self.detector.update(step, values)

    def out_of_order(self, at_least: int) -> bool:
        return not self.in_order and self.rows >= at_least and self.backward > UNSORTED_SHARE * self.rows

    def result(self) -> Scan:
        if not self.values:
            raise InputError(
                f"{self.log.path}: the column {self.log.columns[LOSS]!r} holds no values; "
                "name another with --loss"
            )
        episodes = episodes_of([*self.events, *self.detector.finish()])
        names = self.log.columns
        return Scan(
            episodes=[replace(one, signal=names.get(one.signal, one.signal)) for one in episodes],
            values=self.values,
            not_logged=self.not_logged,
            sorted=self.in_order,
            spike_score=self.plain.value,
            detrended_spike_score=self.detrended.value,
            outlines={names[signal]: outline for signal, outline in self.outlines.items()},
        )
