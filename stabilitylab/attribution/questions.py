"""Decides from the control which forks are worth training first."""

from __future__ import annotations

from collections.abc import Iterator

from stabilitylab.attribution.ablation import Without
from stabilitylab.attribution.fork_verdicts import Yardstick
from stabilitylab.attribution.forks import Forks
from stabilitylab.attribution.observation import Observation
from stabilitylab.attribution.parameter_globs import embedding_weights

# Batches before the onset, each to leave out by itself; the first serves for comparison.
BATCHES = 4


def rounds(forks: Forks, seen: Observation, of: Yardstick) -> tuple[list[Without], list[Without]]:
    """First what changed from outside, and whether updates matter at all; then one fork of each other kind, most telling first."""
    return (
        [*_of_changes(seen, of), *_of_updates(forks)],
        [*_of_batches(of), *_of_layers(seen, of), *_of_gradients(forks)],
    )


def _of_changes(seen: Observation, of: Yardstick) -> Iterator[Without]:
    last = of.end
    if weights := seen.changed_outside(seen.outside_weights, last):
        yield Without(
            kind="outside weights", sites=tuple(weights), label="whatever changed" * (len(weights) > 3)
        )
    if moments := seen.changed_outside(seen.outside_moments, last):
        yield Without(
            kind="outside moments", sites=tuple(moments), label="all parameters" * (len(moments) > 3)
        )
    if seen.settings:
        yield Without(kind="settings")


def _of_updates(forks: Forks) -> Iterator[Without]:
    yield Without(kind="updates", sites=tuple(forks.subject.parameters), label="all parameters")
    yield Without(kind="rate")


def _of_batches(of: Yardstick) -> Iterator[Without]:
    for index in range(max(of.begin, of.onset - BATCHES + 1), of.onset + 1):
        yield Without(kind="batch", rows=(index,))
    if of.onset > of.begin:
        yield Without(kind="data", rows=(max(of.begin, of.onset - 1),))


def _of_layers(seen: Observation, of: Yardstick) -> Iterator[Without]:
    last = of.onset + 1
    if outputs := seen.standing_out(seen.outputs, last):
        yield Without(kind="outputs", sites=tuple(outputs), label="all that grew")
    if gradients := seen.standing_out(seen.output_gradients, last):
        yield Without(kind="output gradients", sites=tuple(gradients), label="all where it grew")
    if scores := seen.scores_standing_out(last):
        callers = dict.fromkeys(seen.callers[number] for number in scores)
        yield Without(kind="scores", sites=tuple(callers), label="all layers where they grew")
    if seen.narrow:
        yield Without(kind="rounding", sites=tuple(seen.narrow), label="all layers")


def _of_gradients(forks: Forks) -> Iterator[Without]:
    names = tuple(forks.subject.parameters)
    yield Without(kind="tensor norms", sites=names, label="each tensor")
    yield Without(kind="stale moments")
    yield Without(kind="norm")
    yield Without(kind="past of moments")
    yield Without(kind="past of momentum")
    if tables := embedding_weights(forks.subject.model, names):
        yield Without(kind="embedding gradient", sites=tables)
