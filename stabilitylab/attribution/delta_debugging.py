"""Delta debugging: finds the smallest set that still passes a test.

``smallest`` takes a set for which a test holds and finds a subset for which it holds without a superfluous member, by halving: it
tests the parts of a partition, then the rest without each part, then a finer partition. (Zeller and Hildebrandt, Simplifying and
isolating failure-inducing input, IEEE TSE 28(2), 2002, algorithm ddmin: 1-minimal; some 2 log2 n tests where one member is enough,
n^2 + 3 n at worst.)

It asks tests that do not depend on each other together, so that they can run side by side.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def smallest(
    members: Sequence[T], holds: Callable[[list[tuple[T, ...]]], list[bool]], *, finest: int | None = None
) -> tuple[T, ...]:
    """A 1-minimal subset, in the order of ``members``.

    Args:
        members: a set for which the test holds.
        holds: for each of several subsets whether the test holds; it may stop answering (all False) when time is up, and
            ``smallest`` returns the smallest set so far.
        finest: partitions have at most this many parts. Where the test needs members of all parts the search ends there, instead of
            after the square of their number; it finds a set of fewer members than parts all the same.
    """
    found, parts = tuple(members), 2
    while len(found) > 1:
        parts = min(parts, len(found))
        chunks = _split(found, parts)
        answers = holds(chunks)
        if any(answers):
            found, parts = chunks[answers.index(True)], 2
            continue
        if parts > 2:  # with two parts each is the rest without the other
            rests = [
                tuple(m for other in chunks[:i] + chunks[i + 1 :] for m in other) for i in range(len(chunks))
            ]
            answers = holds(rests)
            if any(answers):
                found, parts = rests[answers.index(True)], parts - 1
                continue
        if parts == len(found) or (finest is not None and parts >= finest):
            break
        parts *= 2
    return found


def _split(members: tuple[T, ...], parts: int) -> list[tuple[T, ...]]:
    edges = [round(i * len(members) / parts) for i in range(parts + 1)]
    return [members[a:b] for a, b in itertools.pairwise(edges)]
