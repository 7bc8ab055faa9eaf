"""On an accelerator: the host waits for it only in a flush, and its numbers are those of the CPU."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import pytest
import torch

from stabilitylab import Monitor
from stabilitylab.probes.everything import all_probes
from stabilitylab.probes.formats import FormatProbe
from stabilitylab.probes.weights import WeightProbe
from stabilitylab.statistics import on_device
from stabilitylab.statistics.scores import fused
from stabilitylab.statistics.updates import AdamMoments, Stepped, Update, after_all, take_before
from tests.stabilitylab.gpt import GPT, batch, next_token_loss
from tests.stabilitylab.recording import Recording

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Any operation that makes the host wait for the device raises."""
    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says of itself that it is a prototype
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def step(model: GPT, optimizer: torch.optim.Optimizer, tokens_BT: torch.Tensor) -> torch.Tensor:
    loss = next_token_loss(model, tokens_BT)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


OPTIMIZERS: dict[str, Callable[[Iterable[torch.Tensor]], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters),
    "fused": lambda parameters: torch.optim.AdamW(parameters, fused=True),
    "capturable": lambda parameters: torch.optim.AdamW(parameters, capturable=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_step_waits_for_the_device(name: str, dtype: torch.dtype) -> None:
    batches = [batch(i).cuda() for i in range(6)]
    bare = GPT().cuda().to(dtype)
    optimizer = OPTIMIZERS[name](bare.parameters())
    step(bare, optimizer, batches[0])
    with no_synchronisation():
        step(bare, optimizer, batches[1])  # else there would be nothing to learn from what follows

    model, sink = GPT().cuda().to(dtype), Recording()
    optimizer = OPTIMIZERS[name](model.parameters())
    probes = [*all_probes(), WeightProbe(), FormatProbe()]
    with Monitor(
        model, optimizer, every=1, flush_every=1000, sinks=[sink], detector=None, probes=probes
    ) as monitor:
        for i in range(2):  # what is found and laid out once
            monitor.step(i, loss=step(model, optimizer, batches[i]))
        with no_synchronisation():
            for i in range(2, 6):
                monitor.step(i, loss=step(model, optimizer, batches[i]))
    for metric in ("train/-/loss", "activation/layers.0/rms", "update/embedding.weight/rms"):
        assert sink.steps(metric) == list(range(6)), metric
    assert sink.steps("attention/layers.0.attention/score_max") == list(range(6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_summary_is_that_of_the_cpu(dtype: torch.dtype) -> None:
    x = (torch.randn(300, 96, generator=torch.Generator().manual_seed(0)) * 40).to(dtype)
    x[3, 5], x[4, 6] = math.nan, math.inf
    for given in (x, x[10:], torch.zeros(5, 7, dtype=dtype)):
        here, there = (on_device.summarise(one, full=True) for one in (given, given.cuda()))
        for one, other in zip(here, there, strict=True):
            assert one is not None
            assert other is not None
            if one is here[1]:  # bits of magnitudes: a NaN has several
                one, other = one.view(torch.float32), other.view(torch.float32)
            # Squares of channels are sums in the tensor's order, each of at most 300 terms: 300 x 2^-24 = 1.8e-5.
            assert torch.allclose(one.double(), other.cpu().double(), rtol=2e-5, atol=0, equal_nan=True)
        assert here[3] is not None
        assert there[3] is not None
        assert torch.equal(here[3], there[3].cpu())  # counts are exact
        rows = on_device.summarise_alike([given.cuda(), given.cuda()])
        assert torch.allclose(
            rows[:, :7].cpu(), here[0][:7].expand(2, -1), rtol=1e-12, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("correction", [0.3, torch.tensor(0.3)], ids=["number", "tensor"])
def test_small_updates_together_are_each_by_itself(correction: float | torch.Tensor) -> None:
    stepped: list[Stepped] = []
    for n in (1, 64, 64, 300, 5000):
        update = Update(torch.randn(n, device="cuda"))
        first, second, gradient = (torch.randn(n, device="cuda") for _ in range(3))
        where = correction.cuda() if isinstance(correction, torch.Tensor) else correction
        moments = AdamMoments(first=first, second=second.square(), correction=where, epsilon=1e-8)
        stepped.append((update, gradient, moments))
    take_before([update for update, _, _ in stepped])
    for update, _, _ in stepped:
        update.weight.mul_(1.01)
    apart = [update.after(gradient, moments) for update, gradient, moments in stepped]
    for one, other in zip(after_all(stepped), apart, strict=True):
        assert torch.allclose(one, other, rtol=1e-6, atol=0)


def test_scores_under_autocast_are_not_rounded() -> None:
    q, k = (torch.randn(2, 4, 64, 32, device="cuda").bfloat16() * 4 for _ in range(2))
    lse = (q.float() @ k.float().mT / math.sqrt(32)).logsumexp(-1)
    plain = fused(lse, q, k)
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(fused(lse, q, k).largest, plain.largest)


def test_numbers_are_those_of_the_cpu() -> None:
    torch.manual_seed(0)
    origin, rows = GPT(), []
    for device in ("cpu", "cuda"):
        model, sink = copy.deepcopy(origin).to(device), Recording()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with Monitor(model, optimizer, every=1, sinks=[sink], detector=None) as monitor:
            monitor.step(0, loss=step(model, optimizer, batch(0).to(device)))
        rows.append(sink.rows)
    assert set(rows[0]) == set(rows[1])
    for key, value in rows[0].items():
        # float32 products in another order; fractions and extremes turn on single elements.
        if key[1].endswith(("/l2", "/rms", "/mean", "/std", "/score_max", "/loss", "/share")):
            assert rows[1][key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
