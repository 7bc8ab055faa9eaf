"""What ``stabilitylab spikes`` prints: notes beside JSON, and the episodes that a run recorded."""

import io
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from stabilitylab.runs.folder import RunFolder
from stabilitylab.spikes.commands import spikes
from stabilitylab.telemetry import Event
from tests.stabilitylab.spikes.curves import falling
from tests.stabilitylab.spikes.test_precursors import make_run


def test_notes_go_beside_json(tmp_path, capsys):
    losses = falling(400)
    losses[300] = 0.0
    log = tmp_path / "log.csv"
    np.savetxt(
        log, np.c_[np.arange(400), losses], fmt=("%d", "%.6f"), delimiter=",", header="step,loss", comments=""
    )
    spikes((log,), json=True)
    told = capsys.readouterr()
    assert json.loads(told.out) == []
    assert told.err == "note: 1 losses are exactly 0, the first at step 300: a filter for NaN writes that\n"


def test_what_was_read_of_unknown_text_is_told(tmp_path, capsys):
    rows = enumerate(falling(40))
    (tmp_path / "mine.log").write_text("".join(f"[{i:04d}] obj {loss:.4f} | lr 1e-3\n" for i, loss in rows))
    spikes((tmp_path / "mine.log",), json=True)
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith("note: no known trainer wrote this text; read are loss from 'obj', step from ")
    assert "learning_rate from 'lr': --loss, --step or --pattern read another" in note


def test_standard_input_is_told_by_its_name_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    text = "step,loss\n" + "".join(f"{step},{loss:.6f}\n" for step, loss in enumerate(falling(400)))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    spikes((Path("-"),))
    assert "standard-input: " in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_run_is_told_as_it_was_recorded(tmp_path, capsys):
    """The curve shows a spike at 200 only; what the run recorded, and acted on, is another one."""
    make_run(tmp_path / "run", episodes=[200], record_events=False)
    shared = {
        "episode": 1,
        "signal": "train/-/loss",
        "onset": 100,
        "peak": 101,
        "height": 2.5,
        "baseline": 3.0,
    }
    RunFolder(tmp_path / "run").append_events(
        [
            Event(step=100, kind="hard-batch", data={**shared, "phase": "onset", "end": None}),
            Event(step=106, kind="spike", data={**shared, "phase": "end", "end": 104}),
        ]
    )
    spikes((tmp_path / "run",), json=True)
    told = capsys.readouterr()
    (one,) = json.loads(told.out)
    assert (one["kind"], one["onset"], one["end"], one["level"]) == ("spike", 100, 104, 3.0)
    assert "note: the episodes are those that the run recorded" in told.err
