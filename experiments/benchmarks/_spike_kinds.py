"""Curves of every kind at which a detector once failed, each with its own draw for a seed.

A family is a function of a generator, which draws lengths, noise (1 to 30 % of the level, log-uniform), its colour (white, AR(1) of
.5 and .9, Student's t with 3 or 4 degrees of freedom) and all positions and heights. Heights count standard deviations of the
noise, so the noise lets every event show: 10 to 40 of them for a spike, 8 to 40 for a lasting event. Indices, not steps, say where
an event is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from experiments.benchmarks._spike_curves import Curve, Labelled

Vector = NDArray[np.float64]
COLOURS = ("white", "ar .5", "ar .9", "t 3", "t 4")


def curves_by_kind(seeds: range, *, salt: int = 0) -> Iterator[Curve]:
    """One curve of each family for each seed; another ``salt`` is another draw of everything."""
    for seed in seeds:
        for number, (family, make) in enumerate(FAMILIES.items()):
            curve = make(np.random.default_rng([salt, seed, number]), seed)
            yield Curve(
                name=f"{family} {seed}",
                family=family,
                steps=curve.steps,
                losses=curve.losses,
                events=curve.events,
                healthy=curve.healthy,
            )


def coloured(rng: np.random.Generator, n: int, colour: str) -> Vector:
    """Noise of deviation 1."""
    if colour.startswith("t"):
        df = int(colour[2:])
        return rng.standard_t(df, n) / math.sqrt(df / (df - 2))
    white = rng.standard_normal(n)
    if colour == "white":
        return white
    rho = float(colour[3:])
    y = np.empty(n)
    y[0] = white[0]
    for i in range(1, n):
        y[i] = rho * y[i - 1] + math.sqrt(1 - rho * rho) * white[i]
    return y


def _fall(rng: np.random.Generator, n: int) -> Vector:
    low = rng.uniform(1.0, 3.5)
    high = low + rng.uniform(2, 8)
    return low + (high - low) * np.exp(-rng.uniform(4, 14) * np.arange(n) / n)


def _level(rng: np.random.Generator) -> float:
    return float(np.exp(rng.uniform(math.log(0.01), math.log(0.3))))


def _base(
    rng: np.random.Generator, n: int, *, noise: float | None = None, colour: str | None = None
) -> tuple[Vector, Vector]:
    """A falling curve and the deviation of its noise at each value."""
    share = _level(rng) if noise is None else noise
    trend = _fall(rng, n)
    colour = str(rng.choice(COLOURS[:3])) if colour is None else colour
    return trend * (1 + share * coloured(rng, n, colour)), share * trend


def _curve(
    losses: Vector, events: list[Labelled] | None = None, steps: NDArray[np.int64] | None = None
) -> Curve:
    events = events or []
    return Curve(
        name="",
        family="",
        steps=np.arange(len(losses)) if steps is None else steps,
        losses=losses,
        events=events,
        healthy=not events,
    )


def _raise(losses: Vector, at: int, shape: Vector, sigma: float) -> Labelled:
    """Add ``shape`` from ``at`` on; the event lasts while it is 3 sigma high."""
    end = min(len(losses), at + len(shape))
    losses[at:end] += shape[: end - at]
    out = np.flatnonzero(shape[: end - at] > 3 * sigma)
    return Labelled(kind="spike", first=at, last=at + max(2, int(out[-1]) if len(out) else 2))


def _shape(rng: np.random.Generator, height: float, most: int = 60) -> Vector:
    """A jump that decays, a plateau, or a rise and a fall."""
    kind = int(rng.integers(3))
    length = int(rng.integers(4, most))
    t = np.arange(length)
    if kind == 0:
        return np.asarray(height * np.exp(-np.arange(6 * length) / max(2.0, length / 2)))
    if kind == 1:
        return np.full(length, height)
    return np.asarray(height * np.sin(np.pi * (t + 1) / (length + 1)))


def healthy(colour: str, noise: float | None = None) -> Callable[[np.random.Generator, int], Curve]:
    def make(rng: np.random.Generator, seed: int) -> Curve:
        return _curve(_base(rng, 3000, noise=noise, colour=colour)[0])

    return make


def spikes(colour: str) -> Callable[[np.random.Generator, int], Curve]:
    def make(rng: np.random.Generator, seed: int) -> Curve:
        n = int(rng.integers(1500, 4000))
        losses, sigma = _base(rng, n, colour=colour)
        events = []
        for at in (np.arange(1, 5) * n // 5 + rng.integers(-n // 20, n // 20, 4)).tolist():
            s = max(float(sigma[at]), 0.01 * float(losses[at]))
            events.append(_raise(losses, at, _shape(rng, s * rng.uniform(10, 40)), s))
        return _curve(losses, events)

    return make


def short(low: int, high: int) -> Callable[[np.random.Generator, int], Curve]:
    """A short log: one event, a spike, or a step up for good, at noise of .4 to 5 %."""

    def make(rng: np.random.Generator, seed: int) -> Curve:
        n = int(rng.integers(low, high))
        noise = float(np.exp(rng.uniform(math.log(0.004), math.log(0.05))))
        losses, sigma = _base(rng, n, noise=noise, colour="white")
        at = int(rng.integers(n // 4, n * 4 // 5))
        s = float(sigma[at])
        height = max(s * rng.uniform(9, 30), 0.03 * float(losses[at]))
        if seed % 3 == 2:
            losses[at:] += height
            return _curve(losses, [Labelled(kind="divergence", first=at, last=n - 1)])
        length = int(rng.integers(3, max(4, n // 8)))
        shape = np.full(length, height) if seed % 3 else height * np.exp(-np.arange(n) / length)
        return _curve(losses, [_raise(losses, at, shape, s)])

    return make


def short_healthy(rng: np.random.Generator, seed: int) -> Curve:
    return _curve(_base(rng, int(rng.integers(30, 200)), colour=None)[0])


def diverges(rng: np.random.Generator, seed: int) -> Curve:
    n = int(rng.integers(800, 3000))
    losses, sigma = _base(rng, n)
    at = int(rng.integers(n // 4, n * 3 // 4))
    pace = rng.uniform(0.5, 40)
    height = max(float(sigma[at]) * rng.uniform(8, 40), 0.08 * float(losses[at]))
    losses[at:] += height * (1 - np.exp(-(np.arange(n - at) + 1) / pace))
    return _curve(losses, [Labelled(kind="divergence", first=at, last=n - 1)])


def explodes(rng: np.random.Generator, seed: int) -> Curve:
    """One huge value or a few, then high and wild for good."""
    n = int(rng.integers(600, 3000))
    losses, _ = _base(rng, n, noise=rng.uniform(0.01, 0.05))
    at = int(rng.integers(n // 5, n * 3 // 4))
    level = float(losses[at]) * rng.uniform(3, 30)
    wild = level * np.maximum(0.1, 1 + rng.uniform(0.1, 0.4) * rng.standard_normal(n - at))
    wild[: int(rng.integers(1, 4))] *= rng.uniform(2, 6)
    losses[at:] = wild
    return _curve(losses, [Labelled(kind="divergence", first=at, last=n - 1)])


def mostly_out(rng: np.random.Generator, seed: int) -> Curve:
    n = int(rng.integers(600, 2500))
    losses, _ = _base(rng, n, noise=rng.uniform(0.01, 0.05))
    at = int(n * rng.uniform(0.2, 0.5))
    losses[at:] = np.exp(rng.normal(math.log(50), rng.uniform(0.4, 0.9), n - at))
    return _curve(losses, [Labelled(kind="divergence", first=at, last=n - 1)])


def slow_rise(rng: np.random.Generator, seed: int) -> Curve:
    """A fast fall, then an endless slow rise of a fifth or more."""
    n = int(rng.integers(90, 600))
    low = rng.uniform(2, 5)
    fast = int(rng.integers(6, 16))
    rise = rng.uniform(0.18, 0.5) * low
    trend = low + rng.uniform(0.8, 3) * np.exp(-3 * np.arange(n) / fast)
    at = int(rng.integers(fast * 2, n // 3 + fast))
    trend[at:] += rise * np.arange(n - at) / (n - at)
    losses = trend * (1 + rng.uniform(0.005, 0.02) * rng.standard_normal(n))
    return _curve(losses, [Labelled(kind="divergence", first=at, last=n - 1)])


def stuck(rng: np.random.Generator, seed: int) -> Curve:
    n = int(rng.integers(55, 400))
    sigma = rng.uniform(0.002, 0.01)
    trend = rng.uniform(2, 6) * np.ones(n) + rng.uniform(0, 3) * np.exp(-12 * np.arange(n) / n)
    at = int(rng.integers(n // 2, n * 4 // 5))
    trend[at:] += max(20 * sigma, 0.015 * float(trend[at]))
    return _curve(trend + sigma * rng.standard_normal(n), [Labelled(kind="divergence", first=at, last=n - 1)])


def hard_batches(colour: str) -> Callable[[np.random.Generator, int], Curve]:
    def make(rng: np.random.Generator, seed: int) -> Curve:
        n = 3000
        losses, sigma = _base(rng, n, colour=colour)
        events = []
        for at in range(150, n - 50, 120):
            width = int(rng.integers(1, 3))
            losses[at : at + width] += max(float(sigma[at]), 0.01 * float(losses[at])) * rng.uniform(15, 50)
            events.append(Labelled(kind="hard-batch", first=at, last=at + width - 1))
        return _curve(losses, events)

    return make


def smoothed(rng: np.random.Generator, seed: int) -> Curve:
    """An exponential mean, bias-corrected or not, of a curve with hard batches."""
    n, a = 3000, float(rng.choice([0.8, 0.9, 0.95]))
    noise = rng.uniform(0.01, 0.05)
    raw, sigma = _base(rng, n, noise=noise, colour="white")
    events = []
    for at in range(150, n - 50, 75):
        raw[at] += sigma[at] * rng.uniform(20, 60)
        events.append(Labelled(kind="hard-batch", first=at, last=at))
    corrected = seed % 2 == 0
    mean = 0.0 if corrected else raw[0]
    losses = np.empty(n)
    for i, x in enumerate(raw):
        mean = a * mean + (1 - a) * x
        losses[i] = mean / (1 - a ** (i + 1)) if corrected else mean
    return _curve(losses, events)


def around_zero(rng: np.random.Generator, seed: int) -> Curve:
    n = 2000
    if seed % 3 == 0:
        return _curve(rng.normal(0, rng.uniform(1e-3, 1), n))
    if seed % 3 == 1:
        return _curve(np.round(np.abs(rng.standard_t(2, n)) * 2e-4, 4))
    return _curve(np.round(2 * np.exp(-np.arange(n) / 60) + 2e-4 * np.exp(rng.normal(0, 1, n)), 4))


def quantised(rng: np.random.Generator, seed: int) -> Curve:
    losses, _ = _base(rng, 3000, noise=rng.uniform(0.002, 0.02), colour="white")
    unit = float(rng.choice([0.01, 0.02, 0.05]))
    return _curve(np.round(losses / unit) * unit)


def negative(rng: np.random.Generator, seed: int) -> Curve:
    """A likelihood that falls through zero; a spike in every other one."""
    n = 3000
    trend = rng.uniform(1, 4) - rng.uniform(4, 9) * (1 - np.exp(-6 * np.arange(n) / n))
    sigma = rng.uniform(0.02, 0.2)
    losses = trend + sigma * rng.standard_normal(n)
    events = []
    if seed % 2:
        at = int(rng.integers(800, 2600))
        events = [_raise(losses, at, _shape(rng, max(15 * sigma, 0.05 * abs(trend[at]))), sigma)]
    return _curve(losses, events)


def lows(rng: np.random.Generator, seed: int) -> Curve:
    losses, _ = _base(rng, 3000, noise=rng.uniform(0.01, 0.1))
    if seed % 2:
        losses[199::200] *= rng.uniform(0.3, 0.7)
    else:
        losses[rng.integers(300, 2900, 3)] *= rng.choice([0.0, 0.5], 3)
    return _curve(losses)


def waves(rng: np.random.Generator, seed: int) -> Curve:
    n, period = 5000, float(rng.uniform(300, 800))
    level = rng.uniform(2, 4)
    wave = rng.uniform(0.02, 0.06) * np.sin(2 * np.pi * np.arange(n) / period)
    return _curve(level * (1 + wave + rng.uniform(0.005, 0.02) * rng.standard_normal(n)))


def stairs(rng: np.random.Generator, seed: int) -> Curve:
    n = 4000
    epoch, within = np.divmod(np.arange(n), 1000)
    trend = (
        rng.uniform(1, 3) * rng.uniform(0.75, 0.92) ** epoch * (1 + rng.uniform(0.01, 0.05) * within / 1000)
    )
    return _curve(trend * (1 + rng.uniform(0.01, 0.03) * rng.standard_normal(n)))


def changing_noise(rng: np.random.Generator, seed: int) -> Curve:
    n = 3000
    scale = np.linspace(0.01, 0.1, n) if seed % 2 else np.where(np.arange(n) < n // 2, 0.01, 0.03)
    return _curve(_fall(rng, n) * (1 + scale * rng.standard_normal(n)))


def dies(rng: np.random.Generator, seed: int) -> Curve:
    n = int(rng.integers(300, 1500))
    losses, _ = _base(rng, n, noise=rng.uniform(0.01, 0.1))
    at = int(rng.integers(n // 4, n * 3 // 4))
    losses[at:] = 0.0 if seed % 2 else losses[at]
    return _curve(losses, [Labelled(kind="frozen" if seed % 2 == 0 else "dead", first=at, last=n - 1)])


def nan_bursts(rng: np.random.Generator, seed: int) -> Curve:
    n = int(rng.integers(600, 2000))
    losses, _ = _base(rng, n, noise=rng.uniform(0.01, 0.1))
    at = int(rng.integers(n // 4, n // 2))
    length = int(rng.integers(20, 200))
    losses[at : at + length : int(rng.integers(1, 5))] = math.nan
    return _curve(losses, [Labelled(kind="non-finite", first=at, last=at + length - 1)])


def gaps(rng: np.random.Generator, seed: int) -> Curve:
    """A spike is the last thing before a gap in the log; after it all is well."""
    n = int(rng.integers(400, 1500))
    losses, sigma = _base(rng, n, noise=rng.uniform(0.01, 0.05))
    at = int(rng.integers(n // 3, n * 2 // 3))
    losses[at : at + 5] += float(sigma[at]) * rng.uniform(15, 40)
    steps = np.arange(n)
    steps[at + 5 :] += int(rng.integers(60, 400))
    return _curve(losses, [Labelled(kind="spike", first=at, last=at + 4)], steps)


FAMILIES: dict[str, Callable[[np.random.Generator, int], Curve]] = {
    **{f"healthy, {colour}": healthy(colour) for colour in COLOURS},
    "healthy, 30 %": healthy("white", 0.3),
    "healthy, short": short_healthy,
    **{f"spikes, {colour}": spikes(colour) for colour in COLOURS},
    "short, 50 to 199": short(50, 200),
    "short, 200 to 400": short(200, 400),
    "divergence": diverges,
    "explodes and stays": explodes,
    "out for most of the log": mostly_out,
    "slow rise after a fast fall": slow_rise,
    "stuck higher": stuck,
    "hard batches, white": hard_batches("white"),
    "hard batches, ar .5": hard_batches("ar .5"),
    "smoothed hard batches": smoothed,
    "around zero": around_zero,
    "quantised": quantised,
    "negative": negative,
    "single lows": lows,
    "waves": waves,
    "epoch stairs": stairs,
    "noise that changes": changing_noise,
    "dead and frozen": dies,
    "NaN with holes": nan_bursts,
    "spike before a gap": gaps,
}
