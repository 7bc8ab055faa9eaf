"""Checkpoints are whole or absent, and damage is found and named."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from glm.distributed.process_group import SingleProcess
from glm.errors import InputError
from glm.model.config import ModelConfig
from glm.train import checkpoint as checkpoints
from glm.train.async_checkpoint import CheckpointWriter
from glm.train.checkpoint import Checkpoint
from glm.train.config import TrainConfig
from glm.train.engine import LocalEngine


def a_checkpoint(step: int, elements: int = 100) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    return Checkpoint(
        step=step,
        model={"w": torch.randn(elements, generator=generator)},
        optimizer={"exp_avg/w": torch.randn(elements, generator=generator)},
        state={"samples": 8 * step, "scaler": {"scale": 2.0**16}},
    )


def begin(folder: Path, checkpoint: Checkpoint, *, background: bool = True) -> CheckpointWriter:
    files = {"model.safetensors": checkpoint.model, "optimizer.safetensors": checkpoint.optimizer}
    return CheckpointWriter(folder, checkpoint, files, SingleProcess(), background=background)


def save(folder: Path, checkpoint: Checkpoint, *, keep: int, background: bool = False) -> Path:
    return begin(folder, checkpoint, background=background).publish(keep=keep)


def test_round_trip_is_exact(tmp_path):
    written = a_checkpoint(3)
    read = checkpoints.load(save(tmp_path, written, keep=2))
    assert (read.step, read.state) == (3, written.state)
    assert torch.equal(read.model["w"], written.model["w"])
    assert torch.equal(read.optimizer["exp_avg/w"], written.optimizer["exp_avg/w"])


def test_budget_keeps_the_newest(tmp_path):
    for step in (5, 100, 20):
        save(tmp_path, a_checkpoint(step), keep=2)
    assert [step for step, _ in checkpoints.list_checkpoints(tmp_path)] == [20, 100]


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip, os.remove])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
)
def test_damage_is_named_and_the_one_before_is_taken(tmp_path, damage, name):
    save(tmp_path, a_checkpoint(1), keep=2)
    newest = save(tmp_path, a_checkpoint(2), keep=2)
    damage(newest / name)
    with pytest.raises(InputError, match="step-00000002"):
        checkpoints.load(newest)
    found, problems = checkpoints.load_newest(tmp_path)
    assert found.step == 1
    assert len(problems) == 1
    assert str(newest) in problems[0]


def test_nothing_undamaged_is_an_error(tmp_path):
    cut(save(tmp_path, a_checkpoint(1), keep=2) / "model.safetensors")
    with pytest.raises(InputError, match="no undamaged checkpoint"):
        checkpoints.load_newest(tmp_path)


def test_no_checkpoint_at_all_is_an_error(tmp_path):
    with pytest.raises(InputError, match="leave out --resume"):
        checkpoints.load_newest(tmp_path / "none")


def test_another_format_is_refused(tmp_path):
    path = save(tmp_path, a_checkpoint(1), keep=2)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(InputError, match="format 99"):
        checkpoints.load(path)


def test_the_budget_is_not_spent_on_what_is_damaged(tmp_path):
    save(tmp_path, a_checkpoint(1), keep=1)
    cut(save(tmp_path, a_checkpoint(3), keep=2) / "model.safetensors")
    assert checkpoints.load_newest(tmp_path)[0].step == 1
    checkpoints.set_aside_after(tmp_path, 1)
    save(tmp_path, a_checkpoint(2), keep=1)
    assert checkpoints.load_newest(tmp_path)[0].step == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003.damaged"]
    save(tmp_path, a_checkpoint(3), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_what_is_written_meanwhile_is_the_state_at_its_beginning(tmp_path):
    """The engine's tensors and the state change before a byte is read of them."""
    engine = LocalEngine(
        TrainConfig(model=ModelConfig(vocabulary=50, layers=1, hidden=32, heads=2, length=8))
    )
    weights, moments = engine.tensors()
    state = {"samples": [1, 2]}
    checkpoint = Checkpoint(step=1, model=weights, optimizer=moments, state=state)
    now = engine.save(tmp_path / "now", checkpoint, keep=1)
    writing = engine.begin_save(tmp_path / "meanwhile", checkpoint, background=True)
    with torch.no_grad():
        for tensor in (*weights.values(), *moments.values()):
            tensor.add_(1)
    state["samples"].append(3)
    meanwhile = writing.publish(keep=1)
    assert {file.name for file in meanwhile.iterdir()} == {file.name for file in now.iterdir()}
    for file in meanwhile.iterdir():
        assert file.read_bytes() == (now / file.name).read_bytes()


def test_training_that_breaks_off_finishes_what_it_began_to_write(tmp_path):
    begin(tmp_path, a_checkpoint(1), background=True).leave(keep=1)
    assert checkpoints.load_newest(tmp_path)[0].step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_last_checkpoint_that_cannot_be_put_in_place_ends_nothing(tmp_path, monkeypatch, caplog):
    """Training calls it while ending for another reason, and closes the observers after it."""
    writer = begin(tmp_path, a_checkpoint(1), background=True)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "finish", full)
    writer.leave(keep=1)
    assert "step 1 could not be written" in caplog.text
    assert list(tmp_path.iterdir()) == []


SAVE_UNDER_A_LIMIT = """
    import resource, signal, sys
    from pathlib import Path
    from tests.glm.train.test_checkpoint import a_checkpoint, save
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    try:
        save(Path(sys.argv[1]), a_checkpoint(2, elements=100_000), keep=1, background=sys.argv[2] == "True")
    except OSError as error:
        print("refused:", error.errno)
"""


@pytest.mark.parametrize("background", [False, True])
def test_a_write_that_fails_loses_nothing(tmp_path, background):
    save(tmp_path, a_checkpoint(1), keep=1)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SAVE_UNDER_A_LIMIT), str(tmp_path), str(background)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("refused:")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001"]
    assert checkpoints.load_newest(tmp_path)[0].step == 1


SAVE_FOR_EVER = """
    import itertools, sys
    from pathlib import Path
    from tests.glm.train.test_checkpoint import a_checkpoint, save
    for step in itertools.count(2):
        save(Path(sys.argv[1]), a_checkpoint(step, elements=300_000), keep=2, background=sys.argv[2] == "True")
        print(step, flush=True)
"""


@pytest.mark.parametrize("background", [False, True])
def test_a_kill_while_writing_leaves_whole_checkpoints(tmp_path, background):
    save(tmp_path, a_checkpoint(1), keep=2)
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SAVE_FOR_EVER), str(tmp_path), str(background)],
        stdout=subprocess.PIPE,
    ) as writer:
        assert writer.stdout is not None
        for _ in range(3):
            writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
    for _, path in checkpoints.list_checkpoints(tmp_path):
        checkpoints.verify(path)
    save(tmp_path, a_checkpoint(10_000), keep=2)
    assert not list(tmp_path.glob("*.partial"))
