"""What users' models and machines do to a monitor: nothing leaks, nothing crashes the training, nothing is
hidden."""

from __future__ import annotations

import errno
import gc
import logging
import math
import subprocess
import sys
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stabilitylab import Monitor
from stabilitylab.errors import InputError
from stabilitylab.monitor import all_probes
from stabilitylab.telemetry import Event, RunFolder, Samples
from tests.stabilitylab.gpt import GPT, batch, next_token_loss
from tests.stabilitylab.recording import Recording


def by_metric(sink: Recording, step: int, site: str) -> dict[str, float]:
    return {
        n.rpartition("/")[2]: v for (s, n, _), v in sink.rows.items() if s == step and n.split("/")[1] == site
    }


@dataclass
class Result:
    number: int
    hidden: Tensor


OUTPUTS = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x, None),
    "list after integers": lambda x: [torch.arange(3), x],
    "dictionary": lambda x: OrderedDict(mask=torch.ones(2, dtype=torch.bool), hidden=x),
    "dataclass": lambda x: Result(3, x),
    "nested": lambda x: {"a": ({"b": [x]},)},
}
WITHOUT = {
    "nothing": lambda x: None,
    "integers": lambda x: torch.arange(4),
    "empty": lambda x: x[:0],
    "meta": lambda x: torch.empty(3, device="meta"),
    "a string": lambda x: "done",
    "an empty tuple": lambda x: (),
}


class Odd(nn.Module):
    """A block that returns whatever it is told to."""

    def __init__(self, returns: object) -> None:
        super().__init__()
        self.inner, self.returns = nn.Linear(4, 4), returns

    def forward(self, x: Tensor) -> object:
        return self.returns(self.inner(x))  # type: ignore[operator]


def test_outputs_of_any_shape_are_looked_into() -> None:
    for name, returns in OUTPUTS.items():
        model, sink = nn.ModuleList([Odd(returns), Odd(returns)]), Recording()
        with Monitor(model, every=1, sinks=[sink], detector=None) as monitor:
            for block in model:
                block(torch.ones(2, 4))
            monitor.step(0)
        block, layer = by_metric(sink, 0, "1"), by_metric(sink, 0, "1.inner")
        assert block["rms"] == layer["rms"], name


def test_outputs_without_numbers_are_passed_over() -> None:
    for name, returns in WITHOUT.items():
        model, sink = nn.ModuleList([Odd(returns), Odd(returns)]), Recording()
        with Monitor(model, every=1, sinks=[sink], detector=None) as monitor:
            for block in model:
                block(torch.ones(2, 4))
            monitor.step(0)
        assert not by_metric(sink, 0, "1"), name
        assert by_metric(sink, 0, "1.inner"), name


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(3, 4, dtype=torch.complex64),
        lambda: torch.randn(3, 4).to_sparse(),
        lambda: torch.tensor(2.5),
        lambda: torch.randn(4, 3).t(),
        lambda: torch.randn(3, 4, dtype=torch.float64),
        lambda: torch.randn(3, 4, dtype=torch.bfloat16),
        lambda: torch.randn(1, 1, 1, 1, 1),
    ],
)
def test_tensors_of_any_kind_are_summarised(make: object) -> None:
    x = make()  # type: ignore[operator]
    model, sink = nn.ModuleList([Odd(lambda _: x), Odd(lambda _: x)]), Recording()
    with Monitor(model, every=1, sinks=[sink], detector=None) as monitor:
        model[1](torch.ones(2, 4))
        monitor.step(0)
    dense = x.to_dense() if x.is_sparse else x
    dense = torch.view_as_real(dense) if dense.is_complex() else dense
    assert by_metric(sink, 0, "1")["absmax"] == dense.abs().max().item()


class Thrower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model, self.fails = GPT(), False

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(tokens)
        if self.fails:
            raise RuntimeError("out of memory, say")
        return logits


def test_a_forward_pass_that_raises_leaves_nothing_behind() -> None:
    model, sink = Thrower(), Recording()
    with Monitor(model, every=1, sinks=[sink], detector=None) as monitor:
        model.fails = True
        with pytest.raises(RuntimeError):
            next_token_loss(model, batch(0))
        assert torch.overrides._get_current_function_mode_stack() == []
        monitor.start_step(5)  # the step is given up; the next one begins
        model.fails = False
        next_token_loss(model, batch(5)).backward()
        monitor.step(5)
    expected = Recording()
    model.zero_grad()
    with Monitor(model, every=1, sinks=[expected], detector=None) as monitor:
        next_token_loss(model, batch(5)).backward()
        monitor.step(5)
    assert sink.rows == pytest.approx(expected.rows, nan_ok=True)


def test_activation_recomputation_is_counted_once() -> None:
    for reentrant in (False, True):
        found = {}
        for recompute in (False, True):
            torch.manual_seed(0)
            model, sink = GPT(), Recording()
            if recompute:
                for layer in model.layers:
                    plain = layer.forward
                    layer.forward = partial(checkpoint, plain, use_reentrant=reentrant)
            with Monitor(model, every=1, sinks=[sink], detector=None) as monitor:
                next_token_loss(model, batch(0)).backward()
                monitor.step(0)
            found[recompute] = sink.rows
        assert found[True] == pytest.approx(found[False], rel=1e-6, nan_ok=True)


def test_micro_batches_make_one_step() -> None:
    torch.manual_seed(0)
    model = GPT()
    rows = {}
    for parts in (1, 3):
        sink = Recording()
        with Monitor(model, every=1, sinks=[sink], detector=None) as monitor:
            for part in batch(0).chunk(parts):
                (next_token_loss(model, part) / parts).backward()
            monitor.step(0)
            model.zero_grad()
        rows[parts] = sink.rows
    assert rows[1].keys() == rows[3].keys()
    exact = ("absmax", "outlier_fraction", "zero_fraction")
    close = ("rms", "mean", "kurtosis", "l2", "channel_kurtosis", "channel_max_over_median")
    for key, value in rows[1].items():
        if key[1].startswith("activation/") and key[1].endswith(exact):
            assert rows[3][key] == value, key
        elif key[1].endswith(close) and not key[1].startswith("activation_gradient"):
            assert rows[3][key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


def test_shared_tied_and_frozen_parameters() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 4)
            self.output = nn.Linear(4, 10, bias=False)
            self.output.weight = self.embedding.weight
            self.frozen = nn.Linear(4, 4).requires_grad_(False)
            self.again = self.frozen

        def forward(self, x: Tensor) -> Tensor:
            return self.output(self.again(self.frozen(self.embedding(x))))

    model, sink = Tied(), Recording()
    optimizer = torch.optim.AdamW(model.parameters())
    with Monitor(model, optimizer, every=1, sinks=[sink], detector=None) as monitor:
        model(torch.arange(10)).square().sum().backward()
        optimizer.step()
        monitor.step(0)
    gradients = {name.split("/")[1] for _, name, _ in sink.rows if name.startswith("gradient/")}
    assert gradients == {"embedding.weight"}
    assert by_metric(sink, 0, "embedding.weight")["share"] == 1
    activations = {name.split("/")[1] for _, name, _ in sink.rows if name.startswith("activation/")}
    assert activations == {"output", "output:input", "frozen", "frozen:input"}
    # The shared layer ran twice: both outputs are in its statistics, but its first input is the embedding's
    # output.
    assert by_metric(sink, 0, "frozen")["absmax"] > 0


def test_evaluation_between_steps_is_not_counted() -> None:
    model = GPT()
    rows = []
    for evaluates in (False, True):
        sink = Recording()
        with Monitor(model, every=1, sinks=[sink], detector=None) as monitor:
            next_token_loss(model, batch(0)).backward()
            if evaluates:
                model.eval()
                with torch.no_grad():
                    next_token_loss(model, batch(1))
                model.train()
            monitor.step(0)
            model.zero_grad()
        rows.append(sink.rows)
    assert rows[0] == pytest.approx(rows[1], nan_ok=True)


def test_attached_after_warm_up_it_measures_at_once() -> None:
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(3):
        next_token_loss(model, batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    sink = Recording()
    with Monitor(model, optimizer, every=100, sinks=[sink], detector=None) as monitor:
        for step in range(3, 5):
            next_token_loss(model, batch(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step(step)
    assert sink.steps("activation/layers.0/rms") == [3]
    assert by_metric(sink, 3, "layers.0.attention.output.weight")["rms_t"] > 0


@pytest.mark.parametrize("unscale", [False, True])
def test_a_loss_scale_is_taken_out(unscale: bool) -> None:
    rows = []
    for scale in (1.0, 2.0**10):
        torch.manual_seed(0)
        model, sink = GPT(), Recording()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1.0)
        with Monitor(model, optimizer, every=1, sinks=[sink], detector=None, scaler=scaler) as monitor:
            for step in range(2):
                scaler.scale(next_token_loss(model, batch(step))).backward()
                if unscale:
                    scaler.unscale_(optimizer)
                monitor.gradients_ready()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                monitor.step(step)
        rows.append(sink.rows)
    for key, value in rows[0].items():
        if not key[1].endswith(("fraction", "headroom_bits")):
            assert rows[1][key] == pytest.approx(value, rel=1e-4, abs=1e-7, nan_ok=True), key
    headroom = "activation_gradient/layers.0/fp16_headroom_bits"
    assert rows[1][0, headroom, -1] == pytest.approx(rows[0][0, headroom, -1] - 10)


def test_a_step_that_the_scaler_skips_is_still_seen() -> None:
    model, sink = GPT(), Recording()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    with Monitor(model, optimizer, every=1, sinks=[sink], detector=None, scaler=scaler) as monitor:
        scaler.scale(next_token_loss(model, batch(0)) * math.inf).backward()
        scaler.step(optimizer)
        scaler.update()
        monitor.step(0, skipped=True, loss_scale=2.0)
    assert by_metric(sink, 0, "embedding.weight")["nonfinite_fraction"] > 0
    assert sink.rows[0, "precision/-/skipped", -1] == 1
    assert sink.rows[0, "precision/-/loss_scale", -1] == 2
    assert {event.kind for event in sink.events} == {"overflow"}


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
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
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


def test_a_closure_is_run_before_gradients_are_read() -> None:
    torch.manual_seed(0)
    model, sink = GPT(), Recording()
    optimizer = torch.optim.AdamW(model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = next_token_loss(model, batch(0))
        loss.backward()
        return loss

    with Monitor(model, optimizer, every=1, sinks=[sink], detector=None) as monitor:
        optimizer.step(closure)
        monitor.step(0)
    norm = torch.stack(torch._foreach_norm([p.grad for p in model.parameters()])).norm()
    assert sink.rows[0, "train/-/gradient_norm", -1] == pytest.approx(float(norm), rel=1e-5)
    assert by_metric(sink, 0, "embedding.weight")["ratio"] > 0


def test_gradients_read_twice_are_those_of_the_second_time() -> None:
    model, sink = nn.Linear(2, 2, bias=False), Recording()
    with Monitor(model, every=1, sinks=[sink], detector=None) as monitor:
        for value in (5.0, 3.0):
            model.weight.grad = torch.full((2, 2), value)
            monitor.gradients_ready()
        monitor.step(0)
    assert by_metric(sink, 0, "weight")["l2"] == pytest.approx(6)


def test_sites_are_chosen_by_glob() -> None:
    sink, model = Recording(), GPT()
    with Monitor(model, every=1, sites=["layers.1.*", "embedding*"], sinks=[sink], detector=None) as monitor:
        next_token_loss(model, batch(0)).backward()
        monitor.step(0)
    sites = {name.split("/")[1] for _, name, _ in sink.rows} - {"-"}
    assert {site.split(".")[0] for site in sites} == {"layers", "embedding"}
    assert not any(site.startswith("layers.0") for site in sites)
    shares = [v for (_, name, _), v in sink.rows.items() if name.endswith("/share")]
    assert sum(shares) < 1  # of the whole model's norm, not of the chosen sites'
