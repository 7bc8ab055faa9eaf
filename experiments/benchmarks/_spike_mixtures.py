"""Logs composed at random: a shape of fall, a noise, and an event, each with its own draw.

The families of ``_spike_kinds.py`` each stand for one kind of trouble; a real run shows a mixture that nobody foresaw. Here each
log of 50 to 3,000 values combines a fall (eight shapes), a noise (twelve colours and distributions, .4 to 30 % of the level) and an
event (eight shapes, 9 to 40 deviations and a twentieth of the level high at least, or none), so that tuning to a family does not
help. The family is the length; a third are healthy. An event of which most is left at the end is a divergence, whatever its shape:
the fall may take a step back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from experiments.benchmarks._spike_curves import Curve, Labelled

Vector = NDArray[np.float64]
LENGTHS = {"50 to 199": (50, 200), "200 to 999": (200, 1000), "1,000 and more": (1000, 3000)}
LEAST_SHARE = 0.05
TRIES = 20  # a steep fall takes most steps back


def mixtures(seeds: range, *, salt: int = 0) -> Iterator[Curve]:
    """One curve of each length for each seed."""
    for seed in seeds:
        for number, (family, (low, high)) in enumerate(LENGTHS.items()):
            rng = np.random.default_rng([salt, seed, number, 17])
            yield _composed(rng, int(rng.integers(low, high)), f"{family}, {seed}", family)


def _composed(rng: np.random.Generator, n: int, name: str, family: str) -> Curve:
    fall, noise, event = (_drawn(rng, some) for some in (list(FALLS), list(NOISES), list(EVENTS)))
    trend = FALLS[fall](rng, n)
    share = math.exp(rng.uniform(math.log(0.004), math.log(0.3)))
    sigma = share * np.abs(trend)
    losses = trend + sigma * NOISES[noise](rng, n)
    events: list[Labelled] = []
    healthy = rng.random() < 1 / 3
    for _ in range(0 if healthy else TRIES):
        at = int(rng.integers(max(12, n // 4), n * 4 // 5))
        s = float(sigma[at])
        height = max(s * math.exp(rng.uniform(math.log(9), math.log(40))), LEAST_SHARE * float(trend[at]))
        shape, hard = EVENTS[event](rng, n - at, height)
        if (label := _label(trend[at:] - trend[at - 1] + shape, shape, s, height, hard=hard)) is not None:
            losses[at:] += shape
            events = [Labelled(kind=label[0], first=at, last=at + label[1])]
            break
    return Curve(
        name=f"{name}: {fall}, {noise} {share:.3f}, {event if events else 'healthy'}",
        family=family,
        steps=np.arange(n),
        losses=losses,
        events=events,
        healthy=not events,
    )


def _label(rise_K: Vector, shape_K: Vector, s: float, height: float, *, hard: bool) -> tuple[str, int] | None:
    """Kind and last index of an event, judged without noise; None for no event, or one that is clearly neither kind.

    A step on a steep fall may only slow it, and then is no rise; or the fall takes it back, and it was a spike.
    """
    out = np.flatnonzero(shape_K > 3 * s)
    if hard:
        return "hard-batch", int(out[-1])
    if rise_K.max() < 0.7 * height or len(out) < 3:
        return None
    kept = float(np.median(rise_K[-max(1, len(rise_K) // 4) :])) / max(float(np.median(rise_K)), 0.5 * height)
    if 0.3 < kept < 0.7:
        return None
    return ("divergence", len(rise_K) - 1) if kept >= 0.7 else ("spike", int(out[-1]))


def _drawn(rng: np.random.Generator, some: Iterable[str]) -> str:
    names = list(some)
    return names[int(rng.integers(len(names)))]


# ------------------------------------------------------------------------------------------------- falls


def _span(rng: np.random.Generator) -> tuple[float, float]:
    low = rng.uniform(0.3, 4)
    return low, low + rng.uniform(1, 8)


def _exponential(rng: np.random.Generator, n: int) -> Vector:
    low, high = _span(rng)
    return np.asarray(low + (high - low) * np.exp(-rng.uniform(3, 20) * np.arange(n) / n))


def _power(rng: np.random.Generator, n: int) -> Vector:
    low, high = _span(rng)
    return np.asarray(
        low + (high - low) * (1 + np.arange(n) / rng.uniform(3, n / 5)) ** -rng.uniform(0.2, 0.8)
    )


def _plateau_first(rng: np.random.Generator, n: int) -> Vector:
    low, high = _span(rng)
    where, width = rng.uniform(0.1, 0.3) * n, rng.uniform(0.02, 0.08) * n
    return np.asarray(low + (high - low) / (1 + np.exp((np.arange(n) - where) / width)))


def _flat(rng: np.random.Generator, n: int) -> Vector:
    return np.full(n, rng.uniform(0.3, 8))


def _straight(rng: np.random.Generator, n: int) -> Vector:
    low, high = _span(rng)
    return np.linspace(high, low, n)


def _epochs(rng: np.random.Generator, n: int) -> Vector:
    epochs = int(rng.integers(3, 7))
    return np.asarray(rng.uniform(1, 4) * rng.uniform(0.75, 0.95) ** (np.arange(n) * epochs // n))


def _drop_of_rate(rng: np.random.Generator, n: int) -> Vector:
    """A cosine's or WSD's end: the fall grows steeper again."""
    low, high = _span(rng)
    t = np.arange(n) / n
    end = rng.uniform(0.7, 0.9)
    return np.asarray(
        (low + (high - low) * np.exp(-12 * t)) * (1 - 0.2 * np.clip((t - end) / (1 - end), 0, 1))
    )


def _two_paces(rng: np.random.Generator, n: int) -> Vector:
    low, high = _span(rng)
    t = np.arange(n)
    fast, slow = rng.uniform(2, 10), rng.uniform(0.3, 3) * n
    return np.asarray(low + (high - low) * (0.7 * np.exp(-t / fast) + 0.3 * np.exp(-t / slow)))


FALLS: dict[str, Callable[[np.random.Generator, int], Vector]] = {
    "exponential": _exponential,
    "power": _power,
    "plateau first": _plateau_first,
    "flat": _flat,
    "straight": _straight,
    "epochs": _epochs,
    "drop of rate": _drop_of_rate,
    "two paces": _two_paces,
}

# ------------------------------------------------------------------------------------------------- noises


def _correlated(rho: float) -> Callable[[np.random.Generator, int], Vector]:
    def make(rng: np.random.Generator, n: int) -> Vector:
        x = rng.standard_normal(n)
        for i in range(1, n):
            x[i] = rho * x[i - 1] + math.sqrt(1 - rho * rho) * x[i]
        return x

    return make


def _student(df: float) -> Callable[[np.random.Generator, int], Vector]:
    return lambda rng, n: np.asarray(rng.standard_t(df, n) / math.sqrt(df / (df - 2)))


def _skewed(shape: float) -> Callable[[np.random.Generator, int], Vector]:
    """Gamma, the shape of a mean over few rows."""
    return lambda rng, n: np.asarray((rng.gamma(shape, 1, n) - shape) / math.sqrt(shape))


def _white_and_slow(rng: np.random.Generator, n: int) -> Vector:
    return 0.8 * rng.standard_normal(n) + 0.6 * _correlated(0.95)(rng, n)


NOISES: dict[str, Callable[[np.random.Generator, int], Vector]] = {
    "white": lambda rng, n: rng.standard_normal(n),
    "ar .3": _correlated(0.3),
    "ar .5": _correlated(0.5),
    "ar .7": _correlated(0.7),
    "ar .9": _correlated(0.9),
    "white and slow": _white_and_slow,
    "t 3": _student(3),
    "t 5": _student(5),
    "Laplace": lambda rng, n: rng.laplace(0, math.sqrt(0.5), n),
    "gamma 4": _skewed(4),
    "gamma 16": _skewed(16),
    "uniform": lambda rng, n: rng.uniform(-math.sqrt(3), math.sqrt(3), n),
}

# ------------------------------------------------------------------------------------------------- events


def _length(rng: np.random.Generator, left: int) -> int:
    return int(rng.integers(4, max(5, left // 3)))


def _decays(rng: np.random.Generator, left: int, height: float) -> tuple[Vector, bool]:
    return height * np.exp(-2 * np.arange(left) / _length(rng, left)), False


def _plateau(rng: np.random.Generator, left: int, height: float) -> tuple[Vector, bool]:
    return np.where(np.arange(left) < _length(rng, left), height, 0.0), False


def _hump(rng: np.random.Generator, left: int, height: float) -> tuple[Vector, bool]:
    length = _length(rng, left)
    t = np.arange(left)
    return np.where(t < length, height * np.sin(np.pi * (t + 1) / (length + 1)), 0.0), False


def _hard_batch(rng: np.random.Generator, left: int, height: float) -> tuple[Vector, bool]:
    return np.where(np.arange(left) < int(rng.integers(1, 3)), height, 0.0), True


def _step(rng: np.random.Generator, left: int, height: float) -> tuple[Vector, bool]:
    return np.full(left, height), False


def _climb(rng: np.random.Generator, left: int, height: float) -> tuple[Vector, bool]:
    return height * (np.arange(left) + 1) / left, False


def _saturates(rng: np.random.Generator, left: int, height: float) -> tuple[Vector, bool]:
    return height * (1 - np.exp(-(np.arange(left) + 1) / rng.uniform(0.5, left / 6))), False


def _wild(rng: np.random.Generator, left: int, height: float) -> tuple[Vector, bool]:
    return 3 * height * np.exp(rng.normal(0, rng.uniform(0.2, 0.6), left)), False


EVENTS: dict[str, Callable[[np.random.Generator, int, float], tuple[Vector, bool]]] = {
    "decays": _decays,
    "plateau": _plateau,
    "hump": _hump,
    "hard batch": _hard_batch,
    "step": _step,
    "climb": _climb,
    "saturates": _saturates,
    "wild": _wild,
}
