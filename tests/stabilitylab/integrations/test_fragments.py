"""A flat optimizer seen part by part: what each part has, and that the work of a step grows with the parts, not their square."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabilitylab import Monitor
from stabilitylab.integrations import deepspeed_fragments
from stabilitylab.integrations.deepspeed_fragments import FragmentedOptimizer
from tests.stabilitylab.recording import Recording


def flat_of(sizes: list[int], padding: int = 3) -> tuple[Tensor, dict[str, Tensor]]:
    flat = torch.arange(float(sum(sizes) + padding)).requires_grad_()
    begins = [sum(sizes[:i]) for i in range(len(sizes))]
    return flat, {
        f"{i}": flat.detach()[b : b + n] for i, (b, n) in enumerate(zip(begins, sizes, strict=True))
    }


def test_each_part_has_its_own_state_and_group() -> None:
    (first, of_first), (second, of_second) = flat_of([2, 5, 1]), flat_of([4])
    optimizer = torch.optim.Adam([{"params": [first], "lr": 0.1}, {"params": [second], "lr": 0.2}])
    parts = {**of_first, **{f"s{name}": part for name, part in of_second.items()}}
    fragments = FragmentedOptimizer(optimizer, parts)
    first.grad, second.grad = torch.arange(11.0), torch.ones(7)
    seen: dict[str, Tensor] = {}
    fragments.register_step_pre_hook(
        lambda o, *_: seen.update({n: p.grad.clone() for n, p in o.parts.items()})
    )
    optimizer.step()
    assert [[p.tolist() for p in g["params"]] for g in fragments.param_groups] == [
        [fragments.parts[name].tolist() for name in names] for names in (("0", "1", "2"), ("s0",))
    ]
    assert seen["1"].tolist() == [2, 3, 4, 5, 6]
    state = fragments.state
    assert torch.equal(state[fragments.parts["1"]]["exp_avg"], optimizer.state[first]["exp_avg"][2:7])
    assert state[fragments.parts["s0"]]["exp_avg"].shape == (4,)


@pytest.mark.parametrize("count", [10, 40])
def test_the_work_of_a_measured_step_is_linear(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cuts = 0

    def counted(*args: Any) -> Tensor:
        nonlocal cuts
        cuts += 1
        return cut(*args)

    cut = deepspeed_fragments._cut
    flat, parts = flat_of([4] * count)
    optimizer = torch.optim.Adam([flat])
    fragments, sink = FragmentedOptimizer(optimizer, parts), Recording()
    monitor = Monitor(
        nn.Linear(1, 1),
        fragments,  # type: ignore[arg-type]
        parameters=fragments.parts,
        every=1,
        sinks=[sink],
        detector=None,
    )
    monkeypatch.setattr(deepspeed_fragments, "_cut", counted)
    flat.grad = torch.ones_like(flat)
    optimizer.step()
    monitor.step(0)
    monitor.close()
    assert len([name for _, name, _ in sink.rows if name.endswith("/second_moment_l2")]) == count
    # Its gradient, for each hook that looks at it (two), and its two moments.
    assert cuts == 4 * count
