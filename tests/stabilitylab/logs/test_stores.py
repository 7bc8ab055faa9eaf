"""Trackers' own stores."""

import json
import math
import sqlite3
import struct
import sys

import pytest

from stabilitylab.errors import InputError
from stabilitylab.logs.recognise import open_logs
from stabilitylab.telemetry import LOSS
from tests.stabilitylab.logs.told import losses, said


def test_mlflow_and_trackio_stores(tmp_path):
    metrics = tmp_path / "mlruns" / "0" / "abc" / "metrics"
    metrics.mkdir(parents=True)
    (metrics / "loss").write_text("1 3.0 0\n2 1.7976931348623157e+308 10\n")
    assert losses(tmp_path / "mlruns")[1:] == ([0, 10], [3.0, math.inf])
    with sqlite3.connect(tmp_path / "mlflow.db") as base:
        base.execute("CREATE TABLE metrics (key, value, timestamp, run_uuid, step, is_nan)")
        rows = [
            ("loss", 3.0, 1, "r", 0, 0),
            ("loss", 0.0, 2, "r", 1, 1),
            ("loss", 1.7976931348623157e308, 3, "r", 2, 0),
        ]
        base.executemany("INSERT INTO metrics VALUES (?, ?, ?, ?, ?, ?)", rows)
    _, steps, values = losses(tmp_path / "mlflow.db")
    assert (steps, values[0], values[2]) == ([0, 1, 2], 3.0, math.inf)
    assert math.isnan(values[1])
    with sqlite3.connect(tmp_path / "trackio.db") as base:
        base.execute("CREATE TABLE metrics (id INTEGER, run_name, step, metrics BLOB)")
        base.execute("INSERT INTO metrics VALUES (1, 'a', 0, ?)", (json.dumps({"train/loss": 3.0}).encode(),))
    assert losses(tmp_path / "trackio.db")[2] == [3.0]
    with sqlite3.connect(tmp_path / "other.db") as base:
        base.execute("CREATE TABLE things (a)")
    with pytest.raises(InputError, match="not MLflow's or trackio's"):
        open_logs([tmp_path / "other.db"])


def leveldb(bodies):
    """LevelDB's log in one block, checksums left out."""
    return b":SWL\xd6\xe1\x02" + b"".join(
        bytes(4) + len(b).to_bytes(2, "little") + b"\x01" + b for b in bodies
    )


def test_swanlab_in_its_own_bytes(tmp_path, capsys):
    """Bytes as swanlab 0.10.3 writes them: step 0 and the value 0 are left out; NaN is a double."""

    def record(key, step, value):
        body = b"\n" + bytes([len(key)]) + key + (b"\x10" + bytes([step]) if step else b"") + b"\x18\x01"
        said = b"\t" + struct.pack("<d", value) if value else b""
        body += b"*" + bytes([len(said)]) + said
        return b"\x08\x01" + b"j" + bytes([len(body)]) + body

    rows = [(k, x) for k, x in enumerate([2.0, math.nan, math.inf, 0.0, 1.5])]
    bodies = [record(key, k, x) for k, x in rows for key in (b"train/loss", b"train/grad_norm")]
    folder = tmp_path / "swanlog" / "run-1-a"
    folder.mkdir(parents=True)
    (folder / "run-a.swanlab").write_bytes(leveldb([b"\x08\x01", *bodies]))
    log, steps, values = losses(tmp_path)
    assert (log.format, steps) == ("swanlab", [0, 1, 2, 3, 4])
    assert [str(x) for x in values] == ["2.0", "nan", "inf", "0.0", "1.5"]
    assert said(capsys, tmp_path)["segments"][0]["signals"] == {
        "loss": "train/loss",
        "gradient_norm": "train/grad_norm",
    }


def test_an_aim_repository_needs_aim(tmp_path, monkeypatch):
    (tmp_path / ".aim" / "meta").mkdir(parents=True)
    monkeypatch.setitem(sys.modules, "aim", None)
    with pytest.raises(InputError, match="pip install aim"):
        open_logs([tmp_path])


def test_an_aim_repository_is_read_by_aim(tmp_path):
    """A run that has just been closed, which Aim's own index does not hold yet."""
    aim = pytest.importorskip("aim")
    run = aim.Run(repo=str(tmp_path), system_tracking_interval=None, capture_terminal_logs=False)
    for k, x in enumerate([2.0, math.nan, 1.0]):
        run.track(x, name="loss", step=10 * k, context={"subset": "train"})
        run.track(9.0, name="loss", step=10 * k, context={"subset": "val"})
    run.close()
    log, steps, values = losses(tmp_path)
    assert (log.format, log.columns[LOSS], steps) == ("Aim", "train/loss", [0, 10, 20])
    assert str(values) == "[2.0, nan, 1.0]"
