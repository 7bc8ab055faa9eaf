"""What users do with a watched model: copy it, save it, move its memory, transform it, use it for something else."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from stabilitylab import Monitor
from tests.stabilitylab.gpt import GPT, batch, next_token_loss
from tests.stabilitylab.recording import Recording


def watched(model: nn.Module, **options: object) -> tuple[Monitor, Recording, torch.optim.Optimizer]:
    optimizer, sink = torch.optim.SGD(model.parameters(), lr=0.1), Recording()
    return Monitor(model, optimizer, every=1, sinks=[sink], detector=None, **options), sink, optimizer  # type: ignore[arg-type]


def pickled(model: nn.Module) -> nn.Module:
    found: nn.Module = pickle.loads(pickle.dumps(model))
    return found


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    found: nn.Module = torch.load(file, weights_only=False)
    return found


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved, torch.optim.swa_utils.AveragedModel])
def test_copies_are_not_watched(copied: Callable[[nn.Module], nn.Module]) -> None:
    """A copy made before a measured step works, and the monitor does not take its passes for the model's."""
    torch.manual_seed(0)
    model = GPT()
    monitor, sink, optimizer = watched(model)
    twin = copied(model)
    next_token_loss(model, batch(0)).backward()
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(100)
    next_token_loss(twin, batch(0)).backward()
    optimizer.step()
    monitor.step(0)
    monitor.close()
    alone = Recording()
    torch.manual_seed(0)
    model = GPT()
    monitor = Monitor(model, None, every=1, sinks=[alone], detector=None)
    next_token_loss(model, batch(0)).backward()
    monitor.step(0)
    monitor.close()
    seen = {row: value for row, value in sink.rows.items() if row[1].startswith(("activation", "attention"))}
    assert seen == pytest.approx({row: alone.rows[row] for row in seen}, nan_ok=True)
    assert len(seen) > 100


def test_a_pickle_holds_nothing_of_ours() -> None:
    model = GPT()
    monitor, _, _ = watched(model)
    assert b"stabilitylab.probes" not in pickle.dumps(model)
    monitor.close()


def reassigning(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """An optimizer's step and then an exchange of the memory, as averages of weights do."""
    optimizer.step()
    for p in model.parameters():
        p.data = p.data.clone()


def in_double(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    model.double()


@pytest.mark.parametrize("change", [reassigning, in_double])
def test_updates_follow_the_weights_into_other_memory(
    change: Callable[[nn.Module, torch.optim.Optimizer], None],
) -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 8, bias=False)
    monitor, sink, optimizer = watched(model)
    expected = []
    for step in range(3):
        x = torch.randn(4, 8, dtype=model.weight.dtype)
        model(x).square().sum().backward()
        before = model.weight.detach().double().clone()
        change(model, optimizer)
        expected.append(float((model.weight.detach().double() - before).square().mean().sqrt()))
        optimizer.zero_grad()
        monitor.step(step)
    monitor.close()
    found = [sink.rows[step, "update/weight/rms", -1] for step in range(3)]
    assert found == pytest.approx(
        expected, rel=1e-4
    )  # weights of float32 change by a hundredth of themselves


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q = self.inner(x_BTD).view(*x_BTD.shape[:2], 2, 4).transpose(1, 2)
        return scaled_dot_product_attention(q, q, q).sum()


def lost(sink: Recording) -> list[object]:
    return [event.data for event in sink.events if event.kind == "telemetry-lost"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_attention_of_other_formats(dtype: torch.dtype) -> None:
    model = Attending().to(dtype)
    monitor, sink, _ = watched(model)
    model(torch.randn(2, 5, 8, dtype=dtype)).backward()
    monitor.step(0)
    monitor.close()
    assert not lost(sink)
    assert len(sink.vector(0, "attention//score_max")) == 2


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # vmap of fused attention
def test_passes_that_do_not_count_disable_nothing() -> None:
    """A pass under inference_mode that was not told to be one, and gradients of each sample by torch.func."""
    model = Attending()
    monitor, sink, optimizer = watched(model)
    x = torch.randn(2, 5, 8)
    for step in range(2):
        with torch.inference_mode():
            model(100 * x)
        parameters = dict(model.named_parameters())

        def loss(parameters: dict[str, Tensor], one: Tensor) -> Tensor:
            found: Tensor = torch.func.functional_call(model, parameters, one[None])
            return found

        torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
        model(x).backward()
        optimizer.step()
        optimizer.zero_grad()
        monitor.step(step)
    monitor.close()
    assert not lost(sink)
    for metric in ("activation/inner/absmax", "activation_gradient/inner/absmax", "attention//score_max"):
        assert sink.steps(metric) == [0, 1], metric
    assert sink.rows[0, "activation/inner:input/absmax", -1] == x.abs().max()


class HandingOn(nn.Module):
    """A block whose output is its own parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.prompt


def test_a_parameter_handed_on_keeps_no_hooks() -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList([HandingOn(), HandingOn()])})
    monitor, _, _ = watched(model)
    for step in range(3):
        sum(block(torch.ones(1)).sum() for block in model["blocks"]).backward()  # type: ignore[union-attr]
        monitor.step(step)
    assert not model["blocks"][0].prompt._backward_hooks  # type: ignore[index]
    monitor.close()


def test_sparse_adam() -> None:
    torch.manual_seed(0)
    model = nn.Embedding(50, 4, sparse=True)
    optimizer, sink = torch.optim.SparseAdam(model.parameters(), lr=0.1), Recording()
    monitor = Monitor(model, optimizer, every=1, sinks=[sink], detector=None)
    for step in range(12):
        # The number of rows that have a gradient is another at every step.
        model(torch.arange(1 + step)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        monitor.step(step)
        if step == 1:
            size = monitor.nbytes
    assert monitor.nbytes == size
    monitor.close()
    assert not lost(sink)
    assert sink.rows[0, "update/weight/rms", -1] > 0
    assert [len(sink.vector(step, "gradient/weight/top_row")) for step in range(12)] == [
        *range(1, 9),
        8,
        8,
        8,
        8,
    ]
