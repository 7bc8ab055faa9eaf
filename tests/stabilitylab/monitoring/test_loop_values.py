"""What the monitor finds without the loop's help: the rate used, the norm before clipping, the loss scale, skipped steps."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm

from stabilitylab import Monitor
from tests.stabilitylab.gpt import GPT, batch, next_token_loss
from tests.stabilitylab.recording import Recording

clip_grad = importlib.import_module("torch.nn.utils.clip_grad")
RATES = [1.0, 0.5, 0.25, 0.125]


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))


def loss_of(model: nn.Module, step: int) -> Tensor:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
    return 10 * model(x).square().mean()


def norm_of(model: nn.Module) -> float:
    squares = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
    return float(torch.stack(squares).sum().sqrt())


def column(sink: Recording, name: str, steps: int) -> list[float]:
    return [sink.rows[step, name, -1] for step in range(steps)]


@pytest.mark.parametrize("given", [False, True])
def test_the_rate_is_the_one_that_the_step_has_used(given: bool) -> None:
    model, sink = small(), Recording()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    with Monitor(model, optimizer, every=3, sinks=[sink], detector=None) as monitor:
        for step in range(4):
            loss_of(model, step).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            monitor.step(step, learning_rate=scheduler.get_last_lr()[0] if given else None)
    assert column(sink, "train/-/learning_rate", 4) == RATES
    assert not sink.steps("train/-/group_rate")


def test_rates_of_groups_that_differ() -> None:
    model, sink = small(), Recording()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups: list[dict[str, Any]] = [
        {"params": rest, "lr": 0.1},
        {"params": matrices, "lr": torch.tensor(0.5)},
    ]
    optimizers = torch.optim.AdamW(groups[:1]), torch.optim.AdamW(groups[1:])
    with Monitor(model, optimizers, every=0, sinks=[sink], detector=None) as monitor:
        loss_of(model, 0).backward()
        for optimizer in optimizers:
            optimizer.step()
        monitor.step(0)
    assert sink.rows[0, "train/-/learning_rate", -1] == 0.5
    assert sink.vector(0, "train/-/group_rate") == [0.1, 0.5]


def test_what_a_loop_without_an_optimizer_says_of_its_rate() -> None:
    sink = Recording()
    with Monitor(small(), sinks=[sink], detector=None) as monitor:
        monitor.step(0, learning_rate=0.25)
    assert sink.rows[0, "train/-/learning_rate", -1] == 0.25


def by_groups(model: nn.Module) -> None:
    for module in model.children():
        if list(module.parameters()):
            clip_grad_norm_(module.parameters(), 0.1)


def two_parts(model: nn.Module) -> None:
    total = get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    clip_grads_with_norm_(model.parameters(), 0.1, total)


CLIPPINGS: dict[str, Callable[[nn.Module], object]] = {
    "by value": lambda model: clip_grad_norm_(model.parameters(), 0.1),
    "by module": lambda model: torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1, foreach=False),
    "by groups": by_groups,
    "in two parts": two_parts,
    "infinity norm": lambda model: clip_grad_norm_(model.parameters(), 0.1, norm_type=math.inf),
    "value": lambda model: clip_grad_value_(model.parameters(), 0.01),
    "both": lambda model: (
        clip_grad_norm_(model.parameters(), 0.1),
        clip_grad_value_(model.parameters(), 0.01),
    ),
}
WITHOUT_L2 = ("infinity norm", "value")


@pytest.mark.parametrize("name", CLIPPINGS)
def test_the_norm_before_clipping(name: str) -> None:
    """Over two micro-batches, and training is the same bit for bit."""
    clip, weights = CLIPPINGS[name], []
    for watched in (False, True):
        model, sink, norms = small(), Recording(), []
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        monitor = Monitor(model, optimizer, every=2, sinks=[sink], detector=None) if watched else None
        for step in range(4):
            loss_of(model, step).backward()
            loss_of(model, step + 10).backward()
            norms.append(norm_of(model))
            clip(model)
            assert norm_of(model) < norms[-1] / 2
            optimizer.step()
            optimizer.zero_grad()
            if monitor is not None:
                monitor.step(step)
        weights.append([p.detach().clone() for p in model.parameters()])
    assert monitor is not None
    monitor.close()
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    steps = (0, 2) if name in WITHOUT_L2 else (0, 1, 2, 3)
    assert tuple(sink.steps("train/-/gradient_norm")) == steps
    for step in steps:
        # float32 sums of a hundred numbers
        assert sink.rows[step, "train/-/gradient_norm", -1] == pytest.approx(norms[step], rel=1e-6)
    for step in (0, 2):
        squares = [v**2 for (s, n, _), v in sink.rows.items() if s == step and n.endswith("/l2")]
        assert sum(squares) ** 0.5 == pytest.approx(norms[step], rel=1e-6)
    assert not sink.events


def test_torch_has_its_own_functions_back() -> None:
    def cells() -> list[object]:
        names = ("_get_total_norm", "_clip_grads_with_norm_", "clip_grad_value_")
        return [getattr(clip_grad, name).__closure__[0].cell_contents for name in names]

    before = cells()
    with Monitor(small(), detector=None):
        Monitor(small(), detector=None).close()
        assert all(now is not own for now, own in zip(cells(), before, strict=True))
    assert cells() == before


def test_a_norm_over_other_gradients_is_not_the_models() -> None:
    model, other, sink = small(), small(), Recording()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, every=0, sinks=[sink], detector=None) as monitor:
        for step, clipped in enumerate(([other], [model, other], [model[0]])):
            for each in (model, other):
                loss_of(each, 0).backward()
            clip_grad_norm_([p for each in clipped for p in each.parameters()], 0.1)
            optimizer.step()
            monitor.step(step)
    assert not sink.steps("train/-/gradient_norm")


@pytest.mark.parametrize("unscaled", [True, False])
def test_under_a_scaler(unscaled: bool, caplog: pytest.LogCaptureFixture) -> None:
    model, sink, norms = small(), Recording(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    with Monitor(model, optimizer, every=2, sinks=[sink], detector=None, scaler=scaler) as monitor:
        for step in range(4):
            scaler.scale(loss_of(model, step) * (math.inf if step == 1 else 1.0)).backward()
            norms.append(norm_of(model) / scaler.get_scale())
            if unscaled:
                scaler.unscale_(optimizer)
                clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scheduler.step()
            scaler.update()
            optimizer.zero_grad()
            monitor.step(step)
    assert column(sink, "precision/-/loss_scale", 4) == [1024, 1024, 512, 512]
    assert column(sink, "train/-/skipped", 4) == [0, 1, 0, 0]
    assert column(sink, "train/-/learning_rate", 4) == [0.01, 0.005, 0.0025, 0.00125]
    for step in (0, 2, 3) if unscaled else (0, 2):
        assert sink.rows[step, "train/-/gradient_norm", -1] == pytest.approx(norms[step], rel=1e-6)
    assert "gradients-changed" not in {event.kind for event in sink.events}
    assert not {"step", "unscale_"} & vars(scaler).keys()


def test_a_loss_scale_that_is_passed_is_recorded_and_changes_nothing() -> None:
    found = []
    for passed in (False, True):
        torch.manual_seed(0)
        model, sink = GPT(), Recording()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=1)
        with Monitor(model, optimizer, every=1, sinks=[sink], detector=None, scaler=scaler) as monitor:
            for step in range(2):
                scaler.scale(next_token_loss(model, batch(step))).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                monitor.step(step, loss_scale=scaler.get_scale() if passed else None)
        found.append(sink.rows)
    assert [found[0].pop((step, "precision/-/loss_scale", -1)) for step in range(2)] == [2, 4]
    assert [found[1].pop((step, "precision/-/loss_scale", -1)) for step in range(2)] == [4, 8]
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        assert found[1][key] == pytest.approx(value, rel=0, abs=0, nan_ok=True), key


def test_a_clipping_of_ones_own_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model, sink = small(), Recording()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Monitor(model, optimizer, every=2, sinks=[sink], detector=None) as monitor:
        for step in range(6):
            loss_of(model, step).backward()
            for p in model.parameters():
                assert p.grad is not None
                p.grad.mul_(0.1)
            optimizer.step()
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            monitor.step(step)
    (event,) = sink.events
    assert (event.kind, event.step) == ("gradients-changed", 0)
    assert caplog.text.count("monitor.gradients_ready()") == 1
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_each_network_of_a_gan_has_its_own_gradients() -> None:
    """The generator's loss passes through the discriminator, whose gradient it leaves behind until it is cleared."""
    torch.manual_seed(0)
    model, sink = nn.ModuleDict({"g": nn.Linear(4, 4), "d": nn.Linear(4, 1)}), Recording()
    g, d = model["g"], model["d"]
    optimizers = [torch.optim.Adam(net.parameters(), lr=0.01 * k) for k, net in ((1, d), (2, g))]
    norms: list[dict[str, float]] = []
    with Monitor(model, optimizers, every=1, sinks=[sink], detector=None) as monitor:
        for step in range(4):
            z, x = torch.randn(8, 4), torch.randn(8, 4) + 1
            norms.append({})
            d.zero_grad()
            (d(g(z).detach()) - d(x)).square().mean().backward()
            norms[-1] |= {
                f"d.{n}": float(p.grad.norm()) for n, p in d.named_parameters() if p.grad is not None
            }
            if step % 2:
                clip_grad_norm_(d.parameters(), 0.01)
            optimizers[0].step()
            g.zero_grad()
            d(g(z)).square().mean().backward()
            norms[-1] |= {
                f"g.{n}": float(p.grad.norm()) for n, p in g.named_parameters() if p.grad is not None
            }
            if step % 2:
                clip_grad_norm_(g.parameters(), 0.01)
            optimizers[1].step()
            monitor.step(step)
    for step, expected in enumerate(norms):
        for name, norm in expected.items():
            assert sink.rows[step, f"gradient/{name}/l2", -1] == pytest.approx(norm, rel=1e-5), (step, name)
        whole = math.sqrt(sum(norm**2 for norm in expected.values()))
        assert sink.rows[step, "train/-/gradient_norm", -1] == pytest.approx(whole, rel=1e-5)
    assert sink.vector(0, "train/-/group_rate") == [0.01, 0.02]
