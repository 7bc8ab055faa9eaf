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


class Coded(Tensor):
    """Codes of eight bits with their scale in one object, the way of torchao's low-bit optimizers; it can do little else."""

    @staticmethod
    def __new__(cls, plain: Tensor) -> Coded:
        made: Coded = Tensor._make_wrapper_subclass(cls, plain.shape, dtype=plain.dtype)  # type: ignore[attr-defined]
        return made

    def __init__(self, plain: Tensor) -> None:
        self.scale = plain.abs().max() / 127 + 1e-30
        self.codes = (plain / self.scale).round().to(torch.int8)

    def dequantize(self) -> Tensor:
        return self.codes * self.scale

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"{function} of codes")


class Kept(torch.optim.Optimizer):
    """Signs of gradients as steps, and v kept in one of several ways.

    Args:
        how: bias (torch's), none (divided out by a beta2 that grows, as StableAdamW and heavyball do), scaled (Prodigy's), rows
            (one number a row, Adam-mini's).
        prefix: before and after the names in the state, heavyball's way; the state then lies one level down.
        codes: type of the moments in the state.
        names: of the moments.
    """

    def __init__(
        self,
        parameters: Any,
        how: str,
        prefix: str = "",
        codes: torch.dtype = torch.float32,
        names: tuple[str, str] = ("exp_avg", "exp_avg_sq"),
    ) -> None:
        super().__init__(parameters, {"lr": 0.01, "betas": (0.9, BETA2), "eps": 1e-8})
        self.how, self.prefix, self.codes, self.names = how, prefix, codes, names

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = t = group.get("step", 0) + 1
            for p in group["params"]:
                names = [f"{self.prefix}{n}{'_0' * bool(self.prefix)}" for n in self.names]
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
    lambda parameters: Kept(parameters, "bias", names=("state1", "state2")),
], ids=["torch", "amsgrad", "bias", "none", "nested", "bitsandbytes"])  # fmt: skip
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


def test_codes_that_decode_themselves_are_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STABILITYLAB_STRICT", "1")

    class Low(Kept):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                group["step"] = group.get("step", 0) + 1
                for p in group["params"]:
                    own, v = self.state[p], p.grad.square() * (1 - BETA2)
                    if own:
                        v += BETA2 * own["exp_avg_sq"].dequantize()
                    own["exp_avg"], own["exp_avg_sq"] = Coded(p.grad), Coded(v)
                    p.sub_(0.01 * p.grad.sign())

    sink, gradients = trained(lambda parameters: Low(parameters, "bias"), 0)
    for step in range(3):
        m, v = gradients[step].float(), unbiased(gradients[: step + 1]) * (1 - BETA2 ** (step + 1))
        found = [
            sink.rows[step, f"update/0.weight/{name}", -1] for name in ("first_moment_l2", "second_moment_l2")
        ]
        # Half a code of 127 at each element, against elements of some tenth of the largest.
        assert found == pytest.approx([float(m.norm()), float(v.norm())], rel=0.05)


@pytest.mark.filterwarnings("ignore")  # of the compiler that torchao calls
@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_torchaos_low_bit_optimizers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizers = pytest.importorskip("torchao.optim")
    monkeypatch.setenv("STABILITYLAB_STRICT", "1")
    model, sink = nn.Linear(256, 64), Recording()  # it leaves small parameters as they are
    optimizer = getattr(optimizers, name)(model.parameters())
    with Monitor(model, optimizer, every=1, sinks=[sink], detector=None) as monitor:
        for step in range(2):
            model(torch.randn(8, 256)).square().mean().backward()
            optimizer.step()
            monitor.step(step)
            optimizer.zero_grad()
    state = optimizer.state[model.weight]
    for statistic, moment in (("first_moment_l2", "exp_avg"), ("second_moment_l2", "exp_avg_sq")):
        expected = float(state[moment].dequantize().double().norm())
        assert sink.rows[1, f"update/weight/{statistic}", -1] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("setting", ["two epsilons", "beta2 by itself"])
def test_settings_of_other_forms(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CAME's pair of epsilons, neither of which is Adam's, and optimi's beta2 outside of a pair."""
    monkeypatch.setenv("STABILITYLAB_STRICT", "1")

    def optimizer_of(parameters: Any) -> Kept:
        optimizer = Kept(parameters, "bias")
        for group in optimizer.param_groups:
            if setting == "two epsilons":
                group["eps"] = (1e-30, 1e-16)
            else:
                group["beta1"], group["beta2"] = group.pop("betas")
        return optimizer

    sink, gradients = trained(optimizer_of, 0)
    assert math.isfinite(sink.rows[2, "update/0.weight/second_moment_l2", -1])
    rms_t = sink.rows.get((2, "update/0.weight/rms_t", -1))
    expected = float((gradients[2].square() / unbiased(gradients)).mean().sqrt())
    assert rms_t == (None if setting == "two epsilons" else pytest.approx(expected, rel=1e-4))


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
