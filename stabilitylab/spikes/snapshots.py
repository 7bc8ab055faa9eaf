"""Snapshots of a baseline at earlier steps, sparser with age, so that a run that goes back is judged by what was known there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

MOST = 32

State = tuple[Any, ...]


class Snapshots:
    """At most 32 states with their steps; when full, it drops every other one of the older three quarters.

    So the states reach back twice as far each time.
    """

    def __init__(self, kept: Iterable[tuple[int, State]] = ()) -> None:
        self._kept = list(kept)

    def add(self, step: int, state: State) -> None:
        self._kept.append((step, state))
        if len(self._kept) > MOST:
            old = len(self._kept) * 3 // 4
            self._kept[:old] = self._kept[:old:2]

    def add_all(self, steps: Sequence[int], states: Callable[[int], State]) -> None:
        """``add`` each in turn; calls ``states`` only for those that it keeps."""
        kept: list[Any] = [*self._kept]
        for number, step in enumerate(steps):
            kept.append((step, number))
            if len(kept) > MOST:
                old = len(kept) * 3 // 4
                kept[:old] = kept[:old:2]
        self._kept = [(step, states(one) if isinstance(one, int) else one) for step, one in kept]

    def before(self, step: int) -> State | None:
        """The latest state of an earlier step, None where there is none; drops those at or after ``step``."""
        while self._kept and self._kept[-1][0] >= step:
            self._kept.pop()
        return self._kept[-1][1] if self._kept else None

    def state(self) -> list[list[Any]]:
        """The states, ready for JSON."""
        return [[step, list(state)] for step, state in self._kept]

    @classmethod
    def of(cls, saved: Iterable[Sequence[Any]]) -> Self:
        return cls((step, tuple(values)) for step, values in saved)
