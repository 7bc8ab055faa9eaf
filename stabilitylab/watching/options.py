"""What was asked of a watch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What was asked of a watch.

    Attributes:
        loss, step, run, pattern: as for ``spikes``.
        tell: notices that are said as alerts are.
        silent_after: seconds without a value that are a silence; 0: never.
        new_only: what stands in the log when the watch first begins is learned from and not told.
    """

    loss: str | None = None
    step: str | None = None
    run: str | None = None
    pattern: str | None = None
    tell: frozenset[str] = frozenset()
    silent_after: float = 600.0
    new_only: bool = False
