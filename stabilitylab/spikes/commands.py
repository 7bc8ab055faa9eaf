"""``stabilitylab spikes`` gives a log's episodes as a table, JSON or a picture; ``stabilitylab precursors`` says which signals
warned of them."""

from __future__ import annotations

from collections import Counter
from json import dumps
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stabilitylab.command_line.narrow_tables import print_table
from stabilitylab.command_line.whole_file import whole_file
from stabilitylab.errors import InputError
from stabilitylab.logs.column_names import STEP
from stabilitylab.logs.commands import left_out_of
from stabilitylab.logs.free_text import ANY_TEXT
from stabilitylab.logs.log import Log
from stabilitylab.logs.recognise import open_logs
from stabilitylab.logs.source import remove_temporary
from stabilitylab.spikes.episodes import KINDS, Episode
from stabilitylab.spikes.log_scan import Scan, scan_log


def spikes(
    logs: Annotated[tuple[Path, ...], tyro.conf.Positional],
    *,
    json: bool = False,
    plot: Path | None = None,
    loss: str | None = None,
    step: str | None = None,
    run: str | None = None,
    pattern: str | None = None,
) -> None:
    """Find spikes, hard batches, divergences, non-finite, dead and frozen losses, and loss-scale collapses in a log.

    "level" is the baseline before and after an episode; "told" is the step at which a watch of the run would have reported it.

    Args:
        logs: a log of any format in docs/logs.md, a run folder, or - for standard input; several files are one log, in order.
        json: print one JSON list of episodes instead of a table; notes on the log go to standard error.
        plot: write a picture (.png, .svg, .pdf) with the episodes marked.
        loss: name of the loss column, where it is not one of the usual names.
        step: name of the step column, likewise.
        run: name of one run, rank or phase in the log; by default all, each judged by itself.
        pattern: a pattern for the lines of a text log, or a TOML file of patterns (docs/logs.md).
    """
    if plot is not None and plot.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise InputError(f"--plot {plot}: the name must end in .png, .svg or .pdf")
    try:
        opened = open_logs(logs, loss=loss, step=step, run=run, pattern=pattern)
        scans = [scan_log(one) for one in opened]
    finally:
        remove_temporary()
    if plot is not None:
        if len(opened) > 1:
            names = ", ".join(repr(one.name) for one in opened)
            raise InputError(
                f"--plot {plot} draws one run, and {logs[0]} holds {names}: choose one with --run"
            )
        _write_picture(scans[0], opened[0], plot)
    if json:
        several = len(opened) > 1
        print(
            dumps(
                [
                    episode.to_json() | ({"segment": one.name} if several else {})
                    for one, scan in zip(opened, scans, strict=True)
                    for episode in scan.episodes
                ]
            )
        )
        errors = Console(stderr=True)
        for one, scan in zip(opened, scans, strict=True):
            for note in _notes(scan, one):
                errors.print(f"note: {note}", highlight=False, soft_wrap=True)
        return
    for one, scan in zip(opened, scans, strict=True):
        _show(scan, one)
    for sentence in _of_ranks(opened, scans):
        print(sentence)
    for reason, count in sorted(left_out_of(opened).items()):
        print(f"left out: {count:,} {reason}")


def _of_ranks(opened: list[Log], scans: list[Scan]) -> list[str]:
    """Notes on episodes that only some ranks of a run have: one bad value of several per step."""
    ranks = [
        (one.name, scan) for one, scan in zip(opened, scans, strict=True) if one.name.startswith("rank ")
    ]
    having: dict[tuple[str, int], list[str]] = {}
    for name, scan in ranks:
        for episode in scan.episodes:
            having.setdefault((episode.kind, episode.onset), []).append(name)
    return [
        f"{', '.join(names[:8])} alone of {len(ranks)} ranks: {kind} from step {onset}, {len(names)} of {len(ranks)} values a step"
        for (kind, onset), names in sorted(having.items(), key=lambda item: item[0][1])
        if len(names) < len(ranks) and kind != "hard-batch"
    ]


def precursors(runs: Annotated[Path, tyro.conf.Positional], *, json: bool = False, horizon: int = 64) -> None:
    """Say how well each signal warned of the spikes and divergences in a folder of runs.

    Args:
        runs: a folder with run folders in it, or one run folder.
        json: print one JSON list instead of a table.
        horizon: steps within which an episode must follow an alarm for the alarm to be right.
    """
    from stabilitylab.spikes.precursors import find_runs, judge

    found = find_runs(runs)
    records = judge(found, horizon=horizon)
    if json:
        print(dumps([record.to_json() for record in records]))
        return
    table = Table(title=f"Warnings within {horizon} steps, over {len(found)} runs", title_justify="left")
    table.add_column("precursor")
    for name in ("precision", "right / alarms", "recall", "warned / episodes", "median lead (steps)", "runs"):
        table.add_column(name, justify="right")
    for one in records:
        table.add_row(
            one.precursor,
            "-" if one.precision is None else f"{one.precision:.2f}",
            f"{one.right} / {one.right + one.wrong}",
            "-" if one.recall is None else f"{one.recall:.2f}",
            f"{one.warned} / {one.episodes}",
            "-" if one.median_lead is None else f"{one.median_lead:g}",
            str(one.runs),
        )
    console = Console()
    print_table(console, table)
    if not any(one.episodes for one in records):
        console.print("no episodes: nothing to warn of", highlight=False)


def _write_picture(scan: Scan, log: Log, plot: Path) -> None:
    from stabilitylab.spikes.picture import draw

    picture = draw(scan, log.path.name)
    with whole_file(plot) as file:
        picture.savefig(file, dpi=150, format=plot.suffix[1:].lower())


def _show(scan: Scan, log: Log) -> None:
    console = Console()
    title = f"{log.path.name}, {log.name}" if log.name else log.path.name
    if scan.episodes:
        print_table(console, _table(scan.episodes, title))
        for numbers, said in _what_else(scan.episodes):
            console.print(f"{numbers}: {said}", markup=False, highlight=False, soft_wrap=True)
    count = Counter(episode.kind for episode in scan.episodes)
    found = ", ".join(f"{count[kind]} {kind}" for kind in KINDS if count[kind]) or "no episodes"
    console.print(
        f"{title}: {found} in {scan.values:,} loss values", markup=False, highlight=False, soft_wrap=True
    )
    console.print(
        f"spike score (7 sigma, 1,000 values): {scan.spike_score:.3g}; "
        f"detrended: {scan.detrended_spike_score:.3g}",
        highlight=False,
        soft_wrap=True,
    )
    for sentence in _explanations(log):
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)
    for note in _notes(scan, log):
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)


def _notes(scan: Scan, log: Log) -> list[str]:
    """Sentences about the log as a whole."""
    notes = list(getattr(log, "notes", ()))
    if log.format == ANY_TEXT.name:
        read = ", ".join(f"{signal.rpartition('/')[2]} from {name!r}" for signal, name in log.columns.items())
        notes.append(
            f"no known trainer wrote this text; read are {read}: --loss, --step or --pattern read another"
        )
    if STEP not in log.columns and log.path.is_file() and "tfevents" not in log.path.name:
        notes.append("no step column: steps are row numbers, from 0")
    if scan.sorted:
        notes.append("the log was not in the order of its steps and has been sorted")
    if scan.not_logged:
        notes.append(f"{scan.not_logged:,} rows hold no loss")
    if scan.zeros:
        notes.append(
            f"{scan.zeros:,} losses are exactly 0, the first at step {scan.first_zero}: "
            "a filter for NaN writes that"
        )
    if scan.period is not None:
        notes.append(f"the loss goes in waves of {scan.period:,} steps, as a small shuffle buffer makes it")
    if scan.recorded:
        notes.append("the episodes are those that the run recorded")
    if scan.values < 3:
        notes.append("too few values to tell an excursion from the rest")
    return notes


def _explanations(log: Log) -> list[str]:
    """Why, and what to try: the first sentences and the advice of each diagnosis in a run folder; where the run did not close the
    folder, of diagnoses made now."""
    if not log.path.is_dir():
        return []
    from stabilitylab.runs import Run  # imports pandas, which a text log does not need
    from stabilitylab.runs.folder import RunFolder
    from stabilitylab.spikes.advice import told_now

    if not RunFolder(log.path).events.is_file():
        return []
    events = RunFolder(log.path).read_events()
    diagnoses = [event for event in events if event.kind == "diagnosis"]
    if not diagnoses:
        from stabilitylab.spikes.explain import explain  # reads telemetry: only where needed

        diagnoses = explain(RunFolder(log.path))
    run, said = Run(RunFolder(log.path)), []
    for event in diagnoses:
        sentences = told_now(run, event.data)
        tries = [one for one in sentences[3:] if one.startswith("Try: ")]
        said.append(" ".join([*sentences[:3], *tries]))
    return said


def _table(episodes: list[Episode], title: str) -> Table:
    table = Table(title=Text(title), title_justify="left")
    table.add_column("#", justify="right")
    table.add_column("kind", no_wrap=True)
    for name in ("onset", "peak", "end", "height", "level", "told"):
        table.add_column(name, justify="right")
    table.add_column("signal")
    for number, one in enumerate(episodes, start=1):
        table.add_row(
            str(number),
            one.kind,
            str(one.onset),
            str(one.peak),
            "open" if one.end is None or one.to_the_end else str(one.end),
            "" if one.height is None else f"{one.height:.3g}",
            _levels(one),
            "afterwards" if one.told is None else str(one.told),
            Text(one.signal),
        )
    return table


def _levels(one: Episode) -> str:
    if one.level is None:
        return ""
    return f"{one.level:.4g}" + ("" if one.end_level is None else f" -> {one.end_level:.4g}")


def _what_else(episodes: list[Episode]) -> list[tuple[str, str]]:
    """Reasons and precursors, each with the numbers of its episodes."""
    numbers: dict[str, list[int]] = {}
    for number, one in enumerate(episodes, start=1):
        leads = sorted(one.precursors.items(), key=lambda item: -item[1])
        said = [f"{name} left {f'{lead} steps before' if lead else 'with it'}" for name, lead in leads[:3]]
        if text := "; ".join([*([one.reason] if one.reason else []), *said]):
            numbers.setdefault(text, []).append(number)
    return [(", ".join(map(str, several)), text) for text, several in numbers.items()]
