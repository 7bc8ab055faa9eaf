"""``stabilitylab inspect``: what stabilitylab understands of a log, without a judgement."""

from __future__ import annotations

from collections import Counter
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import tyro

from stabilitylab.logs.column_names import STEP
from stabilitylab.logs.log import Log
from stabilitylab.logs.recognise import open_logs
from stabilitylab.logs.source import remove_temporary
from stabilitylab.telemetry import LOSS


def inspect(
    logs: Annotated[tuple[Path, ...], tyro.conf.Positional],
    *,
    json: bool = False,
    loss: str | None = None,
    step: str | None = None,
    run: str | None = None,
    pattern: str | None = None,
) -> None:
    """Say what a log holds: its format, runs and signals, and what the reader left out.

    Args:
        logs: files or folders of any format in docs/logs.md; - is standard input; several files are one log, in order.
        json: print one JSON object.
        loss: name of the loss column, where it is not one of the usual names.
        step: name of the step column, likewise.
        run: name of one run, rank or phase in the log.
        pattern: a pattern for the lines of a text log, or a TOML file of patterns (docs/logs.md).
    """
    try:
        opened = open_logs(logs, loss=loss, step=step, run=run, pattern=pattern)
        segments = [_segment(log) for log in opened]
        left_out = left_out_of(opened)
    finally:
        remove_temporary()
    said = {
        "format": opened[0].format,
        "segments": segments,
        "left_out": [{"reason": reason, "count": count} for reason, count in sorted(left_out.items())],
    }
    if json:
        print(dumps(said))
        return
    print(f"{logs[0]}: {said['format']}, {len(segments)} segment{'s' * (len(segments) != 1)}")
    for one in segments:
        name = f"{one['name']}: " if one["name"] else ""
        signals = ", ".join(f"{signal} ({column})" for signal, column in one["signals"].items())
        print(f"  {name}{one['values']:,} values, steps {one['first_step']} to {one['last_step']}; {signals}")
    for reason, count in sorted(left_out.items()):
        print(f"  left out: {count:,} {reason}")
    for note in dict.fromkeys(note for log in opened for note in getattr(log, "notes", ())):
        print(f"  note: {note}")


def left_out_of(logs: list[Log]) -> Counter[str]:
    """Counts of what the reader left out of all segments; segments of one file share their counts."""
    total: Counter[str] = Counter()
    for counted in {id(log.left_out): log.left_out for log in logs}.values():
        total += counted
    return total


def _segment(log: Log) -> dict[str, Any]:
    values, first, last = 0, None, None
    held = dict.fromkeys(log.columns, False)
    for block in log.blocks():
        values += int(block.logged[LOSS].sum())
        first = int(block.steps[0]) if first is None else first
        last = int(block.steps[-1])
        for signal, logged_N in block.logged.items():
            held[signal] |= bool(logged_N.any())
    return {
        "name": log.name,
        "values": values,
        "first_step": first,
        "last_step": last,
        "signals": {
            signal.rpartition("/")[2]: name
            for signal, name in log.columns.items()
            if signal != STEP and held[signal]
        },
    }
