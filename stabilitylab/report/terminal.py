"""A run on the terminal: what happened, why and what to try; then its events, one a line; its last values as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from stabilitylab.command_line.narrow_tables import print_table
from stabilitylab.figures.numbers import plain
from stabilitylab.monitoring.sentences import event_line
from stabilitylab.report.close_ups import course
from stabilitylab.report.episodes_section import counted, key_message
from stabilitylab.report.page import Statements
from stabilitylab.runs.run import Run
from stabilitylab.spikes import episodes_of
from stabilitylab.telemetry import Event

# A pipe has no width: names must arrive whole.
PIPE_WIDTH = 400
REPEATED = ("overflow", "checkpoint-lost", "telemetry-lost")


def show_run(run: Run) -> None:
    """Print a run to standard output."""
    console = Console()
    if not console.is_terminal and "COLUMNS" not in console._environ:
        console = Console(width=PIPE_WIDTH)
    loss = run.series("train/-/loss")
    said = [counted(episodes_of(run.events))]
    if len(loss):
        said.append(f"The{course(loss)[3:]}")
    # Names come from the run: none of them is markup.
    lines = [f"{run.path}: {'. '.join(filter(None, said))}.", *_key_message(run)]
    if told := event_lines([event for event in run.events if event.kind != "diagnosis"]):
        lines += ["", *told]
    for line in lines:
        console.print(Text(line), highlight=False, soft_wrap=True)
    console.print()
    print_table(console, _table(run))


def _key_message(run: Run) -> list[str]:
    """The statements with which the run's page begins."""
    (statements,) = key_message(run).parts
    assert isinstance(statements, Statements)
    lines = [f"{one.word}: {one.text} {one.detail}".rstrip() for one in statements.said]
    return [*lines, *([statements.note] if statements.note else [])]


def _table(run: Run) -> Table:
    metrics = run.metrics
    table = Table("metric", "steps", "first", "last", "largest", "not finite")
    scalars = metrics[metrics["family"].isin(["train", "precision"]) & (metrics["size"] == 0)]
    for family, site, statistic in scalars[["family", "site", "statistic"]].itertuples(index=False):
        series = run.series(f"{family}/{site}/{statistic}")
        finite = series[abs(series) < float("inf")]
        numbers = [series.iloc[0], series.iloc[-1], finite.max()]
        shown = [plain(float(f"{number:.5g}")) for number in numbers]
        bad = len(series) - len(finite)
        table.add_row(Text(f"{family}/{site}/{statistic}"), str(len(series)), *shown, str(bad) if bad else "")
    return table


def event_lines(events: Sequence[Event]) -> list[str]:
    """A line an event; what comes again and again (an overflow of one layer, say) is one line at its first time."""
    again: dict[tuple[str, str], list[Event]] = {}
    for event in events:
        if event.kind in REPEATED:
            again.setdefault((event.kind, repr(event.data)), []).append(event)
    lines = []
    for event in events:
        alike = again.get((event.kind, repr(event.data)), [event])
        if event is not alike[0]:
            continue
        line = event_line(event)
        if len(alike) > 1:
            line += f", and {len(alike) - 1} times more until step {alike[-1].step}"
        lines.append(line)
    return lines
