"""Passes of training loops: micro-batches, recomputation, evaluation, passes that raise, tied and frozen layers."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stabilitylab import Monitor
from stabilitylab.probes.everything import all_probes
from stabilitylab.probes.formats import FormatProbe
from tests.stabilitylab.gpt import GPT, batch, next_token_loss
from tests.stabilitylab.recording import Recording


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
            probes = [*all_probes(), FormatProbe(("int8-row", "mxfp4"))]
            with Monitor(model, every=1, sinks=[sink], detector=None, probes=probes) as monitor:
                next_token_loss(model, batch(0)).backward()
                monitor.step(0)
            found[recompute] = sink.rows
        assert any("formats" in name or ":gradient" in name for _, name, _ in found[False])
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
        for step in range(2):
            model(torch.arange(10)).square().sum().backward()
            optimizer.step()
            monitor.step(step)
    gradients = {name.split("/")[1] for _, name, _ in sink.rows if name.startswith("gradient/")}
    assert gradients == {"embedding.weight"}
    assert sink.site(0, "embedding.weight")["share"] == 1
    activations = {
        name.split("/")[1] for step, name, _ in sink.rows if step and name.startswith("activation/")
    }
    assert activations == {"embedding", "output", "output:input", "frozen", "frozen:input"}
    # The shared layer ran twice: both outputs are in its statistics, but its first input is the embedding's output, so that its
    # inputs have numbers of their own from the second step on.
    assert sink.site(0, "frozen")["absmax"] > 0


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
    assert sink.site(3, "layers.0.attention.output.weight")["rms_t"] > 0


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
    assert sink.site(0, "embedding.weight")["ratio"] > 0


def test_gradients_read_twice_are_those_of_the_second_time() -> None:
    model, sink = nn.Linear(2, 2, bias=False), Recording()
    with Monitor(model, every=1, sinks=[sink], detector=None) as monitor:
        for value in (5.0, 3.0):
            model.weight.grad = torch.full((2, 2), value)
            monitor.gradients_ready()
        monitor.step(0)
    assert sink.site(0, "weight")["l2"] == pytest.approx(6)


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


def test_a_backward_pass_that_raises_leaves_nothing_behind() -> None:
    rows = []
    for raises in (True, False):
        torch.manual_seed(0)
        model, sink = GPT(), Recording()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with Monitor(model, optimizer, every=1, sinks=[sink], detector=None) as monitor:
            if raises:
                loss = next_token_loss(model, batch(0))
                loss.register_hook(lambda gradient: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    loss.backward()
                optimizer.zero_grad()
                monitor.start_step(5)
            else:
                monitor.start_step(5)
            next_token_loss(model, batch(5)).backward()
            optimizer.step()
            monitor.step(5)
        assert not any(module._forward_hooks for module in model.modules())
        rows.append(sink.rows)
    assert rows[0] == pytest.approx(rows[1], nan_ok=True)
