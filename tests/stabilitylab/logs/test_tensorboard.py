"""Event files of several runs, writers and restarts: the reader joins what is one run, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from stabilitylab.errors import InputError
from stabilitylab.logs.recognise import open_log
from stabilitylab.telemetry import GRADIENT_NORM, LOSS

pytestmark = pytest.mark.filterwarnings("ignore")


def write(
    folder: Path,
    steps: Sequence[int],
    add: float = 0.0,
    *,
    tags: Sequence[str] = ("loss",),
    suffix: str = "",
    **options: int,
) -> None:
    """Steps s with the value s + ``add``."""
    with SummaryWriter(str(folder), filename_suffix=suffix, **options) as writer:
        for step in steps:
            for tag in tags:
                writer.add_scalar(tag, step + add, step)
    time.sleep(0.002)


def read(path: Path, signal: str = LOSS) -> list[tuple[int, float]]:
    rows: list[tuple[int, float]] = []
    for block in open_log(path).blocks():
        here = zip(
            block.steps.tolist(), block.values[signal].tolist(), block.logged[signal].tolist(), strict=True
        )
        rows += [(step, value) for step, value, logged in here if logged]
    return rows


def line(steps: Sequence[int], add: float = 0.0) -> list[tuple[int, float]]:
    return [(step, step + add) for step in steps]


def test_two_runs_in_a_folder_are_named(tmp_path: Path) -> None:
    write(tmp_path / "first", range(5))
    write(tmp_path / "second", range(5), 0.5)
    with pytest.raises(InputError, match=r"holds 2 runs: first, second; give one of them$"):
        open_log(tmp_path)
    assert read(tmp_path / "second") == line(range(5), 0.5)


@pytest.mark.parametrize("place", ["subfolder", "both subfolders", "suffix", "add_scalars"])
def test_a_writer_of_validation_is_left_out(tmp_path: Path, place: str) -> None:
    train, validation = tmp_path, tmp_path / "val"
    if place == "both subfolders":
        train, validation = tmp_path / "train", tmp_path / "validation"
    elif place == "add_scalars":
        train, validation = tmp_path / "loss_train", tmp_path / "loss_test"
    suffix = ".val" if place == "suffix" else ""
    write(train, range(9))
    write(tmp_path if suffix else validation, range(0, 9, 4), 100.0, suffix=suffix)
    assert read(tmp_path) == line(range(9))
    (note,) = open_log(tmp_path).notes  # type: ignore[attr-defined]
    assert note.startswith("left out, as of evaluation: ")
    if not suffix:
        assert read(validation) == line(range(0, 9, 4), 100.0)


def test_purge_step_as_tensorboard_itself_takes_it(tmp_path: Path) -> None:
    write(tmp_path, range(100))
    write(tmp_path, range(60, 120), 0.5, purge_step=60)
    accumulator = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0})
    accumulator.Reload()
    assert read(tmp_path) == [(event.step, event.value) for event in accumulator.Scalars("loss")]
    assert read(tmp_path) == line(range(60)) + line(range(60, 120), 0.5)


@pytest.mark.parametrize("first", [40, 0])
def test_a_run_begun_again_replaces_what_it_goes_over(tmp_path: Path, first: int) -> None:
    write(tmp_path, range(50), tags=("loss", "grad_norm"))
    write(tmp_path, range(first, 60), 0.5, tags=("loss", "grad_norm"))
    for signal in (LOSS, GRADIENT_NORM):
        assert read(tmp_path, signal) == line(range(first)) + line(range(first, 60), 0.5)


def side_by_side(folder: Path, tags: Mapping[int, str]) -> None:
    with SummaryWriter(str(folder)) as one, SummaryWriter(str(folder)) as other:
        for step in range(6):
            one.add_scalar(tags[0], step, step)
            other.add_scalar(tags[1], step + 0.5, step)


def test_writers_at_the_same_time(tmp_path: Path) -> None:
    side_by_side(tmp_path / "a", {0: "loss", 1: "grad_norm"})
    assert read(tmp_path / "a") == line(range(6))
    assert read(tmp_path / "a", GRADIENT_NORM) == line(range(6), 0.5)
    side_by_side(tmp_path / "b", {0: "loss", 1: "loss"})
    with pytest.raises(InputError, match=r"holds 2 runs: events\.out\S+, events\.out\S+; give one of them"):
        open_log(tmp_path / "b")
    assert sorted(read(file) for file in (tmp_path / "b").iterdir()) == [line(range(6)), line(range(6), 0.5)]


def test_hyperparameters_are_no_run(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(5):
            writer.add_scalar("loss", step, step)
        writer.add_hparams({"lr": 0.1}, {"hparam/loss": 1.0})
    assert read(tmp_path) == line(range(5))
