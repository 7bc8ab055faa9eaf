"""Recognises what a path holds by its content: the one way from paths to logs.

Files: Parquet, TensorBoard, SQLite and W&B by their first bytes; then one JSON document, JSON lines, text of a known trainer, CSV.
Folders: a run folder, a Trainer's output or checkpoint, a tracker's store, Lightning's versions, TensorBoard, or a folder that
holds one log.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from stabilitylab.errors import InputError
from stabilitylab.logs.aim_store import read_aim
from stabilitylab.logs.binary import binary_error, has_holes
from stabilitylab.logs.boxed_records import read_boxes
from stabilitylab.logs.column_names import is_evaluation, is_loss, steadies
from stabilitylab.logs.console import read_console
from stabilitylab.logs.csv_rows import delimiter_of, is_blank_table, read_csv_rows
from stabilitylab.logs.huggingface import read_huggingface_console
from stabilitylab.logs.json_document import read_json_document
from stabilitylab.logs.json_lines import is_fairseq, read_known_json_lines
from stabilitylab.logs.json_wrapped import DocumentSource, UnwrappedSource, UnwrappingPieces, key_of
from stabilitylab.logs.languages import EnglishSource, is_foreign
from stabilitylab.logs.locate import in_folder, is_tensorboard, version_of
from stabilitylab.logs.log import Log
from stabilitylab.logs.pattern import number
from stabilitylab.logs.rank_labels import LabelledPieces, UnlabelledSource, is_labelled
from stabilitylab.logs.reading import Reading, Row, text_rows
from stabilitylab.logs.record_lines import read_record_lines
from stabilitylab.logs.rows import logs_of
from stabilitylab.logs.source import LogFile, WithoutHoles, standard_input
from stabilitylab.logs.swanlab import SWANLAB, read_swanlab
from stabilitylab.logs.table_in_text import ShownSource, TableSource, TableStart, table_in
from stabilitylab.logs.trackers import (
    SQLITE,
    WANDB,
    read_mlflow_files,
    read_mlflow_metric,
    read_sqlite,
    read_wandb,
)

# Numbers with their names beside them: a sentence, not a table's header.
_SAID = re.compile(r"(?<!\d)[:=]\s*[-+]?\d")  # not metrics/mAP_0.5:0.95
_LINES = 60
# What opens like JSON and is none: a dictionary of Python's, a date, a rank or a logger's level in brackets.
_LABEL = re.compile(rb"\{'|\[2|\[(?!null|true|false|NaN|Infinity)[A-Za-z]")
_EXAMINED = 1000  # records
_DOCUMENT_BYTES = 256 << 20
_LONG_LINES = 1 << 16  # in shorter files, reading JSON line by line is as fast


def open_logs(
    paths: Sequence[Path],
    *,
    loss: str | None = None,
    step: str | None = None,
    run: str | None = None,
    pattern: str | None = None,
) -> list[Log]:
    """Every segment (run, rank, phase) of the logs at the paths.

    Args:
        paths: files or folders; ``-`` is standard input. Several text files are one log, in order.
        loss, step: names of columns.
        run: the wanted segment's name or a part of it.
        pattern: a pattern or a TOML file of patterns (``pattern``).

    Raises:
        InputError: a path does not exist, cannot be understood, or holds no training loss.
    """
    files: list[Path] = []
    for path in paths:
        path = standard_input() if str(path) == "-" else path
        if not path.exists():
            raise InputError(f"{path}: there is no such file or folder")
        if path.is_file() and path.stat().st_size == 0:
            raise InputError(f"{path} is empty: a log needs a header and at least one row")
        files.append(path)
    logs: list[Log] = []
    if len(files) == 1:
        logs = _one(files[0], loss=loss, step=step, pattern=pattern)
    elif all(path.is_file() and not _binary(path) for path in files):
        logs = list(logs_of(_chained(files, pattern), files[0], loss=loss, step=step))
    else:
        for path in files:
            logs += _one(path, loss=loss, step=step, pattern=pattern)
    if run is not None:
        wanted = [log for log in logs if log.name == run] or [log for log in logs if run in log.name]
        if not wanted:
            names = ", ".join(repr(log.name) for log in logs)
            raise InputError(f"{paths[0]} holds no run {run!r}: its runs are {names}")
        logs = wanted
    return logs


def open_log(path: Path, *, loss: str | None = None, step: str | None = None) -> Log:
    """Recognise a log and its columns.

    Args:
        path: a file or folder.
        loss: the loss column's name, where the usual names do not fit.
        step: the step column's name.

    Raises:
        InputError: the file does not exist, is empty, cannot be understood, has no loss column, or holds several runs.
    """
    logs = open_logs([path], loss=loss, step=step)
    if len(logs) > 1:
        names = ", ".join(log.name for log in logs[:8]) + (" and more" if len(logs) > 8 else "")
        raise InputError(f"{path} holds {len(logs)} runs: {names}; give one of them")
    return logs[0]


def _one(path: Path, *, loss: str | None, step: str | None, pattern: str | None) -> list[Log]:
    if path.is_dir():
        return _folder(path, loss=loss, step=step, pattern=pattern)
    source = LogFile(path)
    head = source.head()
    if not head.strip():
        raise InputError(f"{path} is empty: a log needs a header and at least one row")
    if head.startswith((b"PAR1", b"ARROW1", b"FEA1")):
        from stabilitylab.logs.table_files import ArrowLog, ParquetLog, read_table_file

        file = source.on_disk()
        if (rows := read_table_file(file)) is not None:
            return list(logs_of(rows, path, loss=loss, step=step))
        kind = ParquetLog if head.startswith(b"PAR1") else ArrowLog
        return [kind.open(file, loss=loss, step=step)]
    if is_tensorboard(path, head):
        from stabilitylab.logs.tensorboard import TensorBoardLog

        return [TensorBoardLog.open_files(path, [source.on_disk()], loss=loss, step=step)]
    if pattern is None and _is_table(path, head):
        from stabilitylab.logs.table_files import CsvLog

        clean = CsvLog.open_clean(source, loss=loss, step=step)
        if clean is not None:
            return [clean]
    if pattern is None and head.startswith(b"{") and path.stat().st_size > _LONG_LINES:
        from stabilitylab.logs.json_table import JsonTableLog

        reading = read_known_json_lines(source, head)
        table = JsonTableLog.open_clean(source, head, reading, loss=loss, step=step)
        if table is not None:
            return [table]
    return list(logs_of(_text(source, head, pattern), path, loss=loss, step=step))


def _text(source: LogFile, head: bytes, pattern: str | None) -> Reading:
    """The reader of one file of records."""
    if head.startswith(SQLITE):
        return read_sqlite(source)
    if head.startswith(WANDB):
        return read_wandb([source])
    if head.startswith(SWANLAB):
        return read_swanlab([source])
    if pattern is not None:
        found = read_console(source, pattern=pattern)
        assert found is not None
        return found
    if b"\0" in head and has_holes(head):
        source = WithoutHoles(source.path, source.name)
        head = source.head()
    elif b"\0" in head[:4096] or head.startswith(b"\x80"):
        raise binary_error(source.name, head)
    if is_labelled(head):
        return _labelled(source)
    start = head.lstrip(b"\xef\xbb\xbf \r\n\t")
    if start[:1] == b"{" and (key := key_of(start)) is not None:
        return _wrapped(source, key)
    first = start.split(b"\n", 1)[0].strip()
    begins_as_json = start[:1] in (b"{", b"[") and not _LABEL.match(first)
    if begins_as_json and (reading := _json(source, head, start, first)) is not None:
        return reading
    if source.path.suffix.lower() in (".jsonl", ".ndjson") and not isinstance(source, UnwrappedSource):
        return read_known_json_lines(source, head)
    if re.search(rb'[\]\-:|] \{"[^\r\n]*"loss"', head) or b":::MLLOG {" in head or is_fairseq(source):
        return read_known_json_lines(source, head)
    if source.path.parent.name == "metrics" and re.fullmatch(rb"\d{12,} \S+ \d+", first):
        return read_mlflow_metric(source.path)
    if _is_table(source.path, head):
        top = next((line for line in start.splitlines() if not line.startswith(b"#")), b"")
        if b"loss" not in (first + top).lower() and (below := table_in(source)) is not None and below.offset:
            return _below(source, below)
        return read_csv_rows(source)
    return _console(source, head, first.decode("utf-8", errors="replace"))


def _json(source: LogFile, head: bytes, start: bytes, first: bytes) -> Reading | None:
    """The reader of one JSON document, or of a JSON object a line; None where the text only begins like one."""
    if source.path.stat().st_size < _DOCUMENT_BYTES and (
        first in (b"{", b"[") or not _object(first) or b"\n" not in start.strip()
    ):
        if (lines := DocumentSource.of(source)) is not None:
            return replace(_text(lines, lines.head(), None), pieces=None)
        document = read_json_document(source)
        if document is not None:
            return document
    second = start.partition(b"\n")[2].partition(b"\n")[0].strip()
    if (
        (start[:1] == b"{" and _mostly_objects(start))
        or (_is_json(first) and _is_json(second))
        or source.path.suffix == ".jsonl"
    ):
        return read_known_json_lines(source, head)
    return None


def _console(source: LogFile, head: bytes, header: str) -> Reading:
    """The reader of what a trainer printed: a known one's console, boxes, a table, or any text that names a loss.

    Raises:
        InputError: it is none of these.
    """
    found = read_huggingface_console(source) or read_console(source)
    if found is None or found.format == "text":
        found = read_boxes(source) or found
    text = EnglishSource(source) if is_foreign(head.decode("utf-8", "replace")) else source
    if found is None and b"\r" in head.replace(b"\r\n", b""):  # fastprogress draws bars over its table
        text = ShownSource(text)
    if (found is None or found.format == "text") and (table := table_in(text)) is not None:
        told = 0 if found is None else sum(1 for _ in islice(found.rows(), table.rows))
        if told < table.rows:
            return _below(text, table)
    parted = delimiter_of(header) in ",;\t" and delimiter_of(header) in header
    names = parted and "loss" in header.lower() and not header.lstrip()[:1].isdigit()
    if found is None and names and not _SAID.search(header):
        return read_csv_rows(source)
    if found is None or found.format == "text":
        beside = found if found is not None and _holds_a_loss(found) else None
        found = read_record_lines(source, beside) or found
    if found is None:
        raise InputError(
            f"{source.name} is no log of a trainer known here (docs/logs.md): describe its lines "
            "with --pattern 'step {step} loss {loss}'"
        )
    return found


def _holds_a_loss(found: Reading) -> bool:
    """Whether some record holds a loss of training that is more than a term beside it."""
    rows = islice(found.rows(), _EXAMINED)
    return any(is_loss(n) and not is_evaluation(n) and not steadies(n) for _, row in rows for n in row)


def _below(source: LogFile, table: TableStart) -> Reading:
    """The reader of a table, without the text above it."""
    return replace(read_csv_rows(TableSource(source, table.offset)), format="table in text", pieces=None)


def _wrapped(source: LogFile, key: str) -> Reading:
    """The reader of a program's output inside the JSON that a container put around it."""
    inside = UnwrappedSource(source, key)
    inner = _text(inside, inside.head(), None)
    pieces = inner.pieces
    if pieces is None:
        return inner
    outer = replace(
        inner, rows=lambda: text_rows(source, outer), pieces=lambda: UnwrappingPieces(pieces(), key)
    )
    return outer


def _labelled(source: LogFile) -> Reading:
    """The reader of ranks, each behind its launcher's label."""
    inside = UnlabelledSource(source.path, source.name)
    inner = _text(inside, inside.head(), None)
    pieces = inner.pieces
    if pieces is None:
        return inner
    outer = replace(inner, rows=lambda: text_rows(source, outer), pieces=lambda: LabelledPieces(pieces))
    return outer


def _mostly_objects(start: bytes) -> bool:
    """Whether at least a third of the lines open an object, as one that prints its settings first does not."""
    lines = [line for line in start.splitlines()[:_LINES] if line.strip()]
    return 3 * sum(line.lstrip().startswith(b"{") for line in lines) >= len(lines)


def _object(line: bytes) -> bool:
    return _is_json(line, dict)


def _is_json(line: bytes, kind: type | tuple[type, ...] = (dict, list)) -> bool:
    try:
        return isinstance(json.loads(line), kind)
    except ValueError:
        return False


def _chained(files: Sequence[Path], pattern: str | None) -> Reading:
    """The reader of several files as one log, in the order given."""
    readings = []
    for path in files:
        source = LogFile(path)
        readings.append(_text(source, source.head(), pattern))
    first = readings[0]

    def rows() -> Iterator[Row]:
        whole.left_out.clear()
        for reading in readings:
            yield from reading.rows()
            whole.left_out.update(reading.left_out)

    whole = Reading(
        format=first.format,
        rows=rows,
        step=first.step,
        losses=first.losses,
        notes=[note for reading in readings for note in reading.notes],
    )
    return whole


def _folder(path: Path, *, loss: str | None, step: str | None, pattern: str | None) -> list[Log]:
    found = in_folder(path)
    if found.kind == "run folder":
        from stabilitylab.logs.records import RunLog

        return [RunLog.open(path, loss=loss)]
    if found.kind == "MLflow":
        return list(logs_of(read_mlflow_files(path), path, loss=loss, step=step))
    if found.kind == "Aim":
        return list(logs_of(read_aim(found.files[0]), path, loss=loss, step=step))
    if found.kind == "W&B":
        sources = [LogFile(file) for file in found.files]
        return list(logs_of(read_wandb(sources), path, loss=loss, step=step))
    if found.kind == "swanlab":
        return list(logs_of(read_swanlab([LogFile(f) for f in found.files]), path, loss=loss, step=step))
    if found.kind == "TensorBoard":
        from stabilitylab.logs.tensorboard import TensorBoardLog

        return list(TensorBoardLog.open_runs(path, found.files, loss=loss, step=step))
    if found.kind != "versions":
        return [log for file in found.files for log in _one(file, loss=loss, step=step, pattern=pattern)]
    logs: list[Log] = []
    problem: InputError | None = None
    refused: list[str] = []
    for file in found.files:
        try:
            logs += _renamed(
                _one(file, loss=loss, step=step, pattern=pattern), version_of(file), len(found.files)
            )
        except InputError as error:
            problem = problem or error
            refused.append(version_of(file))
    if not logs and problem is not None:
        raise problem
    for name in refused:
        logs[-1].left_out[f"runs that cannot be read: {name}"] += 1
    return logs


def reading_of(path: Path, pattern: str | None = None) -> Reading | None:
    """The reader of one file of records, clean tables included; None: it is empty, or Parquet.

    Raises:
        InputError: it cannot be understood.
    """
    source = LogFile(path)
    head = source.head()
    if not head.strip() or head.startswith(b"PAR1"):
        return None
    if pattern is None and _is_table(path, head):
        return read_csv_rows(source)
    return _text(source, head, pattern)


def _renamed(logs: list[Log], name: str, count: int) -> list[Log]:
    return [replace(log, name=f"{name} {log.name}".strip()) for log in logs] if count > 1 else logs


def _binary(path: Path) -> bool:
    head = LogFile(path).head()
    return head.startswith((b"PAR1", SQLITE, WANDB, SWANLAB)) or is_tensorboard(path, head)


def _is_table(path: Path, head: bytes) -> bool:
    """Whether the first lines are cells: a header of names, and rows with about as many cells."""
    text = head.decode("utf-8", errors="replace").lstrip("\ufeff")
    filled = [line for line in text.splitlines() if line.strip()][:20]
    if is_blank_table(filled) or (
        len(filled) > 2 and filled[0].lstrip().startswith("|") and "--" in filled[1]
    ):
        return True
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")][:20]
    if not lines:  # every line opens with a comment sign: prose, or a trainer's "### step 3"
        return False
    delimiter = delimiter_of(lines[0])
    if delimiter in " |" and path.suffix.lower() not in (".csv", ".tsv"):
        return False
    cells = lines[0].count(delimiter)
    if _SAID.search(lines[0]):
        return False
    if path.suffix.lower() in (".csv", ".tsv"):
        return True
    if not cells:  # one column: a bare header above bare numbers
        return len(lines) > 1 and all(re.fullmatch(r"\s*[-+\d.eEnaif]+\s*", line) for line in lines[1:])
    if not any(number(cell.strip()) is not None for line in lines[1:4] for cell in line.split(delimiter)):
        return False  # sentences with as many commas
    same = sum(line.count(delimiter) == cells for line in lines)
    held = [cell.strip().strip('"') for line in lines[1:] for cell in line.split(delimiter) if cell.strip()]
    # Prose with a comma in each line is no table: most cells below a header are numbers.
    numeric = sum(number(cell) is not None for cell in held) * 2 >= len(held)
    return numeric and same * 4 >= len(lines) * 3 and not re.search(r"[\[\]{}|=]", lines[0])
