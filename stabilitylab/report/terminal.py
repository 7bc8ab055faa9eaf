"""A run on the terminal: its last values as a table, its events as sentences, one a line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from stabilitylab.figures.style import plain
from stabilitylab.monitoring.alarms import TOLD, alarm_line
from stabilitylab.report.close_ups import extremes
from stabilitylab.runs.run import Run
from stabilitylab.spikes import KINDS
from stabilitylab.telemetry import Event

# A pipe has no width: names are to arrive whole.
PIPE_WIDTH = 400
LONGEST_VALUE = 80


def show_run(run: Run) -> None:
    """Print it to standard output."""
    console = Console()
    if not console.is_terminal and "COLUMNS" not in console._environ:
        console = Console(width=PIPE_WIDTH)
    console.print(_table(run))
    loss = run.series("train/-/loss")
    if len(loss):
        said = f"The loss went from {loss.iloc[0]:.4g} to {loss.iloc[-1]:.4g}{extremes(loss)}."
        console.print(said, highlight=False, soft_wrap=True)
    for event in run.events:
        # Names come from the run: none of them is markup.
        console.print(Text(event_line(event)), highlight=False, soft_wrap=True)


def _table(run: Run) -> Table:
    metrics = run.metrics
    table = Table("metric", "steps", "first", "last", "largest", "not finite", title=Text(str(run.path)))
    scalars = metrics[metrics["family"].isin(["train", "precision"]) & (metrics["size"] == 0)]
    for family, site, statistic in scalars[["family", "site", "statistic"]].itertuples(index=False):
        series = run.series(f"{family}/{site}/{statistic}")
        finite = series[abs(series) < float("inf")]
        numbers = [series.iloc[0], series.iloc[-1], finite.max()]
        shown = [plain(float(f"{number:.5g}")) for number in numbers]
        bad = len(series) - len(finite)
        table.add_row(Text(f"{family}/{site}/{statistic}"), str(len(series)), *shown, str(bad) if bad else "")
    return table


def event_line(event: Event) -> str:
    """What happened, as a person would say it."""
    data = event.data
    if event.kind == "diagnosis" and isinstance(data.get("sentences"), Sequence):
        return f"step {event.step}: why: {' '.join(map(str, data['sentences'][:3]))}"
    if event.kind in TOLD or event.kind in KINDS:
        if data.get("phase") == "end" and data.get("end") is not None:
            return f"step {event.step}: {event.kind} that began at step {data.get('onset')} is over, its last step {data['end']}"
        return alarm_line(event)
    words = ", ".join(f"{name} {value}" for name, value in _plain(data))
    return f"step {event.step}: {event.kind.replace('-', ' ')}" + (f": {words}" if words else "")


def _plain(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names and values without brackets and quotes; what is long is cut, with its length."""
    for name, value in data.items():
        words = f"{prefix}{str(name).replace('_', ' ')}"
        if isinstance(value, Mapping):
            yield from _plain(value, f"{words} ")
            continue
        text = " and ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        text = " ".join(text.split())
        if value is not None and text:
            yield (
                words,
                text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}… ({len(text)} characters)",
            )
