"""The options of a watch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of a watch.

    Attributes:
        loss, step, run, pattern: as for ``spikes``.
        tell: notices to say like alerts.
        silent_after: seconds without a value that count as silence; 0: never.
        new_only: whether to learn from what the log holds when the watch first begins, without telling it.
    """

    loss: str | None = None
    step: str | None = None
    run: str | None = None
    pattern: str | None = None
    tell: frozenset[str] = frozenset()
    silent_after: float = 600.0
    new_only: bool = False
