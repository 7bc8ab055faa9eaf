"""Spike detectors side by side: what they find, what they cry wolf at, and how late.

    python -m experiments.benchmarks spike_detection [FOLDER] [--json]

Each detector sees a curve value by value. An alarm is a flagged value, or for ours the value at which it first calls an episode
spike, divergence or non-finite; flags within 10 values of one another are one alarm. An event is *found* when an alarm falls
between 5 values before its first and 5 after its last; the *delay* counts from its first value. An alarm on a healthy curve is
*false*. A hard batch is *called a spike* when an alarm falls on it or within 2 values.

Curves are synthetic (every family of ``_spike_curves.py``) and, given a FOLDER with ``events.csv``, real. ``--kinds`` scores each
kind at which a detector once failed by itself (``_spike_kinds.py``), for the finished log, for the online detector, and for the
other rules; ``--first-seed`` and ``--salt`` draw new curves.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from experiments.benchmarks._spike_curves import Curve, real_curves, synthetic_curves
from experiments.benchmarks._spike_kind_scores import KindScore, kind_scores, totals
from experiments.benchmarks._spike_kinds import curves_by_kind
from experiments.benchmarks._spike_mixtures import mixtures
from experiments.benchmarks._spike_peers import RULES
from stabilitylab.spikes import SpikeDetector, baseline, find_episodes
from stabilitylab.telemetry import LOSS

OURS = "stabilitylab"
TOLERANCE = 5
JOIN = 10
HARD_TOLERANCE = 2

Alarms = NDArray[np.intp]


def our_alarms(curve: Curve) -> Alarms:
    """Indices at which an episode was first called spike, divergence or non-finite."""
    detector = SpikeDetector()
    called: set[int] = set()
    alarms: list[int] = []
    last: int | None = None
    for i, (step, loss) in enumerate(zip(curve.steps.tolist(), curve.losses.tolist(), strict=True)):
        # Where a log goes back, open episodes are over, as in ``offline.feed``.
        cut = detector.finish() if last is not None and step < last else []
        last = step
        for event in [*cut, *detector.update(step, {LOSS: loss})]:
            if event.kind != "hard-batch" and event.data["episode"] not in called:
                called.add(event.data["episode"])
                # The restart after a cut-off episode tells of it, with the value before that.
                alarms.append(i - (event.data["phase"] == "end"))
    return np.array(alarms, dtype=np.intp)


def alarms_of(flags_N: NDArray[np.bool_]) -> Alarms:
    """First index of each group of flags."""
    flagged = np.flatnonzero(flags_N)
    return flagged[np.diff(flagged, prepend=-JOIN - 1) > JOIN]


def _rule_alarms(rule: Callable[[NDArray[np.float64]], NDArray[np.bool_]]) -> Callable[[Curve], Alarms]:
    return lambda curve: alarms_of(rule(curve.losses))


DETECTORS: dict[str, Callable[[Curve], Alarms]] = {
    OURS: our_alarms,
    **{name: _rule_alarms(rule) for name, rule in RULES.items()},
}


class Score:
    """Counts over curves."""

    def __init__(self) -> None:
        self.events = self.found = self.hard = self.hard_called = self.false_alarms = self.healthy_values = 0
        self.delays: list[int] = []

    def add(self, curve: Curve, alarms: Alarms) -> None:
        if curve.healthy:
            self.false_alarms += len(alarms)
            self.healthy_values += len(curve.losses)
        for event in curve.events:
            if event.kind == "hard-batch":
                near = (alarms >= event.first - HARD_TOLERANCE) & (alarms <= event.last + HARD_TOLERANCE)
                self.hard += 1
                self.hard_called += int(near.any())
                continue
            inside = alarms[(alarms >= event.first - TOLERANCE) & (alarms <= event.last + TOLERANCE)]
            self.events += 1
            if len(inside):
                self.found += 1
                self.delays.append(int(inside[0]) - event.first)

    def to_json(self) -> dict[str, float | int | None]:
        return {
            "events": self.events,
            "recall": self.found / self.events if self.events else None,
            "median_delay_values": statistics.median(self.delays) if self.delays else None,
            "largest_delay_values": max(self.delays, default=None),
            "false_alarms": self.false_alarms,
            "healthy_values": self.healthy_values,
            "false_alarms_per_10k": 1e4 * self.false_alarms / self.healthy_values
            if self.healthy_values
            else None,
            "hard_batches": self.hard,
            "hard_batches_not_called_spikes": 1 - self.hard_called / self.hard if self.hard else None,
        }


def score(curves: Iterable[Curve]) -> dict[str, dict[str, Score]]:
    """Scores by detector and family; the family "all" holds every curve."""
    scores: dict[str, dict[str, Score]] = {name: {} for name in DETECTORS}
    for curve in curves:
        for name, detect in DETECTORS.items():
            alarms = detect(curve)
            for family in (curve.family, "all"):
                scores[name].setdefault(family, Score()).add(curve, alarms)
    return scores


def seconds_for_a_million(repeats: int = 3) -> float:
    """Median time of ``find_episodes`` on a million ordinary values."""
    rng = np.random.default_rng(0)
    losses = 2 + 6 * np.exp(-np.arange(1_000_000) / 1e5) + 0.05 * rng.standard_normal(1_000_000)
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        find_episodes(None, losses)
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def sensitivity(curves: Sequence[Curve]) -> Iterator[dict[str, Any]]:
    """Our score with each of the two deciding constants moved from its value alone."""
    for name, values in (("LIMIT_SIGMAS", (5.0, 6.0, 7.0, 8.0, 9.0, 10.0)), ("BAND_SIGMAS", (2.5, 3.0, 3.5))):
        kept = getattr(baseline, name)
        try:
            for value in values:
                setattr(baseline, name, value)
                total = Score()
                for curve in curves:
                    total.add(curve, our_alarms(curve))
                yield {"constant": name, "value": value, **total.to_json()}
        finally:
            setattr(baseline, name, kept)


def _text(value: float | int | None, form: str = "{:.3g}") -> str:
    return "-" if value is None else form.format(value)


def _show(console: Console, title: str, scores: dict[str, dict[str, Score]]) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("detector")
    headings = (
        "recall",
        "delay, median (values)",
        "false alarms",
        "per 10k",
        "hard batches not called spikes",
    )
    for heading in headings:
        table.add_column(heading, justify="right")
    for name, by_family in scores.items():
        one = by_family["all"].to_json()
        table.add_row(
            name,
            f"{_text(one['recall'])} of {one['events']}",
            _text(one["median_delay_values"]),
            f"{one['false_alarms']} in {one['healthy_values']:,}",
            _text(one["false_alarms_per_10k"]),
            f"{_text(one['hard_batches_not_called_spikes'], '{:.1%}')} of {one['hard_batches']}",
        )
    console.print(table)


def _show_families(console: Console, scores: dict[str, dict[str, Score]]) -> None:
    table = Table(
        title="Synthetic, by family: recall, or false alarms per 10k, or hard batches called spikes"
    )
    table.add_column("family")
    for name in scores:
        table.add_column(name, justify="right")
    for family in scores[OURS]:
        cells = []
        for name in scores:
            one = scores[name][family].to_json()
            if family.startswith("healthy"):
                cells.append(_text(one["false_alarms_per_10k"]))
            elif family == "hard batches":
                kept = one["hard_batches_not_called_spikes"]
                cells.append(_text(None if kept is None else 1 - kept, "{:.1%}"))
            else:
                cells.append(_text(one["recall"]))
        table.add_row(family, *cells)
    console.print(table)


def _show_kinds(console: Console, scores: dict[str, dict[str, KindScore]], confusion: Any) -> None:
    for what in ("recall", "false_per_10k", "hard_batches_called_spikes", "median_delay"):
        table = Table(title=what.replace("_", " "), title_justify="left")
        table.add_column("family")
        for name in scores:
            table.add_column(name, justify="right")
        for family in [*confusion, "all"]:
            cells = [
                (totals(some) if family == "all" else some[family]).to_json()[what]
                for some in scores.values()
            ]
            if any(cell is not None for cell in cells):
                table.add_row(family, *map(_text, cells))
        console.print(table)
    table = Table(title="the finished log: event -> what it was called", title_justify="left")
    table.add_column("family")
    table.add_column("counts")
    for family, counts in confusion.items():
        if counts:
            said = ", ".join(f"{true} -> {told}: {n}" for (true, told), n in sorted(counts.items()))
            table.add_row(family, said)
    console.print(table)


def _kinds(options: argparse.Namespace) -> int:
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    curves = (mixtures if options.mixtures else curves_by_kind)(seeds, salt=options.salt)
    scores, confusion = kind_scores(curves, DETECTORS if options.peers else {OURS: our_alarms})
    if options.json:
        result = {
            "scores": {n: {f: s.to_json() for f, s in some.items()} for n, some in scores.items()},
            "confusion": {
                family: {f"{true} -> {told}": n for (true, told), n in counts.items()}
                for family, counts in confusion.items()
            },
        }
        print(json.dumps(result))
    else:
        _show_kinds(Console(width=160), scores, confusion)
    return 0


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="spike_detection", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "folder", nargs="?", type=Path, help="CSV logs and events.csv; left out: synthetic only"
    )
    parser.add_argument("--seeds", type=int, default=20, help="synthetic curves of each family")
    parser.add_argument("--sensitivity", action="store_true", help="also move our constants")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--kinds", action="store_true", help="score each kind of trouble for itself instead")
    parser.add_argument("--mixtures", action="store_true", help="score logs composed at random instead")
    parser.add_argument("--peers", action="store_true", help="with these two: the other rules, too (slow)")
    parser.add_argument("--first-seed", type=int, default=0, help="with these two: the first seed")
    parser.add_argument("--salt", type=int, default=0, help="with these two: another draw of everything")
    options = parser.parse_args(argv)
    if options.kinds or options.mixtures:
        return _kinds(options)
    curves = {"synthetic": list(synthetic_curves(options.seeds))}
    if options.folder is not None:
        curves["real"] = real_curves(options.folder)
    scores = {origin: score(some) for origin, some in curves.items()}
    million = seconds_for_a_million()
    moved = {origin: list(sensitivity(some)) for origin, some in curves.items() if options.sensitivity}
    if options.json:
        result = {
            "scores": {
                origin: {n: {f: s.to_json() for f, s in families.items()} for n, families in by_name.items()}
                for origin, by_name in scores.items()
            },
            "seconds_for_a_million_values": million,
            "sensitivity": moved,
        }
        print(json.dumps(result))
        return 0
    console = Console(width=160)
    for origin, by_name in scores.items():
        _show(console, f"{origin.capitalize()} curves", by_name)
    _show_families(console, scores["synthetic"])
    console.print(f"{OURS}: {million:.2f} s for 1,000,000 values")
    for origin, rows in moved.items():
        for row in rows:
            console.print(
                f"{origin}: {row['constant']} = {row['value']:g}: recall {_text(row['recall'])}, "
                f"false alarms per 10k {_text(row['false_alarms_per_10k'])}, hard batches not called spikes "
                f"{_text(row['hard_batches_not_called_spikes'], '{:.1%}')}"
            )
    return 0
