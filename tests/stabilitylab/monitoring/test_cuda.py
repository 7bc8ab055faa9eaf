"""On an accelerator: nobody waits for it outside of a flush, and its numbers are those of the CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from stabilitylab import Monitor
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
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def step(model: GPT, optimizer: torch.optim.Optimizer, tokens_BT: torch.Tensor) -> torch.Tensor:
    loss = next_token_loss(model, tokens_BT)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def test_no_step_waits_for_the_device() -> None:
    batches = [batch(i).cuda() for i in range(6)]
    bare = GPT().cuda()
    optimizer = torch.optim.AdamW(bare.parameters())
    step(bare, optimizer, batches[0])
    with no_synchronisation():
        step(bare, optimizer, batches[1])  # else there would be nothing to learn from what follows

    model, sink = GPT().cuda(), Recording()
    optimizer = torch.optim.AdamW(model.parameters())
    with Monitor(model, optimizer, every=1, flush_every=1000, sinks=[sink], detector=None) as monitor:
        for i in range(2):  # what is found and laid out once
            monitor.step(i, loss=step(model, optimizer, batches[i]))
        with no_synchronisation():
            for i in range(2, 6):
                monitor.step(i, loss=step(model, optimizer, batches[i]))
    for metric in ("train/-/loss", "activation/layers.0/rms", "update/embedding.weight/rms"):
        assert sink.steps(metric) == list(range(6)), metric
    assert sink.steps("attention/layers.0.attention/score_max") == list(range(6))


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
