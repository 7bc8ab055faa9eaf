"""The loss on held-out rows: of the last weights, the same rows for all, and without effect on the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.metrics import METRICS
from experiments.trial import configured, trial
from glm.cli import main
from glm.data.shards import open_data
from glm.train.checkpoint import load_newest
from glm.train.config import TrainConfig, from_json
from glm.train.engine import LocalEngine
from glm.train.heldout import heldout_loss, heldout_rows
from glm.train.reproducibility import device_of
from stabilitylab.runs import load_run

SMALL = {
    "model.layers": "1",
    "model.hidden": "16",
    "model.heads": "2",
    "model.length": "64",
    "batch.rows": "2",
    "steps": "3",
    "monitor.no-tensorboard": "",
}


def words(data: Path, out: Path, *more: str) -> list[str]:
    flags = [word for flag, value in SMALL.items() for word in (f"--{flag}", value) if word]
    return ["train", "glm-proxy", *flags, "--data", str(data), "--out", str(out), *more]


def test_a_run_ends_with_its_loss_on_held_out_rows(data_folder: Path, tmp_path: Path) -> None:
    assert main(words(data_folder, tmp_path / "judged", "--heldout.rows", "64")) == 0
    assert main(words(data_folder, tmp_path / "plain")) == 0
    run = load_run(tmp_path / "judged")
    series = run.series("train/-/heldout_loss")
    assert series.index.tolist() == [2]
    config = from_json((tmp_path / "judged" / "config.json").read_text(), source=tmp_path)
    # From the weights that the run left on disk.
    engine = LocalEngine(config, device_of(run))
    state, _ = load_newest(tmp_path / "judged" / "checkpoints")
    engine.load_tensors(state.model, state.optimizer)
    rows = heldout_rows(open_data(data_folder), config.objective, length=64, rows=64)
    assert heldout_loss(engine.model, rows) == series.iloc[-1] == METRICS["heldout_loss"].measure(run)
    # A trial of the same flags is judged by the same rows; it computes on the CPU.
    if device_of(run).type == "cpu":
        judged = trial(configured("glm-proxy", SMALL, data=data_folder), data=data_folder)
        assert judged.heldout == series.iloc[-1]
    newest = "checkpoints/step-00000003/model.safetensors"
    assert (tmp_path / "judged" / newest).read_bytes() == (tmp_path / "plain" / newest).read_bytes()
    assert "heldout" in json.loads((tmp_path / "plain" / "config.json").read_text())


def test_it_is_one_processes_and_counts_rows() -> None:
    from glm.distributed.config import ParallelConfig
    from glm.errors import InputError
    from glm.train.heldout import HeldoutConfig

    with pytest.raises(InputError, match=r"heldout\.rows counts rows"):
        HeldoutConfig(rows=-1)
    with pytest.raises(InputError, match="one process only"):
        TrainConfig(heldout=HeldoutConfig(rows=4), parallel=ParallelConfig(tensor=2))
