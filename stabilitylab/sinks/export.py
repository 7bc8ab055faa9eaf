"""``stabilitylab export`` writes a run, or another trainer's log, as CSV, Parquet or TensorBoard.

    tidy   step, family, site, statistic, index, value: one row per number, everything recorded and still valid
    wide   one row per step, one column per metric (``metric[i]`` for the i-th of a vector): for spreadsheets

It exports a run one telemetry file at a time, so memory does not grow with the run (except with ``--wide``). It writes numbers as
they are: ``nan`` and ``inf`` are values, an empty cell is no value. In Python ``load_run(path).telemetry`` gives the same.
"""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
import tyro

from stabilitylab.command_line.whole_file import told_beside, whole_file
from stabilitylab.errors import InputError
from stabilitylab.runs.folder import RunFolder
from stabilitylab.runs.parts import SCHEMA, list_parts, read_rows, step_limits
from stabilitylab.telemetry import SCALAR

PLAIN = pa.schema([(f.name, pa.string() if pa.types.is_dictionary(f.type) else f.type) for f in SCHEMA])


def export(
    run: Annotated[Path, tyro.conf.Positional],
    *,
    csv: bool = False,
    parquet: bool = False,
    tensorboard: bool = False,
    wide: bool = False,
    only: str = "*",
    out: Path | None = None,
    loss: str | None = None,
) -> int:
    """Write what a run recorded as CSV, Parquet or TensorBoard, for other tools.

    Args:
        run: a run folder, or a log of any format in docs/logs.md.
        csv: write a CSV.
        parquet: write a Parquet file.
        tensorboard: write every metric as a scalar into a TensorBoard folder.
        wide: one row a step and one column a metric, instead of one row a number.
        only: write only the metrics that this glob matches, such as 'train/*' or 'gradient/layers.3.*/l2'.
        out: file or folder to write; by default export.csv, export.parquet or export-tensorboard in the run folder, or beside the
            log.
        loss: name of a log's loss column, where it is not one of the usual names.
    """
    kinds = [
        name for name, wanted in (("csv", csv), ("parquet", parquet), ("tensorboard", tensorboard)) if wanted
    ]
    if len(kinds) != 1:
        raise InputError(
            "export writes one kind at a time: give --csv, --parquet or --tensorboard; --wide goes with the first two"
        )
    if wide and tensorboard:
        raise InputError("--wide is a shape of tables: leave it out with --tensorboard")
    tables, near = _tables(run, loss)
    target = out or near / ("export-tensorboard" if tensorboard else f"export.{kinds[0]}")
    if not target.parent.is_dir():
        raise InputError(f"--out {target}: there is no folder {target.parent}")
    chosen = _chosen(tables, only)
    count = (
        _into_tensorboard(chosen, target)
        if tensorboard
        else _into_table(_wide(chosen) if wide else chosen, target, is_csv=csv)
    )
    if not count:
        raise InputError(f"{run} holds nothing that --only {only!r} matches")
    print(f"{target}: {count:,} {'rows' if not tensorboard else 'values'}", file=told_beside(target))
    return 0


def _tables(path: Path, loss: str | None) -> tuple[Iterator[pa.Table], Path]:
    """Tidy tables of the run or log at the path, and the default folder of an export."""
    if path.is_dir() and ((path / "telemetry").is_dir() or (path / "events.jsonl").is_file()):
        return _run_tables(RunFolder.open(path)), path
    from stabilitylab.logs.recognise import open_logs

    logs = open_logs([path], loss=loss)
    if len(logs) > 1:
        names = ", ".join(log.name for log in logs[:8])
        raise InputError(f"{path} holds {len(logs)} runs ({names}): export one of their files")

    def rows() -> Iterator[pa.Table]:
        for block in logs[0].blocks():
            for signal, values_N in block.values.items():
                logged_N = block.logged[signal]
                family, _, statistic = signal.split("/")
                count = int(logged_N.sum())
                yield pa.table(
                    {
                        "step": block.steps[logged_N],
                        "family": [family] * count,
                        "site": ["-"] * count,
                        "statistic": [statistic] * count,
                        "index": np.full(count, SCALAR, dtype=np.int32),
                        "value": values_N[logged_N],
                    },
                    schema=PLAIN,
                )

    return rows(), path if path.is_dir() else path.parent


def _run_tables(run: RunFolder) -> Iterator[pa.Table]:
    parts = list_parts(run.telemetry)
    limits = step_limits(parts)
    for part in parts:
        if part.rows:
            yield read_rows(part, SCHEMA.names, below=limits[part.segment]).cast(PLAIN)


def _chosen(tables: Iterator[pa.Table], only: str) -> Iterator[pa.Table]:
    if only == "*":
        yield from tables
        return
    for table in tables:
        metric = pc.binary_join_element_wise(table["family"], table["site"], table["statistic"], "/")
        wanted = fnmatch.filter(pc.unique(metric).to_pylist(), only)
        if wanted:
            yield table.filter(pc.is_in(metric, value_set=pa.array(wanted)))


def _wide(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """All tables as one of steps and metrics, in the order of first appearance."""
    whole = pa.concat_tables([PLAIN.empty_table(), *tables])
    if not len(whole):
        return
    metric = pc.binary_join_element_wise(whole["family"], whole["site"], whole["statistic"], "/")
    index = pc.binary_join_element_wise("[", pc.cast(whole["index"], pa.string()), "]", "")
    index = pc.if_else(pc.equal(whole["index"], SCALAR), "", index)
    frame = pd.DataFrame(
        {
            "step": whole["step"].to_numpy(),
            "metric": pd.Categorical(pc.binary_join_element_wise(metric, index, "").to_pylist()),
            "value": whole["value"].to_numpy(),
            "logged": True,
        }
    ).drop_duplicates(["step", "metric"], keep="last")
    names = list(dict.fromkeys(frame["metric"]))
    values = frame.pivot(index="step", columns="metric", values="value").sort_index()[names]
    logged = frame.pivot(index="step", columns="metric", values="logged").reindex_like(values).notna()
    columns = {"step": pa.array(values.index.to_numpy())}
    for name in names:
        columns[name] = pa.array(values[name].to_numpy(), mask=~logged[name].to_numpy())
    yield pa.table(columns)


def _into_table(tables: Iterator[pa.Table], target: Path, *, is_csv: bool) -> int:
    first = next(tables, None)
    if first is None:
        return 0
    count = 0
    with whole_file(target) as file:
        open_writer: Callable[[], pyarrow.csv.CSVWriter | pq.ParquetWriter] = (
            (lambda: pyarrow.csv.CSVWriter(str(file), first.schema))
            if is_csv
            else (lambda: pq.ParquetWriter(str(file), first.schema, compression="zstd"))
        )
        with open_writer() as writer:
            for table in itertools.chain([first], tables):
                writer.write_table(table)
                count += len(table)
    return count


def _into_tensorboard(tables: Iterator[pa.Table], target: Path) -> int:
    from stabilitylab.sinks.event_file import EventFile, scalar

    count = 0
    file: EventFile | None = None
    try:
        for table in tables:
            file = file or EventFile(target)
            columns = [table.sort_by("step")[name].to_pylist() for name in PLAIN.names]
            rows = zip(*columns, strict=True)
            for step, same in itertools.groupby(rows, key=lambda row: row[0]):
                values = [
                    scalar("/".join(row[1:4]) + ("" if row[4] == SCALAR else f"[{row[4]}]"), row[5])
                    for row in same
                ]
                file.add(step, values)
                count += len(values)
    finally:
        if file is not None:
            file.close()
    return count
