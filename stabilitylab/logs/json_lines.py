"""JSON, one object per line: W&B histories, LLaMA-Factory, ms-swift, MaxText, mmdetection 2, MMEngine's scalars.

The reader cuts off a logger's prefix before the object (fairseq's and metaseq's console, MLPerf's). Numbers may be strings
(``"2.31"``, ``"NaN"``, ``"10/438"``); objects within objects become names with a slash. It leaves out rows whose ``mode``,
``split`` or ``phase`` says validation. ``rank``, ``run``, ``run_name`` and ``run_id`` name segments.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from stabilitylab.logs.column_names import is_evaluation
from stabilitylab.logs.pattern import LineValues, number, plain_text
from stabilitylab.logs.rank_labels import rank_in
from stabilitylab.logs.reading import MODES, Reading, Row, text_rows
from stabilitylab.logs.source import LogFile

PARTS = ("rank", "run", "run_name", "run_id", "local_rank", "process_index")
# The keys under which a record of one value holds its name.
NAMED_BY = ("key", "metric", "metric_name", "metricName", "name", "tag")
VALUES = ("value", "val", "metric_value", "v")  # and its value
_RATIO = re.compile(r"^(\d+)/\d+$")


def read_json_lines(source: LogFile, *, among_text: bool = False) -> Reading:
    """Every line that holds an object; ``among_text``: a line without one is no damage."""
    reading = Reading(
        format="JSON lines",
        rows=lambda: text_rows(source, reading),
        pieces=lambda: JsonPieces(reading, among_text),
    )
    return reading


def read_known_json_lines(source: LogFile, head: bytes) -> Reading:
    """Objects, one per line, with the format, losses and steps of the trainer whose keys the head shows."""
    reading = read_json_lines(source, among_text=not head.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"{"))
    if b'"num_updates"' in head or is_fairseq(source):
        reading.format, reading.step = "fairseq", "num_updates"
    elif b'"_step"' in head and b'"_runtime"' in head:
        reading.format = "W&B history"
    elif b'"global_step/max_steps"' in head:
        reading.format = "ms-swift"
    elif b'"current_steps"' in head and b'"total_steps"' in head:
        reading.format = "LLaMA-Factory"
    elif b'"mode": "train"' in head:
        reading.format = "MMCV JSON"
    elif b":::MLLOG {" in head:
        reading.format, reading.losses = "MLPerf", ("train_loss", "loss")
        counters = ("samples_count", "step_num", "epoch_num")
        reading.step = next((n for n in counters if f'"{n}"'.encode() in head), None)
    elif b'"learning/loss"' in head:
        reading.format = "MaxText"
    return reading


def is_fairseq(source: LogFile) -> bool:
    """Whether it is fairseq's or metaseq's console with JSON in it; the first record may come after pages of configuration."""
    for count, chunk in enumerate(source.chunks()):
        if re.search(rb"train_inner[^\r\n]*\{\"", chunk):
            return True
        if count == 1:
            break
    return False


class JsonPieces:
    """Reads objects, one per line.

    Args:
        reading: counts what is left out.
        among_text: whether lines without an object are other text.
    """

    def __init__(self, reading: Reading, among_text: bool) -> None:
        self._reading, self._among_text = reading, among_text
        self.state: dict[str, Any] = {"line": 0}

    def end(self) -> Iterator[Row]:
        """No rows: nothing is held back."""
        return iter(())

    def take(self, piece: bytes) -> Iterator[Row]:
        """The objects of these lines."""
        reading = self._reading
        for line in piece.splitlines(keepends=True):
            self.state["line"] += 1
            text = plain_text(line).strip().removesuffix(",")  # lines of a list
            if not text:
                continue
            start = text.find("{")
            where = f"line {self.state['line']}"
            try:
                record = json.loads(text[start:]) if start >= 0 else json.loads(text)
            except ValueError:
                if not line.endswith((b"\n", b"\r")):
                    reading.left_out["a last line cut short"] += 1
                elif start > 0 or self._among_text:
                    reading.left_out["lines that are not records"] += 1
                else:
                    reading.damage("lines that are not JSON", f"{where} is not JSON")
                continue
            if not isinstance(record, dict):
                reading.damage("lines that are not JSON objects", f"{where} is no JSON object")
                continue
            if "event_type" in record and "key" in record:
                record = _event(record)
            elif (held := next((n for n in VALUES if n in record), None)) is not None:
                record = _one_value(record, held)
            part = part_of(record)
            if part is None:
                reading.left_out["rows of validation"] += 1
                continue
            part = part or (rank_in(text[:start]) if start > 0 else "")
            values = numbers(record)
            bad = next(
                (k for k, v in record.items() if "loss" in k and isinstance(v, str) and k not in values), None
            )
            if bad is not None:
                said = str(record[bad])[:40]
                reading.damage("values that are not numbers", f"{where}, {bad!r}: {said!r} is not a number")
            yield part, values


def _event(record: Mapping[str, Any]) -> dict[str, Any]:
    """MLPerf's :::MLLOG {"key": "train_loss", "value": 2.3, "metadata": {"samples_count": 32}}."""
    told = {str(record["key"]): record.get("value")}
    metadata = record.get("metadata")
    return {**metadata, **told} if isinstance(metadata, dict) else told


def _one_value(record: dict[str, Any], held: str) -> dict[str, Any]:
    """{"name": "loss", "value": 2.3, "step": 1} as {"loss": 2.3, "step": 1}."""
    name = next((n for n in NAMED_BY if isinstance(record.get(n), str)), None)
    if name is None or any("loss" in n.lower() for n in numbers(record)):
        return record
    kept = {n: value for n, value in record.items() if n not in (name, held)}
    return {**kept, record[name]: record[held]}


def part_of(record: Mapping[str, Any]) -> str | None:
    """The segment that a record belongs to; None for one of validation."""
    for name in MODES:
        if isinstance(said := record.get(name), str) and is_evaluation(said):
            return None
    for name in PARTS:
        said = record.get(name)
        if isinstance(said, str) or (isinstance(said, int) and not isinstance(said, bool)):
            return f"rank {said}" if "rank" in name or name == "process_index" else str(said)
    return ""


def numbers(record: Mapping[str, Any], before: str = "") -> LineValues:
    """The numbers of a record, by name; ``None`` where a name stands without one."""
    values: LineValues = {}
    for name, value in record.items():
        if value is None:
            values[before + name] = None
        elif isinstance(value, int | float):
            try:
                values[before + name] = number(repr(float(value)))
            except OverflowError:
                continue
        elif isinstance(value, str):
            ratio = _RATIO.match(value)
            found = number(ratio[1] if ratio else value)
            if found is not None:
                values[before + name] = found
        elif isinstance(value, dict):
            values |= numbers(value, f"{before}{name}/")
    return values
