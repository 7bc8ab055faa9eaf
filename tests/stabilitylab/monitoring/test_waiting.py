"""A measured step does nothing that would make the host wait for an accelerator.

The meta device stands in for an accelerator: it holds no numbers, so whatever needs one on the host (``item``, ``nonzero``, a mask
as an index) raises. The test catches copies from the host where they are made.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stabilitylab import Monitor
from stabilitylab.probes.everything import all_probes
from stabilitylab.probes.formats import FormatProbe
from stabilitylab.probes.router_watch import loads
from stabilitylab.probes.second_moments import SecondMoments
from stabilitylab.probes.weights import WeightProbe
from stabilitylab.statistics import summary, transfer
from stabilitylab.statistics.scores import fused
from tests.stabilitylab.gpt import GPT, next_token_loss
from tests.stabilitylab.recording import Recording

META = torch.device("meta")


class Operations(TorchDispatchMode):
    """Counts the operations on the stand-in, without views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.device == META and not func.is_view:
            self.count += 1
        return result


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Let the meta device be measured, and nothing be brought over from the host while the list holds True."""
    strict, own = [True], summary.measurable

    def measurable(x: object) -> bool:
        return isinstance(x, Tensor) and x.is_floating_point() and x.numel() > 0

    for module in [m for name, m in sys.modules.items() if name.startswith("stabilitylab.")]:
        if getattr(module, "measurable", None) is own:
            monkeypatch.setattr(module, "measurable", measurable)

    def copied(self: transfer.Transfer, x: Tensor) -> Tensor:
        return torch.zeros(x.shape, dtype=x.dtype) if x.device == META else x.clone()

    monkeypatch.setattr(transfer.Transfer, "_copy", copied)
    # Learned once in a run, by waiting.
    monkeypatch.setattr(SecondMoments, "_kind", lambda *_: True)
    for name in ("tensor", "as_tensor"):
        made = getattr(torch, name)

        def refused(*args: Any, made: Any = made, device: Any = None, **more: Any) -> Tensor:
            assert device is None or torch.device(device).type == "cpu" or not strict[0], (
                "copied to the device"
            )
            tensor: Tensor = made(*args, device=device, **more)
            return tensor

        monkeypatch.setattr(torch, name, refused)
    moved = Tensor.to

    def to(self: Tensor, *args: Any, **more: Any) -> Tensor:
        result = moved(self, *args, **more)
        assert self.device == result.device or not strict[0], "copied from one device to another"
        return result

    monkeypatch.setattr(Tensor, "to", to)
    return strict


OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, foreach=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of what was never measured
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_not_waited_for(
    name: str, dtype: torch.dtype, stand_in: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STABILITYLAB_STRICT", "1")
    model = GPT(layers=1).to_empty(device=META).to(dtype)
    optimizer = OPTIMIZERS[name](model.parameters())
    counted = []
    for probes in ([], [*all_probes(), WeightProbe(), FormatProbe()]):
        with Monitor(
            model, optimizer, every=1, flush_every=99, sinks=[Recording()], detector=None, probes=probes
        ) as monitor:
            for step in range(4):
                stand_in[0] = step > 0  # what is constant is laid out once
                with Operations() as operations:
                    next_token_loss(model, torch.empty(3, 17, dtype=torch.int64, device=META)).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                monitor.step(step)
        counted.append(operations.count)
    assert counted[1] < 30 * counted[0]


def test_what_a_fused_kernel_returned_is_not_waited_for(stand_in: list[bool]) -> None:
    q = torch.empty(2, 4, 17, 8, device=META)
    for mask in (None, torch.ones(17, 17, dtype=torch.bool, device=META), torch.zeros(17, 17, device=META)):
        found = _without_autocast(q, mask)
        assert found.largest.shape == found.entropy.shape == (4,)


def _without_autocast(q: Tensor, mask: Tensor | None) -> Any:
    from stabilitylab.statistics.scores import _fused_in_torch

    given = None if mask is None else mask.expand(2, 4, 17, 17)
    return _fused_in_torch(torch.empty(2, 4, 32, device=META), q, q, given, False, 0.1)


def test_loads_of_experts_are_counted_there(stand_in: list[bool]) -> None:
    chosen = torch.randint(5, (64, 2))
    assert loads(chosen, 7).tolist() == torch.bincount(chosen.flatten(), minlength=7).tolist()
    assert loads(torch.empty(64, 2, dtype=torch.int64, device=META), 7).shape == (7,)


def test_autocast_does_not_round_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stabilitylab.statistics.native.kernel", lambda: None)
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 4, 33, 16, generator=g) * 5 for _ in range(2))
    lse = (q @ k.mT / 4).logsumexp(-1)
    plain = fused(lse, q, k)
    with torch.autocast("cpu", torch.bfloat16):
        cast = fused(lse, q, k)
    assert torch.equal(plain.largest, cast.largest)
    assert torch.equal(plain.entropy, cast.entropy)
