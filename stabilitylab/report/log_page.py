"""Shows a log as a run is shown: its curves and the episodes found in it, without a run folder.

A log holds a loss and, where its trainer wrote them, a gradient norm, a rate and a scale. What a monitor records beside them
(layers, attention, updates) is missing, and the page says so.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stabilitylab.errors import InputError
from stabilitylab.logs.log import Log
from stabilitylab.logs.recognise import open_logs
from stabilitylab.logs.source import remove_temporary
from stabilitylab.runs import load_run
from stabilitylab.runs.folder import RunFolder
from stabilitylab.runs.parts import SCHEMA
from stabilitylab.runs.places import Places
from stabilitylab.runs.run import Run
from stabilitylab.spikes.log_scan import scan_log
from stabilitylab.telemetry import SCALAR, Event


def runs_at(path: Path) -> list[Run]:
    """The run of a run folder, or every run, rank or phase of a log.

    Raises:
        InputError: neither lies there.
    """
    if not path.exists() or (path / "telemetry").is_dir() or (path / "events.jsonl").is_file():
        return [load_run(path)]
    try:
        logs = open_logs([path])
        runs: list[Run] = [LogRun(log) for log in logs]
        for run in runs:
            _ = run.events, run.metrics  # what came out of a compressed file is read before its copy goes
        return runs
    finally:
        remove_temporary()


def run_at(path: Path) -> Run:
    """The one run at a path. Raises InputError where there are several."""
    runs = runs_at(path)
    if len(runs) > 1:
        names = ", ".join(run.name for run in runs[:8]) + (" and more" if len(runs) > 8 else "")
        raise InputError(
            f"{path} holds {len(runs)} runs ({names}): stabilitylab compare {path} --out page.html shows them over each other"
        )
    return runs[0]


class LogRun(Run):
    """One run of a log.

    Args:
        log: the run's part of it.
    """

    kind = "log"

    def __init__(self, log: Log) -> None:
        super().__init__(RunFolder(log.path))
        self._log = log

    @property
    def name(self) -> str:
        """The file's own name, and that of the run in it."""
        return " ".join(filter(None, (self.path.resolve().name, self._log.name)))

    @cached_property
    def config(self) -> dict[str, Any]:
        """A log has none."""
        return {}

    @cached_property
    def places(self) -> Places:
        """A log has no sites."""
        return Places({})

    @cached_property
    def events(self) -> list[Event]:
        """The episodes found in the log."""
        signals = {column: signal for signal, column in self._log.columns.items()}
        written = self.path.stat().st_mtime
        events = []
        for number, episode in enumerate(scan_log(self._log).episodes):
            said = episode.to_json()
            said |= {
                "signal": signals.get(episode.signal, episode.signal),
                "baseline": said["level"],
                "episode": number,
                "phase": "onset" if episode.end is None else "end",
            }
            events.append(Event(step=episode.onset, kind=episode.kind, data=said, time=written))
        return events

    @cached_property
    def _whole(self) -> pa.Table:
        tables = []
        for block in self._log.blocks():
            for signal, values_N in block.values.items():
                logged_N = block.logged[signal]
                family, site, statistic = signal.split("/")
                count = int(logged_N.sum())
                columns = {
                    "step": pa.array(block.steps[logged_N]),
                    "index": pa.array(np.full(count, SCALAR, dtype=np.int32)),
                    "value": pa.array(values_N[logged_N]),
                }
                for name, word in (("family", family), ("site", site), ("statistic", statistic)):
                    columns[name] = (
                        pa.array([word]).dictionary_encode().take(pa.array(np.zeros(count, np.int64)))
                    )
                tables.append(pa.table([columns[f.name].cast(f.type) for f in SCHEMA], schema=SCHEMA))
        return pa.concat_tables([SCHEMA.empty_table(), *tables]).unify_dictionaries()

    def _table(
        self,
        columns: list[str],
        family: str | None = None,
        statistic: str | None = None,
        steps: tuple[int, int] | None = None,
        reduce: Callable[[pa.Table], pa.Table] = lambda table: table,
    ) -> pa.Table:
        """Rows of the log, as a run folder's would be."""
        table = self._whole
        for name, wanted in (("family", family), ("statistic", statistic)):
            if wanted is not None:
                table = table.filter(pc.equal(table[name].cast(pa.string()), wanted))
        if steps is not None:
            table = table.filter(
                pc.and_(pc.greater_equal(table["step"], steps[0]), pc.less_equal(table["step"], steps[1]))
            )
        return reduce(table.select(columns).combine_chunks())
