"""What would have prevented it? Compares the forks of one event."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table as RichTable

from stabilitylab.command_line.narrow_tables import print_table
from stabilitylab.report import comparison
from stabilitylab.report.page import Section, Table
from stabilitylab.runs import Run
from stabilitylab.spikes import Episode, episodes_of

COLUMNS = ("change", "highest loss", "last loss", "largest gradient norm", "episodes", "verdict")
LOSS = "train/-/loss"
LAST = 5
BASE = 20
LATER = 10


def rows(original: Run, episode: Episode, forks: Sequence[Run]) -> list[tuple[str, ...]]:
    """One row per fork: its name and numbers, and whether the event came."""
    return [_row(original, episode, fork) for fork in forks]


def _row(original: Run, episode: Episode, fork: Run) -> tuple[str, ...]:
    loss, norm = fork.series(LOSS), fork.series("train/-/gradient_norm")
    after = loss[loss.index >= episode.onset]
    finite_norm = norm[np.isfinite(norm)]
    found = _found(episode, fork)
    told = ", ".join(f"{one.kind} at {one.onset}" for one in found) or "none"
    return (
        fork.name,
        _number(after.max(skipna=False) if len(after) else math.nan),
        _number(loss.iloc[-LAST:].mean(skipna=False) if len(loss) else math.nan),
        _number(finite_norm.max() if len(finite_norm) else math.nan),
        told,
        verdict_of(original, episode, fork),
    )


def verdict_of(original: Run, episode: Episode, fork: Run) -> str:
    """The verdict on a fork."""
    return verdict(
        episode, _found(episode, fork), rise=_rise(fork, fork, episode) / _rise(original, fork, episode)
    )


def _found(episode: Episode, fork: Run) -> list[Episode]:
    return [
        one for one in episodes_of(fork.events) if one.kind != "hard-batch" or episode.kind == "hard-batch"
    ]


def _rise(run: Run, fork: Run, episode: Episode) -> float:
    """The rise of the run's loss, in the fork's steps after the onset, over its median just before."""
    loss = run.series(LOSS)
    end = int(fork.series(LOSS).index.max())
    before = loss[(loss.index < episode.onset) & (loss.index >= episode.onset - BASE)]
    within = loss[(loss.index >= episode.onset) & (loss.index <= end)]
    if not len(before) or not len(within):
        return math.nan
    return float(within.max(skipna=False) - before.median())


def verdict(episode: Episode, found: Sequence[Episode], *, rise: float) -> str:
    """Whether an event like ``episode`` is among those found: "came", "milder", "later" or "prevented".

    Like it: the same signal or kind. Milder: ``rise``, the loss's rise as a share of the original's, is below a half. Later: it
    began 10 steps or more after the original.
    """
    alike = [one for one in found if one.signal == episode.signal or one.kind == episode.kind]
    if not alike:
        return "prevented"
    if min(one.onset for one in alike) >= episode.onset + LATER:
        return "later"
    return "milder" if rise < 0.5 else "came"


def show(console: Console, original: Run, episode: Episode, forks: Sequence[Run]) -> None:
    """Print the table on a terminal."""
    table = RichTable(title=f"{episode.kind} at step {episode.onset}: forks", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, overflow="fold")
    for row in rows(original, episode, forks):
        table.add_row(*row)
    print_table(console, table)


def write_report(folder: Path, original: Run, episode: Episode, forks: Sequence[Run]) -> Path:
    """Write the table and the usual comparison as ``report.html`` in ``folder``."""
    page = comparison(forks)
    page.title = f"Replays of the event at step {episode.onset}: {episode.kind}"
    note = (
        "Each fork trains on the same batches from the same state; the one called unchanged repeats the run. "
        f"Highest loss: from step {episode.onset} on. Last loss: the mean of the last {LAST} steps. "
        "Milder: the loss rose less than half as far. Later: it began 10 steps or more after the original."
    )
    table = Table(columns=COLUMNS, rows=rows(original, episode, forks), note=note)
    page.sections.insert(0, Section(title="What would have prevented it?", parts=[table]))
    return page.write(folder / "report.html")


def _number(value: float) -> str:
    return f"{value:.4g}"
