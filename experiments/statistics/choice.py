"""Chooses the law that fits the values, and divides a stake among the laws of a claim.

Once, all data together choose: shares where all values are 0 or 1; ranks where one is infinite, on request, or where the spread is
within ``FINE`` steps of the values' grid (counts, rounded figures); Student's t else. On a grid the spread is often small by
chance, and t large with it: there order decides.

At every look a claim's first four runs settle its laws, by facts that stay the same if an arm's and a baseline's runs change
places: order alone, for good, where a value is infinite or the sizes of the differences (for two groups, all values) spread by less
than ``FINE`` steps of their grid; shares where all are 0 or 1; else the stake is divided between Student's law and order
(``stake``). A law that has ceased to fit, by the rule above, does not count at that look.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import numpy as np

from experiments.statistics.law import Law
from experiments.statistics.proportions import PairedRates, UnpairedRates
from experiments.statistics.ranks import RankSum, SignedRanks, Signs, difference
from experiments.statistics.stake import FITTING, Stake
from experiments.statistics.student import PairedT, UnpairedT

Scale = Literal["linear", "log", "rank"]
Kind = Literal["t", "rank", "share"]

LEAST_SEEDS = 4
# Steps of the values' grid that the standard deviation must reach for Student's law.
FINE = 2.0


def fitting(a: np.ndarray, b: np.ndarray | None, *, scale: Scale, paired: bool) -> Law:
    """The law for one look."""
    return _law(a, b, kind_of(a, b, scale=scale, paired=paired), paired)


def looks(a: np.ndarray, b: np.ndarray | None, *, scale: Scale, paired: bool) -> Iterator[tuple[int, Stake]]:
    """Every look from the fourth run on: the number of runs of the shorter arm, and the stake on them."""
    most = max(len(a), 0 if b is None else len(b))
    plan = _plan(a[:LEAST_SEEDS], None if b is None else b[:LEAST_SEEDS], scale, paired)
    for k in range(min(LEAST_SEEDS, most), most + 1):
        first, other = a[:k], None if b is None else b[:k]
        runs = min(len(first), len(first) if other is None else len(other))
        order = _order(first, other, paired)
        if plan == "rank":
            yield runs, Stake(((order, 1.0),))
            continue
        kind = kind_of(first, other, scale=scale, paired=paired)
        fits = kind == plan
        if plan == "share" and paired:
            # McNemar's evidence is that of the signs.
            yield runs, Stake(((_law(first, other, "share", paired) if fits else order, 1.0),))
        elif not fits:
            yield runs, Stake(((order, 1 - FITTING),))
        elif plan == "share":
            yield runs, Stake(((_law(first, other, plan, paired), FITTING),))
        else:
            yield runs, Stake(((_law(first, other, plan, paired), FITTING), (order, 1 - FITTING)))


def _plan(a: np.ndarray, b: np.ndarray | None, scale: Scale, paired: bool) -> Kind:
    """The laws of a claim, from facts of its first runs that do not show which arm is which."""
    values = a if b is None else np.concatenate([a, b])
    if scale == "rank" or not np.all(np.isfinite(values)):
        return "rank"
    if b is not None and scale == "linear" and np.all((values == 0) | (values == 1)):
        return "share"
    # Sizes of differences, without their signs; for two groups, all values. Where the first is wide, so are the differences.
    sizes = values if b is not None and not paired else np.abs(a if b is None else a - b)
    spread = float(np.std(sizes, ddof=1)) if len(sizes) > 1 else 0.0
    return "t" if spread >= FINE * _grid_step(values, log=scale == "log") else "rank"


def _order(a: np.ndarray, b: np.ndarray | None, paired: bool) -> Law:
    if b is None:
        return Signs(a)
    return Signs(difference(a, b, tie=math.nan)) if paired else RankSum(a, b)


def _law(a: np.ndarray, b: np.ndarray | None, kind: Kind, paired: bool) -> Law:
    if b is None:
        return PairedT(a) if kind == "t" else Signs(a)
    if not paired:
        groups: dict[Kind, type[UnpairedT] | type[RankSum] | type[UnpairedRates]] = {
            "t": UnpairedT,
            "rank": RankSum,
            "share": UnpairedRates,
        }
        return groups[kind](a, b)
    # Two runs that died alike are a tie, and do not bound the arms' distance.
    d = difference(a, b, tie=math.nan)
    pairs: dict[Kind, type[PairedT] | type[SignedRanks] | type[PairedRates]] = {
        "t": PairedT,
        "rank": SignedRanks,
        "share": PairedRates,
    }
    return pairs[kind](d)


def kind_of(a: np.ndarray, b: np.ndarray | None, *, scale: Scale, paired: bool) -> Kind:
    """The kind of law that fits all of these values."""
    values = a if b is None else np.concatenate([a, b])
    if b is not None and scale == "linear" and np.all((values == 0) | (values == 1)):
        return "share"
    if scale == "rank" or not np.all(np.isfinite(values)):
        return "rank"
    samples = [a] if b is None else [a - b] if paired else [a, b]
    freedom = sum(len(x) for x in samples) - len(samples)
    if freedom < 1:
        return "rank"
    spread = math.sqrt(sum(float(np.var(x)) * len(x) for x in samples) / freedom)
    return "t" if spread >= FINE * _grid_step(values, log=scale == "log") else "rank"


def _grid_step(values: np.ndarray, *, log: bool) -> float:
    """The largest step of which all differences between values are multiples, whatever their unit; at least float32's resolution,
    as fine as a loss. For logarithms, the step at the median value.
    """
    distinct = np.unique(np.exp(values) if log else values)
    size = float(np.median(np.exp(values))) if log else 1.0
    least = float(np.max(np.abs(distinct))) * 2.0**-23
    if len(distinct) < 2 or not math.isfinite(least):
        return math.inf
    apart = np.diff(distinct)
    # Euclid's algorithm on floats: the step is at most the smallest difference, and at most another's remainder by it.
    step = float(apart.min())
    while step > least:
        left = np.abs(apart - np.rint(apart / step) * step)
        left = left[left > least / 2]
        if not len(left):
            return step / size
        step = float(left.min())
    return least / size
