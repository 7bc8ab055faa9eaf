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
REPEATED = ("overflow", "checkpoint-lost", "telemetry-lost")


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
    for line in event_lines(run.events):
        # Names come from the run: none of them is markup.
        console.print(Text(line), highlight=False, soft_wrap=True)


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


def event_lines(events: Sequence[Event]) -> list[str]:
    """A line an event; what comes again and again, an overflow of one layer say, is one line at its first time."""
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


def event_line(event: Event) -> str:
    """What happened, as a person would say it."""
    data = event.data
    if event.kind == "response":
        return f"step {event.step}: {_response(data)}"
    if event.kind == "rewind":
        why = f": {data['why']}" if data.get("why") else ""
        return f"step {event.step}: training went on from here{why}"
    if event.kind == "overflow" and "site" in data:
        tensor = str(data.get("tensor", "a number")).replace("_", " ")
        return f"step {event.step}: overflow: the {tensor} of {data['site']} left the number format"
    if event.kind == "diagnosis" and isinstance(data.get("sentences"), Sequence):
        return f"step {event.step}: why: {' '.join(map(str, data['sentences'][:3]))}"
    if event.kind in TOLD or event.kind in KINDS:
        if data.get("phase") == "end" and data.get("end") is not None:
            return f"step {event.step}: {event.kind} that began at step {data.get('onset')} is over, its last step {data['end']}"
        return alarm_line(event)
    words = ", ".join(f"{name} {value}" for name, value in _plain(data))
    return f"step {event.step}: {event.kind.replace('-', ' ')}" + (f": {words}" if words else "")


def _response(data: Mapping[str, Any]) -> str:
    """A decision: "the responder answered the non-finite of train/-/loss since step 34: back to step 34, rate x 0.5"."""
    reason = data.get("reason")
    cause = ""
    if isinstance(reason, Mapping) and "kind" in reason:
        since = f" since step {reason['onset']}" if "onset" in reason else ""
        cause = f" the {reason['kind']} of {reason.get('signal', 'the run')}{since}"
    skipped = int(data.get("skip_batches") or 0)
    done = [
        f"back to step {data['back_to']}" if data.get("back_to") is not None else "",
        f"learning rate x {data['rate_factor']:g}" if data.get("rate_factor") is not None else "",
        f"embedding gradient x {data['alpha']:g}" if data.get("alpha") is not None else "",
        f"clip at {data['clip']:g}" if data.get("clip") is not None else "",
        f"{skipped} {'batch' if skipped == 1 else 'batches'} left out" if skipped else "",
    ]
    said = ", ".join(filter(None, done)) or str(data.get("kind", "nothing")).replace("-", " ")
    return f"the responder answered{cause}: {said}"


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
