"""``glm train`` as a user runs it: killed, interrupted, resumed, given wrong input."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from glm.cli import main
from glm.commands.train import parse_command
from glm.errors import InputError
from stabilitylab.runs.folder import RunFolder
from tests.patience import PATIENCE, wait_until

SMALL = [
    "--model.layers",
    "2",
    "--model.hidden",
    "32",
    "--model.heads",
    "2",
    "--model.length",
    "64",
    "--batch.rows",
    "2",
]
SMALL += [
    "--checkpoint.every",
    "3",
    "--monitor.every",
    "4",
    "--monitor.no-tensorboard",
    "--precision",
    "fp16",
]


def arguments(data: Path, out: Path, *more: str, steps: int = 30) -> list[str]:
    return ["train", "glm-tiny", "--data", str(data), "--out", str(out), "--steps", str(steps), *SMALL, *more]


def start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "glm", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_checkpoint(out: Path, number: int, process: subprocess.Popen[str]) -> None:
    there = out / "checkpoints" / f"step-{number:08d}"
    wait_until(lambda: there.is_dir() or process.poll() is not None, 0.05)


def final(out: Path, steps: int = 30) -> bytes:
    return (out / "checkpoints" / f"step-{steps:08d}" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(data_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert main(arguments(data_folder, out)) == 0
    return out


def test_a_run_killed_at_a_random_moment_and_resumed_is_the_uninterrupted_one(
    uninterrupted, data_folder, tmp_path
):
    out = tmp_path / "killed"
    with start(arguments(data_folder, out)) as process:
        wait_for_checkpoint(out, 3, process)
        time.sleep(random.random() * 0.5)
        process.send_signal(signal.SIGKILL)
    assert main(arguments(data_folder, out, "--resume")) == 0
    assert final(out) == final(uninterrupted)
    from stabilitylab.runs import load_run

    for metric in ("train/-/loss", "train/-/gradient_norm", "activation/layers.1/absmax"):
        ours, theirs = (load_run(path).series(metric) for path in (out, uninterrupted))
        assert ours.equals(theirs), metric


# The signal comes from within, where the first checkpoint is whole: one from outside may find a short run at its end.
INTERRUPTED = """
import os, sys
from glm.cli import main
from glm.train import checkpoint

def finish(*files, finish=checkpoint.finish):
    checkpoint.finish = finish
    finish(*files)
    os.kill(os.getpid(), int(sys.argv[1]))

checkpoint.finish = finish
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_and_exits_cleanly(uninterrupted, data_folder, tmp_path, number):
    out = tmp_path / "interrupted"
    command = [sys.executable, "-c", INTERRUPTED, str(int(number)), *arguments(data_folder, out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    assert "continue with --resume" in done.stdout
    assert "Traceback" not in done.stderr
    kinds = [event.kind for event in RunFolder(out).read_events()]
    assert kinds[-1] == "interrupted"
    assert main(arguments(data_folder, out, "--resume")) == 0
    assert final(out) == final(uninterrupted)


def test_resuming_what_is_complete_does_nothing(uninterrupted, data_folder):
    before = final(uninterrupted)
    assert main(arguments(data_folder, uninterrupted, "--resume")) == 0
    assert final(uninterrupted) == before


def test_a_longer_schedule_that_makes_the_rate_jump_is_told(data_folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(arguments(data_folder, out, "--schedule.warmup", "0", steps=3)) == 0
    assert main(arguments(data_folder, out, "--schedule.warmup", "0", "--resume", steps=6)) == 0
    said = " ".join("".join(capsys.readouterr()).split())
    assert "the rate jumps at step 3: the schedule over 6 steps gives" in said
    assert "--schedule.decay-steps 3 keeps the old one" in said


def refused(command: list[str], capsys, *says: str) -> None:
    try:
        code = main(command)
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2, said
    assert said.startswith("error: ")
    for words in says:
        assert words in said


def test_a_second_run_into_the_folder_is_refused(uninterrupted, data_folder, capsys):
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*") if path.name != ".lock"}
    refused(
        arguments(data_folder, uninterrupted), capsys, str(uninterrupted), "add --resume", "another --out"
    )
    assert before == {
        path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*") if path.name != ".lock"
    }


def test_two_runs_at_once_into_one_folder(data_folder, tmp_path, capsys):
    out = tmp_path / "run"
    with start(arguments(data_folder, out, steps=100_000)) as process:
        wait_for_checkpoint(out, 3, process)
        refused(
            arguments(data_folder, out, "--resume", steps=100_000), capsys, "being written by another run"
        )
        process.kill()


def test_resuming_another_model_is_refused(uninterrupted, data_folder, capsys):
    command = arguments(data_folder, uninterrupted, "--resume", "--model.norm", "pre")
    refused(command, capsys, "model.norm: deepnorm -> pre", "choose another --out")


def test_what_lies_idle_in_an_older_run_does_not_keep_it_from_being_resumed(
    uninterrupted, data_folder, tmp_path
):
    out = tmp_path / "older"
    shutil.copytree(uninterrupted, out)
    config = json.loads((out / "config.json").read_text())
    config["optimizer"]["muon"]["per_head"] = True
    (out / "config.json").write_text(json.dumps(config))
    assert main(arguments(data_folder, out, "--resume")) == 0
    assert json.loads((out / "config.json").read_text())["optimizer"]["muon"]["per_head"] is False


def test_resuming_on_other_data_is_refused(data_folder, tmp_path, capsys):
    import shutil

    out = tmp_path / "run"
    assert main(arguments(data_folder, out, steps=3)) == 0
    other = shutil.copytree(data_folder, tmp_path / "shards")
    meta = json.loads((other / "meta.json").read_text())
    (other / "meta.json").write_text(json.dumps({**meta, "fingerprint": "other"}))
    refused(arguments(other, out, "--resume", steps=6), capsys, "trained on other data")


def test_an_altered_checkpoint_falls_back_and_says_so(uninterrupted, data_folder, tmp_path, capsys):
    import shutil

    out = shutil.copytree(uninterrupted, tmp_path / "run")
    newest = out / "checkpoints" / "step-00000030" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-10])
    assert main(arguments(data_folder, out, "--resume")) == 0
    assert "step-00000030 is damaged" in " ".join(capsys.readouterr().err.split())
    assert final(out) == final(uninterrupted)
    for path in (out / "checkpoints").iterdir():
        (path / "state.json").write_text("{}")
    refused(arguments(data_folder, out, "--resume"), capsys, "no undamaged checkpoint")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--model.layrs", "3"], "--model.layrs"),
        (["--model.embedding.gradient-shrink", "7"], "gradient_shrink must lie in [0, 1], got 7"),
        (["--precision", "fp8"], "'fp8'"),
        (["--model.heads", "3"], "model.heads must divide"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--model.vocabulary", "10"], "leave --model.vocabulary out"),
        (["--device", "nonsense"], "--device nonsense"),
        (["--model.length", "9999999"], "fewer than one row"),
        (["--optimizer.muon.per-head"], "optimizer.muon.per_head has no effect without optimizer.kind muon"),
        (["--preset", "glm-small"], "--preset"),
    ],
)
def test_wrong_fields_are_named(data_folder, tmp_path, capsys, flags, says):
    refused([*arguments(data_folder, tmp_path / "run"), *flags], capsys, says)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_tracker_that_is_none_is_refused_before_anything_is_made(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(arguments(tmp_path / "data", out, "--trackers", "comet,wandb")) == 2
    assert "there is no tracker 'comet': choose among wandb, mlflow, trackio" in capsys.readouterr().err
    assert not out.exists()


def test_wrong_places_are_named(data_folder, tmp_path, capsys):
    refused(arguments(tmp_path / "none", tmp_path / "run"), capsys, "not a finished shards")
    (tmp_path / "file").write_text("")
    refused(arguments(data_folder, tmp_path / "file"), capsys, "a file is in the way")
    refused(["train", "glm-tinny", "--data", "x"], capsys, "there is no preset 'glm-tinny'", "glm-tiny")
    refused(["train"], capsys, "needs a preset first")
    refused(["trian"], capsys, "no command 'trian'", "train")


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
from glm.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_checkpoint_that_cannot_be_written_is_one_line(data_folder, tmp_path):
    out = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *arguments(data_folder, out, steps=6)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
    # Once there is room the run goes on, from its beginning since nothing was saved.
    assert main(arguments(data_folder, out, "--resume", steps=6)) == 0


FULL_FOR_A_WHILE = """
import resource, sys
from glm.cli import main
from glm.commands import train as commands
from glm.train.progress import ProgressCallback

class Filling(ProgressCallback):
    def step_end(self, info):
        if info.step in (4, 10):
            limit = 150_000 if info.step == 4 else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return super().step_end(info)

commands.ProgressCallback = Filling
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("how", ["asynchronous", "no-asynchronous"])
def test_a_disk_that_is_full_for_a_while_costs_checkpoints_and_nothing_else(
    uninterrupted, data_folder, tmp_path, how
):
    """The disk has no room for the checkpoints after 6 and 9 steps, but for the one after 12."""
    from stabilitylab.runs import load_run

    out = tmp_path / "run"
    more = [f"--checkpoint.{how}", "--checkpoint.keep", "20"]
    done = subprocess.run(
        [sys.executable, "-c", FULL_FOR_A_WHILE, *arguments(data_folder, out, *more)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if "checkpoint lost" in line]
    assert [line.partition(":")[0] for line in told] == ["step 6", "step 9"]
    assert all("File too large" in line for line in told)
    kept = sorted(int(path.name.removeprefix("step-")) for path in (out / "checkpoints").iterdir())
    assert kept == [3, *range(12, 31, 3)]
    assert final(out) == final(uninterrupted)
    losses = [load_run(path).series("train/-/loss") for path in (out, uninterrupted)]
    assert losses[0].equals(losses[1])
    assert len(losses[0]) == 30


@pytest.mark.parametrize("columns", ["60", "240"])
def test_help_is_an_overview_a_group_or_everything(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)

    def helped(*words):
        with pytest.raises(SystemExit) as stop:
            parse_command(["glm-tiny", "--help", *words])
        assert stop.value.code == 0
        return capsys.readouterr().out

    overview = helped()
    assert len(overview.splitlines()) < 100
    summaries = re.findall(r"^  [a-z][\w.-]+ +(\S.*)$", overview.partition("groups of flags")[2], re.M)
    assert len(summaries) == len(set(summaries)) > 20
    assert os.environ["COLUMNS"] == columns
    assert "--data" in overview
    assert "--model.attention.gate" not in overview
    assert "--preset" not in overview
    for group in ("model.attention", "optimizer.guard", "emulate"):
        assert f"  {group} " in overview
    attention = helped("model.attention")
    assert "--model.attention.gate" in attention
    assert "--optimizer.kind" not in attention
    assert "--optimizer.guard.adagc" in helped("optimizer")
    everything = helped("all")
    assert all(flag in everything for flag in ("--model.attention.gate", "--optimizer.kind", "--data"))
    texts = re.findall(r"^  (\S.*)\n {8}(\S.*)$", everything, re.M)
    assert len(texts) > 150
    assert [flag for flag, text in texts if text.startswith("(default")] == []
    with pytest.raises(InputError, match=r"no group of flags 'attention': choose one of model"):
        parse_command(["glm-tiny", "--help", "attention"])


def test_from_python_as_the_page_shows_it(data_folder, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[3] / "docs" / "training.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "shards").symlink_to(data_folder)
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    steps, losses = zip(*(line.split() for line in capsys.readouterr().out.splitlines()), strict=True)
    assert steps == tuple(map(str, range(10)))
    # Warm-up has not moved it far from a guess among the pieces yet.
    assert all(abs(float(loss) - math.log(1000)) < 0.5 for loss in losses)
