"""What training loops do to a monitor: die, go on after closing it, number their steps oddly, hand over odd values."""

from __future__ import annotations

import gc
import math
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from stabilitylab import Monitor
from stabilitylab.errors import InputError
from stabilitylab.probes.everything import all_probes
from stabilitylab.runs import load_run
from stabilitylab.spikes import episodes_of
from tests.patience import PATIENCE, wait_until
from tests.stabilitylab.recording import Recording
from tests.stabilitylab.sinks.event_files import scalars


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))


def hooks(model: nn.Module, *optimizers: torch.optim.Optimizer) -> int:
    on_modules = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return on_modules + sum(
        len(o._optimizer_step_pre_hooks) + len(o._optimizer_step_post_hooks) for o in optimizers
    )


def test_a_loop_that_dies_loses_no_step(tmp_path: Path) -> None:
    code = f"""
import torch
from stabilitylab import Monitor
model = torch.nn.Linear(4, 4)
def loop():
    monitor = Monitor(model, every=1, out={str(tmp_path / "run")!r}, tensorboard=False)
    for step in range(39):
        monitor.step(step, loss=1.0)
    raise RuntimeError('out of memory')
loop()
"""
    subprocess.run([sys.executable, "-c", code], timeout=PATIENCE, stderr=subprocess.DEVNULL, check=False)
    assert list(load_run(tmp_path / "run").series("train/-/loss").index) == list(range(39))


def test_a_monitor_that_is_dropped_loses_no_step(caplog: pytest.LogCaptureFixture) -> None:
    sink, model = Recording(), small()
    monitor = Monitor(model, sinks=[sink], detector=None, flush_every=100)
    for step in range(3):
        monitor.step(step, loss=1.0)
    del monitor, model
    gc.collect()
    wait_until(lambda: sink.rows)
    assert sink.steps("train/-/loss") == [0, 1, 2]
    assert "dropped without close()" in caplog.text


def test_after_close_nothing_happens_and_that_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model, sink = small(), Recording()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = Monitor(model, optimizer, every=1, sinks=[sink], detector=None)
    monitor.close()
    for step in range(3):
        monitor.start_step(step)
        model(torch.ones(2, 8)).sum().backward()
        monitor.gradients_ready()
        optimizer.step()
        assert monitor.step(step, loss=1.0) == []
        monitor.rewind(0)
        monitor.flush()
    monitor.close()
    assert hooks(model, optimizer) == 0
    assert monitor.backlog == 0
    assert not sink.rows
    assert not sink.events
    assert caplog.text.count("the monitor is closed") == 1


class Broken:
    name = "broken"

    def attach(self, context: object) -> None:
        raise ZeroDivisionError

    def detach(self) -> None:
        pass


@pytest.mark.parametrize("broken", ["probe", "folder"])
def test_a_monitor_that_cannot_be_made_leaves_nothing(tmp_path: Path, broken: str) -> None:
    model, run, threads = small(), tmp_path / "run", threading.active_count()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options: dict[str, Any] = {"every": 1, "tensorboard": False, "detector": None}
    if broken == "probe":
        with pytest.raises(ZeroDivisionError):
            Monitor(model, optimizer, out=run, probes=[*all_probes(), Broken()], **options)  # type: ignore[list-item]
    else:
        run.write_text("a file")
        with pytest.raises(InputError, match="a file is in the way"):
            Monitor(model, optimizer, out=run, **options)
        run.unlink()
    assert hooks(model, optimizer) == 0
    assert threading.active_count() == threads
    Monitor(model, optimizer, out=run, **options).close()


@pytest.mark.parametrize("out", ["", 5, "a\0b"])
def test_a_folder_that_is_none(out: Any) -> None:
    with pytest.raises(InputError, match=r"give|choose"):
        Monitor(small(), out=out)


@pytest.mark.parametrize("number", [np.int64, np.uint8, torch.tensor])
def test_whole_numbers_of_any_type_count_steps(tmp_path: Path, number: Any) -> None:
    with Monitor(small(), out=tmp_path, every=1, tensorboard=False, probes=[]) as monitor:
        for step in range(40):
            monitor.step(number(step), loss=math.nan if step == 30 else 1.0)
        monitor.rewind(number(35))
    run = load_run(tmp_path)
    assert ("non-finite", 30) in {(event.kind, event.step) for event in run.events}
    assert list(run.series("train/-/loss").index) == list(range(35))


@pytest.mark.parametrize("step", [1.0, "1", None, torch.tensor([1, 2]), torch.tensor(1.0)])
def test_what_counts_no_steps_is_refused(step: Any) -> None:
    with (
        Monitor(small(), detector=None) as monitor,
        pytest.raises(InputError, match=r"^step is .*give a whole number") as error,
    ):
        monitor.step(step)
    assert "\n" not in str(error.value)


def test_steps_that_go_back_unannounced_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with Monitor(small(), detector=None, probes=[]) as monitor:
        for step in (0, 1, 1, 1, 0):
            monitor.step(step)
    assert caplog.text.count("superseded") == 1
    assert "step 1 came after 1" in caplog.text
    caplog.clear()
    with Monitor(small(), detector=None, probes=[]) as monitor:
        monitor.step(3)
        monitor.rewind(1)
        monitor.step(1)
    assert not caplog.text


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, 1.0),
        (True, 1.0),
        (np.float32(2), 2.0),
        (np.array([[2.0]]), 2.0),
        (torch.ones(1, 1), 1.0),
        (torch.tensor(3), 3.0),
        (torch.ones(2), math.nan),
        (torch.ones(0), math.nan),
        (torch.tensor(1j), math.nan),
        (np.ones(3), math.nan),
        ([1.0], math.nan),
        ("1", math.nan),
        (10**400, math.nan),
    ],
)
def test_values_of_any_type(caplog: pytest.LogCaptureFixture, value: Any, expected: float) -> None:
    sink = Recording()
    with Monitor(small(), sinks=[sink], detector=None, probes=[]) as monitor:
        for step in range(2):
            monitor.step(step, loss=value)
    assert [sink.rows[step, "train/-/loss", -1] for step in range(2)] == pytest.approx(
        [expected] * 2, nan_ok=True
    )
    assert caplog.text.count("'loss'") == math.isnan(expected)


def test_names_of_any_kind(caplog: pytest.LogCaptureFixture) -> None:
    sink, given = Recording(), {"train/loss": 1.0, "eval/-/loss": 2.0, "/": 3.0, "": 4.0, "层": 5.0}
    with Monitor(small(), sinks=[sink], detector=None, probes=[]) as monitor:
        monitor.step(0, **{**given, "": 4.0})
    found = {metric: value for (_, metric, _), value in sink.rows.items()}
    assert found["train/-/train.loss"] == 1.0
    assert found["eval/-/loss"] == 2.0
    assert found["train/-/层"] == 5.0
    assert "'train/loss'" in caplog.text


def test_sites_that_match_nothing_are_named(caplog: pytest.LogCaptureFixture) -> None:
    Monitor(small(), sites=["layers.*", "2:input", "0.weight", "1"], detector=None).close()
    assert "sites='layers.*' matches no module or parameter" in caplog.text
    assert caplog.text.count("\n") == 1
    caplog.clear()
    Monitor(small(), detector=None).close()
    assert not caplog.text


def test_gradients_gone_before_they_were_read_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = small()
    with Monitor(model, every=1, detector=None) as monitor:
        for step in range(3):
            model(torch.ones(2, 8)).sum().backward()
            model.zero_grad()
            monitor.step(step)
    assert caplog.text.count("before zero_grad") == 1


def test_an_optimizer_that_no_longer_steps_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, every=1, detector=None) as monitor:
        for step in range(4):
            if step == 2:
                optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            model(torch.ones(2, 8)).sum().backward()
            optimizer.step()
            monitor.step(step)
    assert "no parameter had a gradient at step 2: the monitor's optimizer did not step" in caplog.text
    assert caplog.text.count("\n") == 1


def test_gradients_gone_before_the_optimizers_step_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, every=1, detector=None) as monitor:
        for step in range(2):
            model(torch.ones(2, 8)).sum().backward()
            optimizer.zero_grad()
            optimizer.step()
            monitor.step(step)
    assert "step 0: the optimizer stepped without any: call zero_grad() after its step" in caplog.text
    assert caplog.text.count("\n") == 1


@pytest.mark.parametrize("whole", [False, True], ids=["one", "all"])
def test_parameters_that_were_replaced_are_named(whole: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, every=1, detector=None) as monitor:
        for step in range(4):
            if step == 2:
                for module in model if whole else model[:1]:
                    module.weight = nn.Parameter(module.weight.detach().clone())
                    module.bias = nn.Parameter(module.bias.detach().clone())
            model(torch.randn(4, 8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step(step)
    names = "6 of the parameters that the monitor watches (0.bias, 0.weight, 1.bias, ...)"
    if not whole:
        names = "2 of the parameters that the monitor watches (0.bias, 0.weight)"
    assert f"the model no longer has {names}" in caplog.text
    assert caplog.text.count("parameters that the monitor watches") == 1


def test_masters_are_no_parameters_that_were_replaced(caplog: pytest.LogCaptureFixture) -> None:
    model = small()
    masters = {name: p.detach().double() for name, p in model.named_parameters()}
    with Monitor(model, every=1, parameters=masters, detector=None) as monitor:
        for step in range(2):
            masters["0.weight"].grad = torch.ones_like(masters["0.weight"])
            monitor.step(step)
    assert not caplog.text


def test_a_frozen_model_is_told_apart(caplog: pytest.LogCaptureFixture) -> None:
    frozen = small().requires_grad_(False)
    with Monitor(frozen, every=1, detector=None) as monitor:
        for step in range(2):
            frozen(torch.ones(2, 8))
            monitor.step(step)
    assert caplog.text.count("all are frozen") == 1
    assert "zero_grad" not in caplog.text


def test_parameters_that_join_the_optimizer_are_measured() -> None:
    model, sink = small(), Recording()
    first, last = model[0], model[2]
    model.requires_grad_(False)
    last.requires_grad_(True)
    optimizer = torch.optim.SGD(last.parameters(), lr=0.1)
    norms = []
    with Monitor(model, optimizer, every=1, sinks=[sink], detector=None) as monitor:
        for step in range(4):
            if step == 2:  # an adapter that did not exist before
                model[0] = nn.Sequential(first, nn.Linear(8, 8))
                optimizer.add_param_group({"params": list(model[0][1].parameters()), "lr": 0.01})  # type: ignore[index]
            model(torch.randn(4, 8)).square().mean().backward()
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            norms.append(float(torch.nn.utils.get_total_norm(grads)))
            optimizer.step()
            optimizer.zero_grad()
            monitor.step(step)
    for step, norm in enumerate(norms):
        assert sink.rows[step, "train/-/gradient_norm", -1] == pytest.approx(norm, rel=1e-5)
    assert sink.steps("gradient/0.1.weight/l2") == [2, 3]
    assert sink.steps("update/0.1.weight/rms") == [2, 3]
    (joined,) = sink.events
    assert (joined.kind, joined.step) == ("parameters-joined", 2)
    assert joined.data == {"parameters": ["0.1.weight", "0.1.bias"]}


@pytest.mark.parametrize("first", [0, 60])
def test_a_script_run_again_in_the_same_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, first: int
) -> None:
    """A run of 300 steps with a NaN at 200, then a healthy one of 100 steps, from the beginning or from step 60 on."""
    for life, steps in enumerate((range(300), range(first, 100))):
        with Monitor(nn.Linear(2, 2), out=tmp_path, every=10) as monitor:
            for step in steps:
                monitor.step(
                    step, loss=math.nan if (life, step) == (0, 200) else 1.0 + life + 0.01 * (step % 3)
                )
    run = load_run(tmp_path)
    assert episodes_of(run.events) == []
    series = run.series("train/-/loss")
    assert list(series.index) == list(range(100))
    assert [int(series[step]) for step in (0, 59, 60, 99)] == [1 + (first == 0), 1 + (first == 0), 2, 2]
    assert caplog.text.count("holds a run already, up to step 299") == 1
    curve = scalars(tmp_path / "tensorboard", "Overview/1 loss")
    assert sorted(curve) == list(range(100))
