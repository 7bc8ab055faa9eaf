"""Whatever machines and users do to a monitor, nothing leaks, nothing crashes the training, nothing stays hidden."""

from __future__ import annotations

import errno
import gc
import logging
import subprocess
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from stabilitylab import Monitor
from stabilitylab.errors import InputError
from stabilitylab.probes.everything import all_probes
from stabilitylab.runs.folder import RunFolder
from stabilitylab.telemetry import Event, Samples
from tests.patience import PATIENCE
from tests.stabilitylab.gpt import GPT, batch, next_token_loss
from tests.stabilitylab.recording import Recording


class FullDisk:
    """A sink whose disk is full for some flushes."""

    def __init__(self, flushes: int) -> None:
        self.left = flushes

    def write(self, samples: Samples, events: Sequence[Event]) -> None:
        self.left -= 1
        if self.left >= 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    def close(self) -> None:
        pass


def test_a_full_disk_stops_nothing_and_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    sink, model = Recording(), GPT()
    caplog.set_level(logging.CRITICAL, logger="stabilitylab")
    with Monitor(model, every=2, sinks=[FullDisk(3), sink], detector=None, flush_every=1) as monitor:
        for step in range(6):
            next_token_loss(model, batch(step)).backward()
            monitor.step(step, loss=1.0)
    assert sink.steps("train/-/loss") == list(range(6))
    lost = [event for event in sink.events if event.kind == "telemetry-lost"]
    assert [event.data["sink"] for event in lost] == ["FullDisk", "FullDisk"]
    assert "No space left" in lost[0].data["reason"]
    assert lost[1].data["values"] > lost[0].data["values"]


def test_a_sink_that_cannot_close_is_no_exception(caplog: pytest.LogCaptureFixture) -> None:
    class Stuck(FullDisk):
        def close(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    with Monitor(nn.Linear(2, 2), sinks=[Stuck(0)], detector=None) as monitor:
        monitor.step(0, loss=1.0)
    assert "could not be closed" in caplog.text


def test_a_probe_that_fails_is_left_out_and_reported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("STABILITYLAB_STRICT")
    probes = all_probes()
    monkeypatch.setattr(probes[2], "_observe", lambda site, x: 1 / 0)
    sink, model = Recording(), GPT()
    caplog.set_level(logging.CRITICAL, logger="stabilitylab")
    with Monitor(model, every=1, probes=probes, sinks=[sink], detector=None) as monitor:
        for step in range(3):
            next_token_loss(model, batch(step)).backward()
            monitor.step(step)
    assert sink.steps("gradient/embedding.weight/l2") == [0, 1, 2]
    assert sink.steps("activation/layers.0/rms") == []
    (lost,) = [event for event in sink.events if event.kind == "telemetry-lost"]
    assert lost.data["probe"] == "activations"
    assert "ZeroDivisionError" in lost.data["reason"]


def test_an_aborted_run_writes_what_it_has(tmp_path: Path) -> None:
    model = GPT()

    def interrupted() -> None:
        with Monitor(model, out=tmp_path / "run", every=1, detector=None) as monitor:
            next_token_loss(model, batch(0)).backward()
            monitor.step(0, loss=1.0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list((tmp_path / "run" / "telemetry").glob("*.parquet"))
    assert not any(module._forward_hooks for module in model.modules())


def test_a_forgotten_close_is_made_up_for_at_exit(tmp_path: Path) -> None:
    code = (
        "import torch; from stabilitylab import Monitor\n"
        f"monitor = Monitor(torch.nn.Linear(2, 2), out={str(tmp_path / 'run')!r}, detector=None)\n"
        "monitor.step(0, loss=1.0)\nmonitor.flush()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE)
    assert list((tmp_path / "run" / "telemetry").glob("*.parquet"))


def test_nothing_keeps_the_model_alive() -> None:
    model = GPT()
    with Monitor(model, every=1, detector=None) as monitor:
        next_token_loss(model, batch(0)).backward()
        monitor.step(0)
    gone = weakref.ref(model)
    del model, monitor
    gc.collect()
    assert gone() is None


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    with (
        Monitor(nn.Linear(2, 2), out=tmp_path, detector=None),
        pytest.raises(InputError, match="written by another run"),
    ):
        Monitor(nn.Linear(2, 2), out=tmp_path, detector=None)
    run = RunFolder(tmp_path)
    run.claim()
    with Monitor(nn.Linear(2, 2), out=run, detector=None) as monitor:
        monitor.step(0, loss=1.0)
    run.release()


@pytest.mark.parametrize("model", [None, "gpt2", torch.ones(2)])
def test_what_is_no_module_is_refused(model: object) -> None:
    with pytest.raises(InputError, match=r"attaches to a torch\.nn\.Module"):
        Monitor(model)  # type: ignore[arg-type]


@pytest.mark.parametrize("every", [-1, 2.5, True])
def test_a_cadence_that_counts_no_steps_is_refused(every: object) -> None:
    with pytest.raises(InputError, match="whole number of steps"):
        Monitor(nn.Linear(2, 2), every=every)  # type: ignore[arg-type]
