"""Arrow's reading of JSON lines gives what reading line by line gives, or leaves the file to it."""

import json

import numpy as np
import pytest

from stabilitylab.logs.json_lines import read_json_lines
from stabilitylab.logs.json_table import JsonTableLog
from stabilitylab.logs.recognise import open_logs
from stabilitylab.logs.rows import logs_of
from stabilitylab.logs.source import LogFile

ROWS = 2_500  # over 64 KiB of text


def records(**changed):
    rng = np.random.default_rng(0)
    rows = [
        {
            "step": i,
            "loss": round(3 - i / ROWS + 0.1 * float(z), 6),
            "grad_norm": 1.5,
            "lr": 1e-4,
            "epoch": i / 100,
        }
        for i, z in enumerate(rng.standard_normal(ROWS))
    ]
    for at, values in changed.items():
        rows[int(at[1:])] |= values
    return rows


def written(path, rows, end="\n"):
    path.write_text("\n".join(map(json.dumps, rows)) + end)
    return path


def numbers(log):
    blocks = list(log.blocks())
    steps = np.concatenate([block.steps for block in blocks])
    values = {s: np.concatenate([b.values[s] for b in blocks]) for s in blocks[0].values}
    logged = {s: np.concatenate([b.logged[s] for b in blocks]) for s in blocks[0].logged}
    return steps, {s: np.where(logged[s], values[s], 0) for s in values}, logged


@pytest.mark.parametrize(
    ("changed", "end"),
    [
        ({}, "\n"),
        ({}, ""),
        ({"r7": {"loss": float("nan")}, "r8": {"loss": float("inf")}, "r9": {"loss": -3.5e38}}, "\n"),
        ({"r7": {"grad_norm": None}, "r8": {"lr": 2}, "r9": {"step": None}}, "\n"),
        ({"r2499": {"loss": 1.7976931348623157e308}}, '\n{"step": 2500, "lo'),
    ],
)
@pytest.mark.parametrize("kept", [True, False])
def test_a_table_is_read_as_it_is_line_by_line(tmp_path, monkeypatch, changed, end, kept):
    monkeypatch.setattr("stabilitylab.logs.json_table.MOST_KEPT", 16_000_000 if kept else 0)
    path = written(tmp_path / "log.jsonl", records(**changed), end)
    (fast,) = open_logs([path])
    (slow,) = logs_of(read_json_lines(LogFile(path)), path, loss=None, step=None)
    assert isinstance(fast, JsonTableLog)
    assert (fast.columns, fast.format, fast.name) == (slow.columns, slow.format, slow.name)
    assert tuple(fast.notes) == tuple(slow.notes)
    for a, b in zip(numbers(fast), numbers(slow), strict=True):
        np.testing.assert_equal(a, b)
    assert fast.left_out == slow.left_out


@pytest.mark.parametrize(
    "changed",
    [
        {"r3": {"note": "warm"}},
        {"r3": {"val_loss": 2.0}},
        {"r3": {"loss": "2.5"}},
        {"r3": {"lr": {"group0": 1e-4}}},
        {"r3": {"loss": None}},
        {"r900": {"step": 3}},
        {"r900": {"step": 899}},
        {"r900": {"step": 899.5}},
        {"r0": {"rank": 0}},
    ],
)
def test_what_is_no_table_is_left_to_the_reader_of_lines(tmp_path, changed):
    path = written(tmp_path / "log.jsonl", records(**changed))
    source = LogFile(path)
    assert JsonTableLog.open_clean(source, source.head(), read_json_lines(source)) is None
