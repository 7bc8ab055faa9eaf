"""Under torch.compile: one graph with no more breaks than the bare model's, and the numbers of the uncompiled run."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from stabilitylab import Monitor
from stabilitylab.monitoring import optimizers
from stabilitylab.probes.compiled import is_compiled, watchers
from tests.stabilitylab.gpt import GPT, batch, next_token_loss
from tests.stabilitylab.recording import Recording

# The compiler's own imports and internals, not ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]
counters = torch._dynamo.utils.counters


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def same(model: nn.Module) -> nn.Module:
    return model


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="aot_eager")  # type: ignore[return-value]


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="aot_eager")
    return model


def by_block(model: nn.Module) -> nn.Module:
    for i, block in enumerate(model.layers):
        model.layers[i] = torch.compile(block, backend="aot_eager")
    return model


def run(
    wrap: Callable[[nn.Module], nn.Module], *, attach: int | None, every: int = 1, steps: int = 4
) -> Recording:
    """Train for some steps, attaching the monitor before step ``attach``."""
    torch.manual_seed(0)
    inner, sink = GPT(), Recording()
    model = wrap(inner)
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
    monitor: Monitor | None = None
    for step in range(steps):
        if step == attach:
            monitor = Monitor(model, optimizer, every=every, sinks=[sink], detector=None)
            monitor.start_step(step)
        next_token_loss(model, batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if monitor is not None:
            monitor.step(step)
    if monitor is not None:
        monitor.close()
    assert not watchers
    return sink


FAMILIES = ("attention/", "activation/", "activation_gradient/", "gradient/", "update/")


@pytest.mark.parametrize(("wrap", "attach"), [(compiled, 2), (in_place, 0), (by_block, 0), (by_block, 2)])
def test_numbers_are_those_of_the_uncompiled_run(wrap: Callable[[nn.Module], nn.Module], attach: int) -> None:
    expected = {k: v for k, v in run(same, attach=attach).rows.items() if k[1].startswith(FAMILIES)}
    found = {k: v for k, v in run(wrap, attach=attach).rows.items() if k[1].startswith(FAMILIES)}
    assert set(found) == set(expected)
    for key, value in expected.items():
        # aot_eager runs the same kernels; sums of gradients may be formed in another order.
        assert found[key] == pytest.approx(value, rel=1e-3, abs=1e-6, nan_ok=True), key


def test_one_graph_and_no_break_more_than_the_bare_model() -> None:
    every = 2
    run(compiled, attach=None)
    bare = dict(counters["stats"]), dict(counters["graph_break"])
    assert bare[0]["unique_graphs"] == 1
    torch._dynamo.reset()
    counters.clear()
    sink = run(compiled, attach=0, every=every)
    assert sink.steps("activation/layers.1/rms") == list(range(0, 4, every))
    assert counters["stats"]["unique_graphs"] == 1
    assert dict(counters["graph_break"]) == bare[1] == {}


def test_full_graph_is_possible() -> None:
    sink = run(lambda m: torch.compile(m, backend="aot_eager", fullgraph=True), attach=0)  # type: ignore[arg-type, return-value]
    assert sink.steps("activation_gradient/layers.0/rms") == [0, 1, 2, 3]


class TwoNames(nn.Module):
    """A model that is PyTorch's own container, which the compiler enters differently."""

    def __new__(cls) -> nn.Module:  # type: ignore[misc]
        return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))


@pytest.mark.parametrize(
    "order", ["compile, attach", "attach, compile", "compile, run, attach", "attach, run, compile"]
)
@pytest.mark.parametrize("every", [1, 2])
def test_the_compiled_model_may_have_another_name(order: str, every: int) -> None:
    """``fast = torch.compile(model)``, and the monitor was given ``model``: nothing breaks and, from the second measured step at
    the latest, everything is seen."""
    torch.manual_seed(0)
    model = TwoNames()
    optimizer, sink, x = torch.optim.SGD(model.parameters(), lr=0.1), Recording(), torch.randn(4, 8)
    fast: nn.Module = model
    monitor: Monitor | None = None
    for verb in order.split(", "):
        if verb == "compile":
            fast = torch.compile(model, backend="aot_eager", fullgraph=True)  # type: ignore[assignment]
        elif verb == "run":
            fast(x).sum().backward()
            optimizer.zero_grad()
        else:
            monitor = Monitor(model, optimizer, every=every, sinks=[sink], detector=None)
    assert monitor is not None
    for step in range(8):
        fast(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        monitor.step(step)
    monitor.close()
    assert not counters["graph_break"]
    for metric in ("activation/1/rms", "activation_gradient/0/rms", "gradient/2.weight/l2"):
        assert sink.steps(metric)[-3:] == list(range(0, 8, every))[-3:], metric


def test_what_is_compiled_is_known_without_a_search() -> None:
    """Compiled anew, from a copy or a pickle, in any thread; and forgotten with its last reference."""
    model = TwoNames()
    assert not is_compiled(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gc.get_objects", lambda: pytest.fail("all objects were searched again"))
        fast = torch.compile(model, backend="eager")
        assert is_compiled(model)
        assert not is_compiled(TwoNames())
        other = copy.deepcopy(fast)
        assert is_compiled(other._orig_mod)  # type: ignore[attr-defined]
        with ThreadPoolExecutor(1) as pool:
            third = pool.submit(torch.compile, TwoNames(), backend="eager").result()
        assert is_compiled(third._orig_mod)
        del fast
        gc.collect()
        assert not is_compiled(model)


def test_where_nothing_is_noted_all_is_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that sets its modules up in another way."""
    monkeypatch.setattr("stabilitylab.compat._asked", False)
    monkeypatch.setattr("stabilitylab.compat._note_what_is_made", lambda kind: False)
    model = TwoNames()
    assert not is_compiled(model)
    fast = torch.compile(model, backend="eager")
    assert is_compiled(model), fast


@pytest.mark.slow
def test_weights_are_bit_identical_under_inductor() -> None:
    weights = []
    for watched in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        inner = GPT()
        model = torch.compile(inner)
        optimizer = torch.optim.AdamW(inner.parameters(), lr=1e-2)
        monitor = Monitor(model, optimizer, every=2, detector=None) if watched else None  # type: ignore[arg-type]
        for step in range(4):
            next_token_loss(model, batch(step)).backward()  # type: ignore[arg-type]
            optimizer.step()
            optimizer.zero_grad()
            if monitor is not None:
                monitor.step(step)
        if monitor is not None:
            monitor.close()
        weights.append(inner.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("known", [True, False], ids=["before the monitor", "after it"])
def test_a_compiled_optimizers_step(
    known: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The compiler breaks its graph at the hooks; one that is first imported after the monitor was made is noticed after a step."""

    def trained(*, compile_step: bool, watch: bool) -> tuple[list[torch.Tensor], Recording]:
        torch.manual_seed(0)
        model, sink = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 2)), Recording()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        monitor = Monitor(model, optimizer, every=2, sinks=[sink], detector=None) if watch else None
        step_optimizer = optimizer.step
        if compile_step:
            step_optimizer = torch.compile(optimizer.step, backend="eager")
        for step in range(5):
            model(torch.randn(4, 8)).square().mean().backward()
            step_optimizer()
            optimizer.zero_grad()
            if monitor is not None:
                monkeypatch.undo()
                monitor.step(step)
        if monitor is not None:
            monitor.close()
        return list(model.parameters()), sink

    _, plain = trained(compile_step=False, watch=True)
    expected, _ = trained(compile_step=True, watch=False)
    if not known:
        monkeypatch.setattr(optimizers, "compiler_is_imported", lambda: False)
    found, sink = trained(compile_step=True, watch=True)
    assert all(map(torch.equal, found, expected))
    assert not sink.events
    assert not [text for text in caplog.messages if "no parameter had a gradient" in text]
    for step in (0, 2, 4) if known else (2, 4):
        for metric in ("gradient/0.weight/l2", "update/0.weight/rms", "train/-/learning_rate"):
            assert sink.rows[step, metric, -1] == pytest.approx(plain.rows[step, metric, -1], rel=1e-3)
