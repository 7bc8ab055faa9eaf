"""How an optimizer keeps v, learned from one step: rms_t against v written out in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabilitylab import Monitor
from tests.stabilitylab.recording import Recording

BETA2 = 0.99


class Kept(torch.optim.Optimizer):
    """Signs of gradients as steps, and v kept in one of several ways.

    Args:
        how: bias (torch's), none (divided out by a beta2 that grows, as StableAdamW and heavyball do), scaled (Prodigy's), rows
            (one number a row, Adam-mini's).
        prefix: before and after the names in the state, heavyball's way; the state then lies one level down.
        codes: type of the moments in the state.
    """

    def __init__(
        self, parameters: Any, how: str, prefix: str = "", codes: torch.dtype = torch.float32
    ) -> None:
        super().__init__(parameters, {"lr": 0.01, "betas": (0.9, BETA2), "eps": 1e-8})
        self.how, self.prefix, self.codes = how, prefix, codes

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = t = group.get("step", 0) + 1
            for p in group["params"]:
                names = [f"{self.prefix}{n}{'_0' * bool(self.prefix)}" for n in ("exp_avg", "exp_avg_sq")]
                own = self.state[p].setdefault(0, {}) if self.prefix else self.state[p]
                square = p.grad.square()
                square = square.mean(1) if self.how == "rows" and p.dim() > 1 else square
                square = square * (1e-9 if self.how == "scaled" else 1.0)
                beta2 = BETA2 * (1 - BETA2 ** (t - 1)) / (1 - BETA2**t) if self.how == "none" else BETA2
                v = own.get(names[1], torch.zeros_like(square))
                own[names[0]] = torch.ones_like(square).to(self.codes)
                own[names[1]] = (beta2 * v.float() + (1 - beta2) * square).to(self.codes)
                p.sub_(0.01 * p.grad.sign())


def trained(optimizer_of: Any, attached: int) -> tuple[Recording, list[Tensor]]:
    """Telemetry from step ``attached`` on, and every step's gradient of the first weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 4))
    optimizer, sink, gradients = optimizer_of(model.parameters()), Recording(), []
    monitor: Monitor | None = None
    for step in range(attached + 3):
        if step == attached:
            monitor = Monitor(model, optimizer, every=1, sinks=[sink], detector=None)
            monitor.start_step(step)
        optimizer.zero_grad()
        model(torch.randn(8, 24)).square().mean().backward()
        gradients.append(model[0].weight.grad.double().clone())
        optimizer.step()
        if monitor is not None:
            monitor.step(step)
    assert monitor is not None
    monitor.close()
    return sink, gradients


def unbiased(gradients: list[Tensor]) -> Tensor:
    weights = BETA2 ** torch.arange(len(gradients) - 1, -1, -1, dtype=torch.float64)
    squares = torch.stack(gradients).square()
    return (weights[:, None, None] * squares).sum(0) / weights.sum()


@pytest.mark.parametrize("attached", [0, 20, 400])
@pytest.mark.parametrize("optimizer_of", [
    lambda parameters: torch.optim.AdamW(parameters, lr=0.01, betas=(0.9, BETA2)),
    lambda parameters: torch.optim.AdamW(parameters, lr=0.01, betas=(0.9, BETA2), amsgrad=True),
    lambda parameters: Kept(parameters, "bias"),
    lambda parameters: Kept(parameters, "none"),
    lambda parameters: Kept(parameters, "none", prefix="update_by_adam_"),
], ids=["torch", "amsgrad", "bias", "none", "nested"])  # fmt: skip
def test_rms_t_of_a_v_with_and_without_its_bias(optimizer_of: Any, attached: int) -> None:
    sink, gradients = trained(optimizer_of, attached)
    for step in range(attached, attached + 3):
        v = unbiased(gradients[: step + 1])
        expected = float((gradients[step].square() / v).mean().sqrt())
        # Where the run is long the kinds are alike, and it is not asked which: 1 - .99^400 is .98.
        near = 1e-4 if attached < 400 else 0.02
        assert sink.rows[step, "update/0.weight/rms_t", -1] == pytest.approx(expected, rel=near)


def test_what_is_no_mean_of_the_squared_gradient_is_not_compared_with_it() -> None:
    sink, _ = trained(lambda parameters: Kept(parameters, "scaled"), 0)
    assert math.isfinite(sink.rows[2, "update/0.weight/second_moment_l2", -1])
    assert (2, "update/0.weight/rms_t", -1) not in sink.rows
    assert (2, "update/0.weight/below_epsilon_fraction", -1) not in sink.rows


@pytest.mark.parametrize("codes", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_codes_of_eight_bits_are_no_moments(codes: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STABILITYLAB_STRICT", "1")
    sink, _ = trained(lambda parameters: Kept(parameters, "bias", codes=codes), 0)
    assert sink.rows[2, "update/0.weight/rms", -1] == pytest.approx(0.01, rel=1e-4)
    assert (2, "update/0.weight/second_moment_l2", -1) not in sink.rows


def test_moments_of_another_size_are_left_alone() -> None:
    sink, _ = trained(lambda parameters: Kept(parameters, "rows"), 0)
    assert sink.rows[2, "update/0.weight/rms", -1] == pytest.approx(0.01, rel=1e-4)
    assert (2, "update/0.weight/second_moment_l2", -1) not in sink.rows
    assert (2, "update/0.bias/second_moment_l2", -1) in sink.rows
