"""Scores the kinds of ``_spike_kinds.py``: recall, false alarms, delay, and which kind was called which.

An *event of the state* (spike, divergence, non-finite, dead, frozen) is found where an alarm falls between 5 values before its
first and 5 after its last. An alarm outside every event is *false*, wherever it is; per 10,000 values. A hard batch is called a
spike where an alarm lies within 2 values of it. For the finished log (``find_episodes``) an alarm is the onset of an episode other
than a hard batch, and an event's *kind* is that of the gravest episode that overlaps it.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.benchmarks._spike_curves import Curve
from stabilitylab.spikes import Episode, find_episodes

TOLERANCE = 5
HARD_TOLERANCE = 2
GRAVITY = ("divergence", "spike", "non-finite", "dead", "frozen", "hard-batch")

Alarms = NDArray[np.intp]


@dataclass(slots=True)
class KindScore:
    """Counts of one detector on one family."""

    events: int = 0
    found: int = 0
    hard: int = 0
    hard_called: int = 0
    false: int = 0
    values: int = 0
    delays: list[int] = field(default_factory=list)

    def add(self, curve: Curve, alarms: Alarms) -> None:
        self.values += len(curve.losses)
        near_N = np.zeros(len(alarms), dtype=np.bool_)
        for event in curve.events:
            hard = event.kind == "hard-batch"
            tolerance = HARD_TOLERANCE if hard else TOLERANCE
            inside_N = (alarms >= event.first - tolerance) & (alarms <= event.last + tolerance)
            near_N |= inside_N
            if hard:
                self.hard += 1
                self.hard_called += bool(inside_N.any())
                continue
            self.events += 1
            if inside_N.any():
                self.found += 1
                self.delays.append(int(alarms[inside_N][0]) - event.first)
        self.false += int((~near_N).sum())

    def to_json(self) -> dict[str, Any]:
        return {
            "events": self.events,
            "recall": self.found / self.events if self.events else None,
            "hard_batches": self.hard,
            "hard_batches_called_spikes": self.hard_called / self.hard if self.hard else None,
            "false_alarms": self.false,
            "false_per_10k": 1e4 * self.false / self.values,
            "median_delay": statistics.median(self.delays) if self.delays else None,
        }


def kind_scores(
    curves: Iterable[Curve], detectors: Mapping[str, Callable[[Curve], Alarms]]
) -> tuple[dict[str, dict[str, KindScore]], dict[str, Counter[tuple[str, str]]]]:
    """Scores by detector and family, with the finished log's; and its confusion of kinds by family."""
    scores: dict[str, dict[str, KindScore]] = {"finished log": {}, **{name: {} for name in detectors}}
    confusion: dict[str, Counter[tuple[str, str]]] = {}
    for curve in curves:
        episodes = find_episodes(curve.steps, curve.losses)
        _confuse(curve, episodes, confusion.setdefault(curve.family, Counter()))
        onsets = [one.onset for one in episodes if one.kind != "hard-batch"]
        alarms = {"finished log": np.searchsorted(curve.steps, onsets).astype(np.intp)}
        alarms |= {name: detect(curve) for name, detect in detectors.items()}
        for name, found in alarms.items():
            scores[name].setdefault(curve.family, KindScore()).add(curve, found)
    return scores, confusion


def _confuse(curve: Curve, episodes: list[Episode], counts: Counter[tuple[str, str]]) -> None:
    steps = curve.steps
    for event in curve.events:
        first = int(steps[max(0, event.first - TOLERANCE)])
        last = int(steps[min(len(steps) - 1, event.last + TOLERANCE)])
        kinds = {one.kind for one in episodes if one.onset <= last and (one.end is None or one.end >= first)}
        counts[event.kind, min(kinds, key=GRAVITY.index, default="nothing")] += 1


def totals(scores: Mapping[str, KindScore]) -> KindScore:
    """All families as one."""
    total = KindScore()
    for one in scores.values():
        for name in ("events", "found", "hard", "hard_called", "false", "values"):
            setattr(total, name, getattr(total, name) + getattr(one, name))
        total.delays += one.delays
    return total
