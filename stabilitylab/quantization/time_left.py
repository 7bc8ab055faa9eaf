"""Shows how far a long measurement is and how long it will take: as a bar on a terminal, as an occasional line in a pipe."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS = 30.0  # between lines in a pipe
_STEPS = 5  # before the first line: the first step includes what comes before all


class Pace:
    """Counts steps and shows them.

    Args:
        console: where to show them.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._began = self._said = time.monotonic()
        self._from = 0

    @contextmanager
    def of(self, what: str, total: int | None = None, done: int = 0) -> Iterator[Pace]:
        """A stretch of the work; ``done`` steps of it were done before."""
        self._began = self._said = time.monotonic()
        self._from, self._done, self._total, self._what = done, done, total, what
        if not self._console.is_terminal:
            if not self._console.quiet:
                self._console.print(what, highlight=False)
            yield self
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self._console, transient=True) as progress:
            self._progress = progress
            self._task = progress.add_task(what, total=total, completed=done)
            yield self
        self._progress = None

    def step(self) -> None:
        """Count one step more."""
        self._done += 1
        if self._progress is not None:
            self._progress.update(self._task, completed=self._done)
            return
        now = time.monotonic()
        if now - self._said < _SECONDS or self._total is None or self._done - self._from < _STEPS:
            return
        self._said = now
        left = (now - self._began) / (self._done - self._from) * (self._total - self._done)
        self._console.print(
            f"{self._what}: {self._done} of {self._total}, about {timedelta(seconds=round(left))} left",
            highlight=False,
        )
