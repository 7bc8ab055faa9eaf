"""TorchScript takes no hooks: gradients and updates of such a model or part are recorded, activations not, and a line says so."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

from stabilitylab import Monitor
from tests.stabilitylab.recording import Recording

TOKENS = torch.arange(12).reshape(4, 3)


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))


def partly() -> nn.Module:
    model = plain()
    model[1] = torch.jit.script(model[1])
    return model


SCRIPTED = {
    "scripted": lambda: torch.jit.script(plain()),
    "traced": lambda: torch.jit.trace(plain(), TOKENS),
    "a part": partly,
}


@pytest.mark.parametrize("kind", SCRIPTED)
def test_gradients_and_updates_are_those_of_the_plain_model(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        found = recorded(SCRIPTED[kind])
    part = "1" if kind == "a part" else "the model"
    assert caplog.messages == [
        f"TorchScript takes no hooks, so the activations of {part} are not seen; gradients and updates are"
    ]
    expected = recorded(plain)
    # An embedding within it is not known as one, so its rows cannot be distinguished.
    wanted = {at for at in expected if at[1].startswith(("gradient/", "update/")) and "/top_row" not in at[1]}
    assert wanted <= found.keys()
    for at in found:
        # The scripted kernels may sum in another order: some 50 roundings of float32.
        assert found[at] == pytest.approx(expected[at], rel=1e-5, abs=1e-7), at
    sites = {at[1].split("/")[1] for at in found if at[1].startswith("activation/")}
    assert sites == ({"0", "2", "2:input", "3", "3:input"} if kind == "a part" else set())


def recorded(make: Callable[[], nn.Module]) -> dict[tuple[int, str, int], float]:
    model, sink = make(), Recording()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, every=1, sinks=[sink], detector=None) as monitor:
        for step in range(2):
            model(TOKENS).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step(step)
    return sink.rows
