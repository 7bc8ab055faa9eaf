"""One JSON document that holds a log.

    {"log_history": [{...}, ...]}                     HuggingFace trainer_state.json (transformers/trainer_callback.py, 5.23)
    {"lm loss": {"start_step", "step_interval", "values"}}    Megatron-LM golden values (tests/functional_tests)
    [[1700000000.1, 10, 2.31], ...]                   one tag's JSON from TensorBoard's page
    {"metrics": [{"key", "value", "step"}, ...]}      one value per record (MLflow's REST)
    {"loss": {"train": {"x": [...], "y": [...]}}}     curves (ClearML's get_reported_scalars)
    {"loss": [{"step", "value"}, ...]}, {"loss": [[1, 2.3], ...]}                 points (DVCLive)
    {"loss": [...], "val_loss": [...]}                columns: a Keras History, own scripts
    [{...}, ...], or such a list within an object     records

Where the records are a list of objects, the reader reads a document that was cut short as far as it goes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from stabilitylab.errors import InputError
from stabilitylab.logs.column_names import may_be_loss
from stabilitylab.logs.json_lines import NAMED_BY, numbers, part_of
from stabilitylab.logs.pattern import LineValues
from stabilitylab.logs.reading import Reading, Row
from stabilitylab.logs.source import LogFile

_LARGEST = 1 << 30
_BETWEEN = re.compile(r"[\s,]*")
_STEP_KEY = re.compile(r"((?:step|iteration|iter|epoch|global_step)?[_ -]?)(\d+)", re.IGNORECASE)
_FEWEST = 3
Records = list[Mapping[str, Any]]


def read_json_document(source: LogFile) -> Reading | None:
    """The document's records; None: the file is no single document, or one line without records.

    Raises:
        InputError: the file is a document of several lines without records.
    """
    text = b"".join(source.chunks())[:_LARGEST].decode("utf-8-sig", errors="replace")
    cut = False
    try:
        document: Any = json.loads(text)
    except ValueError as error:
        if "Extra data" in str(error):
            stream = _stream(text)
            return None if stream is None else _reading("JSON objects", stream)
        records, cut = _salvaged(text), True
        if not records:
            return None
        history = '"log_history"' in text
        document = {"log_history": records} if history else records
    if isinstance(document, dict) and isinstance(document.get("log_history"), list):
        reading = _reading("HuggingFace Trainer state", document["log_history"])
        reading.step = "step"
    elif isinstance(document, list) and document and all(_is_triple(row) for row in document):
        reading = _reading("TensorBoard JSON export", [{"step": row[1], "loss": row[2]} for row in document])
        reading.notes.append("the export of one tag, taken for the loss")
    elif isinstance(document, dict) and (golden := _golden(document)):
        reading = _reading("Megatron golden values", golden)
        reading.step = "step"
    else:
        found = _longest(document)
        if found is None and not cut and "\n" in text.strip():
            raise InputError(
                f"{source.name} is one JSON document that holds no record a step: it is no log; "
                "give the file that does, such as trainer_state.json"
            )
        if found is None:
            return None
        reading = _reading("JSON document", found)
    if cut:
        reading.notes.append("the file is cut short: what is there has been read")
    return reading


def _reading(name: str, records: Records) -> Reading:
    def rows() -> Iterator[Row]:
        reading.left_out.clear()
        for record in records:
            part = part_of(record) if isinstance(record, dict) else None
            if part is None:
                reading.left_out["rows of validation"] += 1
                continue
            values = numbers(record)
            if name.startswith("HuggingFace") and "loss" not in values:
                summary = "train_runtime" in values or "train_loss" in values
                reading.left_out["the closing summary" if summary else "rows of evaluation"] += 1
                if any("loss" in n for n in values) and not summary:
                    continue
                if summary:
                    continue
            yield part, values

    reading = Reading(format=name, rows=rows)
    return reading


def _stream(text: str) -> Records | None:
    """Objects of several lines each, one after the other; None: objects of one line each, or something else."""
    decoder, at = json.JSONDecoder(), 0
    records: Records = []
    text = text.strip()
    while at < len(text):
        try:
            record, end = decoder.raw_decode(text, at)
        except ValueError:
            if text[at] != "{":
                return None  # settings above a text
            break  # cut short
        if not isinstance(record, dict) or (not records and "\n" not in text[at:end]):
            return None
        records.append(record)
        at = _BETWEEN.match(text, end).end()  # type: ignore[union-attr]
    return records


def _salvaged(text: str) -> Records:
    """The whole objects of the first list of objects."""
    at = text.find("[", max(0, text.find('"log_history"')))
    decoder, records = json.JSONDecoder(), []
    while at >= 0:
        at = text.find("{", at)
        if at < 0:
            break
        try:
            record, at = decoder.raw_decode(text, at)
        except ValueError:
            break
        records.append(record)
    return records


def _golden(document: Mapping[str, Any]) -> Records:
    rows: dict[float, LineValues] = {}
    for name, entry in document.items():
        if not (isinstance(entry, dict) and "values" in entry):
            continue
        values, start = entry["values"], entry.get("start_step", 0)
        if isinstance(entry.get("steps"), list) and isinstance(values, list):  # Sacred
            pairs = list(zip(map(float, entry["steps"]), values, strict=False))
        elif isinstance(values, dict):
            pairs = [(float(step), value) for step, value in values.items()]
        elif isinstance(values, list):
            pairs = [(start + i * entry.get("step_interval", 1), value) for i, value in enumerate(values)]
        else:
            continue
        for step, value in pairs:
            rows.setdefault(step, {"step": step})[name] = value
    return [rows[step] for step in sorted(rows)]


def _is_triple(row: Any) -> bool:
    return (
        isinstance(row, list) and len(row) == 3 and all(isinstance(cell, int | float | str) for cell in row)
    )


def _by_key(records: Records) -> Records | None:
    """Records of one value each, joined by step; None: they are no such records."""
    name = next((n for n in NAMED_BY if records and n in records[0]), None)
    held = "metricValue" if records and "metricValue" in records[0] else "value"  # Comet
    if name is None or not all(held in one and isinstance(one.get(name), str) for one in records):
        return None
    rows: dict[Any, dict[str, Any]] = {}
    for i, one in enumerate(records):
        step = one.get("step", i)
        rows.setdefault(step, {"step": step})[one[name]] = one[held]
    return list(rows.values())


def _curves(document: Mapping[str, Any], before: str = "") -> dict[str, Mapping[str, Any]]:
    """Path -> each {"x": [...], "y": [...]} and each list of points."""
    found: dict[str, Mapping[str, Any]] = {}
    for name, value in document.items():
        if isinstance(value, dict):
            if isinstance(value.get("x"), list) and isinstance(value.get("y"), list):
                found[before + name] = value
            else:
                found |= _curves(value, f"{before}{name}/")
        elif isinstance(value, list) and len(value) > 1 and (points := _points(value)):
            found[before + name] = points
    return found


def _points(values: list[Any]) -> Mapping[str, Any] | None:
    """[{"step": 1, "value": 2.3}, ...] or [[1, 2.3], ...] as a curve; None: they are something else."""
    if all(
        isinstance(one, dict) and "step" in one and "value" in one and not one.keys() & {*NAMED_BY}
        for one in values
    ):
        return {"x": [one["step"] for one in values], "y": [one["value"] for one in values]}
    if all(isinstance(one, list) and len(one) == 2 and isinstance(one[0], int) for one in values):
        return {"x": [one[0] for one in values], "y": [one[1] for one in values]}
    return None


def _by_step(document: Mapping[str, Any]) -> Records | None:
    """The records of {"1": {...}, "2": {...}} or {"epoch_1": {...}, ...}; None: they are named otherwise."""
    told = [(_STEP_KEY.fullmatch(name), value) for name, value in document.items()]
    records: Records = [
        {key[1].strip("_- ").lower() or "step": int(key[2]), **value}
        for key, value in told
        if key and isinstance(value, dict)
    ]
    if len(records) < _FEWEST or len(records) < len(told) or len({next(iter(one)) for one in records}) > 1:
        return None
    return records if any(may_be_loss(name) for one in records for name in numbers(one)) else None


def _longest(document: Any, depth: int = 0) -> Records | None:
    """The longest list of records, or table of columns, anywhere in the document."""
    if isinstance(document, list):
        objects: Records = [record for record in document if isinstance(record, dict)]
        objects = _by_key(objects) or objects
        named = any(may_be_loss(name) for o in objects for name in numbers(o))
        return objects if named else None
    if not isinstance(document, dict) or depth > 4:
        return None
    if not depth and (curves := _curves(document)):
        rows: dict[Any, dict[str, Any]] = {}
        for name, curve in curves.items():
            for step, value in zip(curve["x"], curve["y"], strict=False):
                rows.setdefault(step, {"step": step})[name] = value
        return [rows[step] for step in sorted(rows)]
    if by_step := _by_step(document):
        return by_step
    columns = {
        name: column
        for name, column in document.items()
        if isinstance(column, list) and column and not isinstance(column[0], dict | list)
    }
    found: list[Records] = []
    if any(may_be_loss(name) for name in columns):
        length = max(len(column) for name, column in columns.items() if may_be_loss(name))
        same = {name: column for name, column in columns.items() if len(column) == length}
        found.append([dict(zip(same, row, strict=True)) for row in zip(*same.values(), strict=True)])
    found += [one for value in document.values() if (one := _longest(value, depth + 1))]
    return max(found, key=len, default=None)
