"""Curves with known events: real logs from a folder, and synthetic ones.

A folder holds CSV logs (step, loss) and ``events.csv``: ``file,kind,first_step,last_step,height``, where a file with kind
``healthy`` has none. Here an index of the value gives an event's place, so that a step that occurs twice is no trouble.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stabilitylab.errors import InputError
from stabilitylab.logs.log import RowBlock
from stabilitylab.logs.recognise import open_log
from stabilitylab.telemetry import LOSS


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """An event: ``first`` to ``last`` are indices of values."""

    kind: str
    first: int
    last: int


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A loss curve and its events; ``healthy`` curves are those on which an alarm is false."""

    name: str
    family: str
    steps: NDArray[np.int64]
    losses: NDArray[np.float64]
    events: list[Labelled] = field(default_factory=list)
    healthy: bool = False


def real_curves(folder: Path) -> list[Curve]:
    """The logs that ``events.csv`` in ``folder`` names.

    Raises:
        InputError: there is no such table, it lacks a column, or a log that it names is missing or has no loss.
    """
    table = folder / "events.csv"
    if not table.is_file():
        raise InputError(
            f"{folder} holds no events.csv (file,kind,first_step,last_step,height): nothing to score by"
        )
    labels = pd.read_csv(table)
    if missing := {"file", "kind", "first_step", "last_step"} - set(labels.columns):
        raise InputError(f"{table} lacks the column {sorted(missing)[0]!r}")
    curves = []
    for name, own in labels.groupby("file", sort=False):
        block = RowBlock.concatenate(list(open_log(folder / str(name)).blocks()))
        events = []
        events_of = own[own["kind"] != "healthy"]
        for kind, first, last in zip(
            *(events_of[name] for name in ("kind", "first_step", "last_step")), strict=True
        ):
            inside = np.flatnonzero((block.steps >= first) & (block.steps <= last))
            if not len(inside):
                raise InputError(f"{table}: {name} has no step between {first:g} and {last:g}")
            events.append(Labelled(kind=str(kind), first=int(inside[0]), last=int(inside[-1])))
        curves.append(
            Curve(
                name=str(name),
                family="real",
                steps=block.steps,
                losses=block.values[LOSS],
                events=events,
                healthy=bool((own["kind"] == "healthy").any()),
            )
        )
    return curves


def synthetic_curves(seeds: int, length: int = 4000) -> Iterator[Curve]:
    """One curve of each family for each seed, each with its own draw of trend, noise, positions and heights."""
    for seed in range(seeds):
        for number, family in enumerate(_FAMILIES):
            yield _FAMILIES[family](family, np.random.default_rng([seed, number]), length)


def _trend(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    """An exponential fall and a power law, from ln V to a final loss."""
    t = np.arange(n)
    start, end = rng.uniform(8, 12), rng.uniform(1.8, 3.5)
    pace, share = rng.uniform(0.01, 0.08) * n, rng.uniform(0.6, 0.9)
    return end + (start - end) * (share * np.exp(-t / pace) + (1 - share) / np.sqrt(1 + t / pace))


def _noisy(rng: np.random.Generator, n: int, *, heavy: bool = False) -> tuple[NDArray[np.float64], float]:
    """A curve without events, and the deviation of its noise: Gaussian, or Student's t with 4 degrees of freedom."""
    sigma = float(np.exp(rng.uniform(math.log(0.01), math.log(0.12))))
    noise = rng.standard_t(4, n) / math.sqrt(2) if heavy else rng.standard_normal(n)
    return _trend(rng, n) + sigma * noise, sigma


def _height(rng: np.random.Generator, sigma: float) -> float:
    """Between 12 sigma (and 0.25 nats: what a reader of the curve would call an event) and 4 nats."""
    return float(np.exp(rng.uniform(math.log(max(0.25, 12 * sigma)), math.log(4))))


def _bump(losses: NDArray[np.float64], at: int, height: float, decay: float, sigma: float) -> Labelled:
    """Add a jump that decays; the event lasts as long as it is 3 sigma high."""
    losses[at:] += height * np.exp(-np.arange(len(losses) - at) / decay)
    lasting = int(decay * math.log(height / (3 * sigma)))
    return Labelled(kind="spike", first=at, last=min(len(losses) - 1, at + max(2, lasting)))


def _places(rng: np.random.Generator, n: int, count: int, apart: int = 200) -> NDArray[np.int64]:
    """Indices of events: anywhere after the first twentieth, ``apart`` from one another."""
    slots = np.arange(n // 20, n - apart, apart)
    return np.sort(rng.choice(slots, size=min(count, len(slots)), replace=False)) + rng.integers(
        0, apart // 4
    )


def _healthy(family: str, rng: np.random.Generator, n: int) -> Curve:
    losses, _ = _noisy(rng, n, heavy="heavy" in family)
    return Curve(name=family, family=family, steps=np.arange(n), losses=losses, healthy=True)


def _spikes(family: str, rng: np.random.Generator, n: int) -> Curve:
    losses, sigma = _noisy(rng, n, heavy="heavy" in family)
    events = [
        _bump(losses, int(at), _height(rng, sigma), rng.uniform(2, 20), sigma) for at in _places(rng, n, 5)
    ]
    interval = 5 if "sparse" in family else 1
    return Curve(name=family, family=family, steps=interval * np.arange(n), losses=losses, events=events)


def _hard_batches(family: str, rng: np.random.Generator, n: int) -> Curve:
    losses, sigma = _noisy(rng, n)
    events = []
    for at in _places(rng, n, 10, apart=50).tolist():
        width = int(rng.integers(1, 3))
        losses[at : at + width] += _height(rng, sigma)
        events.append(Labelled(kind="hard-batch", first=at, last=at + width - 1))
    return Curve(name=family, family=family, steps=np.arange(n), losses=losses, events=events)


def _pairs(family: str, rng: np.random.Generator, n: int) -> Curve:
    losses, sigma = _noisy(rng, n)
    events = []
    for at in _places(rng, n, 3, apart=300).tolist():
        for begin in (at, at + 10):
            losses[begin : begin + 4] += _height(rng, sigma)
            events.append(Labelled(kind="spike", first=begin, last=begin + 3))
    return Curve(name=family, family=family, steps=np.arange(n), losses=losses, events=events)


def _divergence(family: str, rng: np.random.Generator, n: int) -> Curve:
    losses, sigma = _noisy(rng, n)
    at = int(rng.integers(n // 4, n * 3 // 4))
    t = np.arange(n - at)
    losses[at:] += _height(rng, sigma) * (1 - np.exp(-(t + 1) / rng.uniform(0.5, 10)))
    events = [Labelled(kind="divergence", first=at, last=n - 1)]
    return Curve(name=family, family=family, steps=np.arange(n), losses=losses, events=events)


def _not_a_number(family: str, rng: np.random.Generator, n: int) -> Curve:
    """A burst of NaN, and a spike in the first finite value after it."""
    losses, sigma = _noisy(rng, n)
    events = []
    for at in _places(rng, n, 3, apart=300).tolist():
        burst = int(rng.integers(1, 20))
        events.append(_bump(losses, at + burst, _height(rng, sigma), rng.uniform(2, 20), sigma))
        losses[at : at + burst] = math.nan
    return Curve(name=family, family=family, steps=np.arange(n), losses=losses, events=events)


def _resumes(family: str, rng: np.random.Generator, n: int) -> Curve:
    """The run goes back some steps and has a spike within the first values after that."""
    losses, sigma = _noisy(rng, n)
    steps = np.arange(n)
    events = []
    for at in _places(rng, n, 3, apart=400).tolist():
        back = int(rng.integers(20, min(at, 150)))
        losses[at:] = np.r_[losses[at - back : at], losses[at:]][: n - at]
        steps[at:] -= back
        first = at + int(rng.integers(0, 3))
        events.append(_bump(losses, first, _height(rng, sigma), rng.uniform(2, 20), sigma))
    return Curve(name=family, family=family, steps=steps, losses=losses, events=events)


_FAMILIES = {
    "healthy": _healthy,
    "healthy, heavy tails": _healthy,
    "spikes": _spikes,
    "spikes, heavy tails": _spikes,
    "spikes, sparse log": _spikes,
    "two spikes 10 steps apart": _pairs,
    "spike right after NaN": _not_a_number,
    "spike right after a resume": _resumes,
    "divergence": _divergence,
    "hard batches": _hard_batches,
}
