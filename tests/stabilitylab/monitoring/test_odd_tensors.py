"""Whatever modules return and parameters are: the probes summarise what holds numbers, and ignore the rest."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from stabilitylab import Monitor
from tests.stabilitylab.recording import Recording


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
    """A block that returns whatever the test wants."""

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
        block, layer = sink.site(0, "1"), sink.site(0, "1.inner")
        assert block["rms"] == layer["rms"], name


def test_a_tensor_that_was_changed_in_place_is_another() -> None:
    model, sink = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4)), Recording()
    torch.nn.init.constant_(model[0].bias, -1.0)
    x = torch.randn(64, 4)
    with Monitor(model, every=1, sinks=[sink], detector=None) as monitor:
        model(x)
        monitor.step(0)
    before = torch.nn.functional.linear(x, model[0].weight, model[0].bias).detach()
    assert sink.site(0, "0")["mean"] == pytest.approx(before.double().mean().item(), rel=1e-5)
    assert sink.site(0, "2:input")["mean"] == pytest.approx(before.relu().double().mean().item(), rel=1e-5)


def test_outputs_without_numbers_are_passed_over() -> None:
    for name, returns in WITHOUT.items():
        model, sink = nn.ModuleList([Odd(returns), Odd(returns)]), Recording()
        with Monitor(model, every=1, sinks=[sink], detector=None) as monitor:
            for block in model:
                block(torch.ones(2, 4))
            monitor.step(0)
        assert not sink.site(0, "1"), name
        assert sink.site(0, "1.inner"), name


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
    assert sink.site(0, "1")["absmax"] == dense.abs().max().item()


class Parameters(nn.Module):
    """Parameters of every kind, each with a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.scalar = nn.Parameter(torch.tensor(2.0))
        self.hollow = nn.Parameter(torch.empty(0, 3))
        self.of_complex = nn.Parameter(torch.randn(3, 2, dtype=torch.complex64))
        self.wide = nn.Parameter(torch.randn(3, dtype=torch.float64))
        self.sparse = nn.Embedding(9, 2, sparse=True)
        self.transposed = nn.Parameter(torch.randn(4, 5).t())
        self.unused = nn.Parameter(torch.randn(2))
        self.frozen = nn.Parameter(torch.randn(2), requires_grad=False)
        self.integers = nn.Parameter(torch.arange(3), requires_grad=False)
        self.elsewhere = nn.Parameter(torch.empty(2, 2, device="meta"))

    def forward(self) -> Tensor:
        dense = (
            self.scalar * 3 + self.hollow.sum() + self.of_complex.abs().sum() + self.transposed.square().sum()
        )
        return dense + self.wide.sum() + self.sparse(torch.tensor([1, 1, 4])).sum()


def test_parameters_of_any_kind_are_summarised() -> None:
    model, sink = Parameters(), Recording()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, every=1, sinks=[sink], detector=None) as monitor:
        for step in range(2):
            optimizer.zero_grad()
            model().backward()
            expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            expected = {name: grad.to_dense() for name, grad in expected.items() if grad.numel()}
            optimizer.step()
            monitor.step(step)
            for name, gradient in expected.items():
                norm = torch.linalg.vector_norm(gradient.double() if not gradient.is_complex() else gradient)
                assert sink_value(monitor, sink, step, name) == pytest.approx(float(norm), rel=1e-6), name
    assert set(expected) == {"scalar", "of_complex", "wide", "sparse.weight", "transposed"}
    assert {name.split("/")[1] for _, name, _ in sink.rows if name.startswith("gradient/")} == set(expected)


def sink_value(monitor: Monitor, sink: Recording, step: int, name: str) -> float:
    monitor.flush()
    return sink.rows[step, f"gradient/{name}/l2", -1]


class Attends(nn.Module):
    """Calls attention with whatever it is given."""

    def forward(self, *qkv: Tensor) -> Tensor:
        return scaled_dot_product_attention(*qkv)


def test_attention_of_any_shape_runs_on() -> None:
    g = torch.Generator().manual_seed(0)
    shapes = [(5, 4), (3, 5, 4), (2, 3, 5, 4), (2, 3, 0, 4), (0, 3, 5, 4)]
    for shape in shapes:
        model, sink = nn.ModuleList([Attends(), Attends()]), Recording()
        qkv = torch.randn(3, *shape, generator=g)
        with Monitor(model, every=1, sinks=[sink], detector=None) as monitor:
            watched = model[1](*qkv)
            monitor.step(0)
        assert torch.equal(watched, scaled_dot_product_attention(*qkv))
        seen = {name for _, name, _ in sink.rows if name.startswith("attention/1/")}
        assert bool(seen) == (shape == (2, 3, 5, 4)), shape
