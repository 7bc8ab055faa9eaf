"""A fork lacks to the bit what it goes without, and all else is as it was."""

import copy
import math

import numpy as np
import pytest
import torch

from stabilitylab.attribution import LoopState, Without
from stabilitylab.attribution.delta_debugging import smallest
from stabilitylab.attribution.fork_verdicts import HALVES, NOTHING, PREVENTS, Yardstick, verdict, yardstick
from stabilitylab.attribution.forks import Forks, Usual
from stabilitylab.attribution.module_interventions import AttentionCalls, BoundScores, bounded, largest_scores
from stabilitylab.attribution.observation import Observation
from stabilitylab.errors import InputError
from tests.stabilitylab.attribution.loops import Loop

BEGIN = 5


def begun(**fields):
    loop = Loop(**fields)
    for step in range(BEGIN):
        loop.train_step(step)
    forks = Forks(loop, LoopState.of(loop, BEGIN))
    seen = Observation(BEGIN, BEGIN + 2)
    forks.control(6, seen)
    forks.usual = Usual.of(seen)
    forks.yardstick = Yardstick(
        begin=BEGIN, onset=BEGIN, end=BEGIN + 1, base=0, noise=1, height=100, area=100
    )
    return loop, forks


def after(loop, forks, without):
    """Weights and moments after one step."""
    assert not forks.train(without).error
    moments = {
        (name, key): value.clone()
        for name, p in loop.model.named_parameters()
        for key, value in loop.optimizer.state[p].items()
    }
    return {name: p.detach().clone() for name, p in loop.model.named_parameters()}, moments


def test_a_control_repeats_the_original_whatever_was_trained_before_it():
    loop = Loop(dropout=0.3)
    for step in range(BEGIN):
        loop.train_step(step)
    state = LoopState.of(loop, BEGIN)
    original = [loop.train_step(step) for step in range(BEGIN, BEGIN + 6)]
    forks = Forks(loop, state)
    watched = forks.control(6, Observation(BEGIN, BEGIN + 3))
    forks.usual = Usual.of(Observation(BEGIN, BEGIN))
    forks.yardstick = Yardstick(begin=BEGIN, onset=8, end=11, base=0, noise=1, height=100, area=100)
    forks.train(Without(kind="rate"))
    assert watched == original == forks.control(6)


def test_what_is_held_keeps_weight_and_moments_and_the_rest_moves_as_it_did():
    loop, forks = begun()
    before = copy.deepcopy(forks.state.state["model"])
    weights, moments = after(loop, forks, Without())
    held = ("layers.0.up.weight", "embed.weight")
    own, own_moments = after(loop, forks, Without(kind="updates", sites=held))
    others, _ = after(loop, forks, Without(kind="other updates", sites=held))
    for name in weights:
        still = before[name]
        assert torch.equal(own[name], still if name in held else weights[name])
        assert torch.equal(others[name], weights[name] if name in held else still)
    assert all(torch.equal(own_moments[k], moments[k]) for k in moments if k[0] not in held)
    assert not torch.equal(own_moments["embed.weight", "exp_avg"], moments["embed.weight", "exp_avg"])


def test_rows_of_a_table_stand_still_and_the_others_move_as_they_did():
    loop, forks = begun()
    before = forks.state.state["model"]["embed.weight"].clone()
    weights, _ = after(loop, forks, Without())
    own, moments = after(loop, forks, Without(kind="rows of updates", sites=("embed.weight",), rows=(3, 5)))
    rows = [row for row in range(len(before)) if row not in (3, 5)]
    assert torch.equal(own["embed.weight"][[3, 5]], before[[3, 5]])
    assert torch.equal(own["embed.weight"][rows], weights["embed.weight"][rows])
    index = list(loop.model.state_dict()).index("embed.weight")
    kept = forks.state.state["optimizer"]["state"][index]["exp_avg"]
    assert torch.equal(moments["embed.weight", "exp_avg"][[3, 5]], kept[[3, 5]])


def test_half_the_rate_halves_the_step_and_leaves_the_optimizer_as_it_was():
    loop, forks = begun()
    before = forks.state.state["model"]["layers.1.down.bias"].clone()
    whole = after(loop, forks, Without())[0]["layers.1.down.bias"] - before
    half = after(loop, forks, Without(kind="rate"))[0]["layers.1.down.bias"] - before
    assert loop.optimizer.param_groups[0]["lr"] == 1e-2
    torch.testing.assert_close(half, whole / 2, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["stale moments", "past of moments", "past of momentum"])
def test_moments_against_float64(kind):
    """One AdamW step by hand, with v or m renewed or the update over max(1, RMS_t)."""
    loop, forks = begun()
    forks.state.state["optimizer"]["state"][0]["exp_avg_sq"].mul_(1e-4)  # of the embedding: v lags behind
    gradient = {}
    handle = loop.optimizer.register_step_pre_hook(
        lambda *_: gradient.update({n: p.grad.double().clone() for n, p in loop.model.named_parameters()})
    )
    old = forks.state.state["model"]["embed.weight"].double()
    state = {k: v.double() for k, v in forks.state.state["optimizer"]["state"][0].items()}
    new = after(loop, forks, Without(kind=kind))[0]["embed.weight"].double()
    handle.remove()
    g, t = gradient["embed.weight"], BEGIN + 1
    m = 0.9 * state["exp_avg"] + 0.1 * g
    v = 0.95 * state["exp_avg_sq"] + 0.05 * g**2
    corrected = g**2 if kind == "past of moments" else v / (1 - 0.95**t)
    mean = g if kind == "past of momentum" else m / (1 - 0.9**t)
    step = 1e-2 * (mean / (corrected.sqrt() + 1e-8) + 1e-2 * old)
    rms = float((g**2 / corrected.clamp_min(1e-16)).mean().sqrt())
    assert kind != "stale moments" or rms > 2
    bound = max(1.0, rms) if kind == "stale moments" else 1.0
    torch.testing.assert_close(new, old - step / bound, rtol=1e-4, atol=1e-6)


def test_gradients_are_bounded_by_norm_and_by_tensor():
    loop, forks = begun()
    norms = []
    for kind, sites in (("norm", ()), ("tensor norms", ("head.weight",))):
        forks.usual.gradients["head.weight"] = 1e-3
        seen = {}
        # Hooked after the act's own hook, so it sees what the optimizer gets.
        act = forks._act(Without(kind=kind, sites=sites))
        act._bound = 0.01
        forks.state.put_into(loop)
        forks.subject.acts = True
        loop.optimizer.zero_grad()
        loop.model(loop.batch(BEGIN)[:, :-1]).square().sum().backward()
        act.before(forks.subject, loop.optimizer)
        seen = {name: float(p.grad.norm()) for name, p in loop.model.named_parameters()}
        norms.append(seen)
    assert math.isclose(math.hypot(*norms[0].values()), 0.01, rel_tol=1e-5)
    assert math.isclose(norms[1]["head.weight"], 1.05e-3, rel_tol=1e-5)
    assert norms[1]["embed.weight"] > 1


def test_a_batch_is_left_out_and_data_are_others():
    loop, forks = begun()
    asked = []
    train = loop.train_step
    loop.train_step = lambda index: asked.append(index) or train(index)
    forks.yardstick = Yardstick(begin=BEGIN, onset=8, end=9, base=0, noise=1, height=100, area=100)
    forks.train(Without(kind="batch", rows=(6,)))
    forks.train(Without(kind="data", rows=(7,)))
    assert asked == [5, 7, 8, 9, 5, 6, 6, 5]


def test_bounded_and_scores():
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    x[0, 0] = math.inf
    assert math.isclose(float(bounded(x, 0.1).square().mean().sqrt()), 0.1, rel_tol=1e-5)
    q, k, v = (torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    right = (q.double() @ k.double().transpose(-2, -1)).abs().amax(dim=(0, 2, 3)) / 8**0.5
    np.testing.assert_allclose(largest_scores(q, k, 8**-0.5).numpy(), right.numpy(), rtol=1e-5)
    seen = []
    with AttentionCalls(lambda number, q, k, scale: seen.append((number, scale)) or q / 2):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q / 2, k, v))
    assert seen == [(0, 8**-0.5)]
    act = BoundScores({0: right.float() / 4})
    act._subject = type("S", (), {"acts": True})()
    clipped = act._shrink(0, q, k, 8**-0.5)
    torch.testing.assert_close(largest_scores(clipped, k, 8**-0.5), (right / 2).float())


def test_fp32_inside_a_half_precision_layer():
    loop, forks = begun()
    module = torch.nn.Linear(64, 64).bfloat16()
    loop.model.extra = module
    x = torch.randn(8, 64).bfloat16()
    called = []
    module.register_forward_hook(lambda *_: called.append(1))
    act = forks._act(Without(kind="rounding", sites=("extra",)))
    act.install(forks.subject)
    forks.subject.acts = True
    wide = module(x)
    act.remove()
    assert called == [1]  # its own hooks, once
    right = torch.nn.functional.linear(x.float(), module.weight.float(), module.bias.float())
    assert torch.equal(wide, right.bfloat16())
    assert "forward" not in module.__dict__


def test_verdicts():
    quiet, spike = [2.0, 2.01, 1.99, 2.0, 2.01, 1.99, 2.0, 2.01], [4.0, 3.0, 2.4, 2.0, 2.0, 2.0, 2.0]
    of = yardstick(quiet + spike, 10, 18)
    assert of.end == 18 + 3 + 3
    assert math.isclose(of.height, 4 - of.base)
    for values, word in (
        (quiet + [2.0] * 6, PREVENTS),
        (quiet + [2.4, 2.1, 2.0, 2.0], PREVENTS),
        (quiet + [2.9, 2.4, 2.2], HALVES),
        (quiet + [3.2], NOTHING),
        ([3.5], NOTHING),  # earlier than the original
        (quiet + [math.nan], NOTHING),
    ):
        assert verdict(of, values).word == word, values
    lost = yardstick([*quiet, math.inf, math.nan], 10, 18)
    assert verdict(lost, [*quiet, 2.1]).word == PREVENTS
    assert verdict(lost, [*quiet, 2.9]).word == HALVES
    assert verdict(lost, [*quiet, math.nan]).word == NOTHING


@pytest.mark.parametrize("size", [1, 2, 7, 16, 33])
def test_smallest_against_every_subset_that_is_needed(size):
    """The least set of a monotone test is unique: delta debugging finds it."""
    dice = np.random.default_rng(size)
    for _ in range(20):
        needed = set(dice.choice(size, dice.integers(1, min(size, 4) + 1), replace=False).tolist())
        asked = []

        def holds(several, needed=needed, asked=asked):
            asked.extend(several)
            return [needed <= set(one) for one in several]

        assert set(smallest(range(size), holds)) == needed
        assert len(asked) <= size**2 + 3 * size
    assert smallest(range(size), lambda several: [False] * len(several)) == tuple(range(size))


def test_a_loop_that_lacks_something_is_named():
    class Nothing:
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    with pytest.raises(InputError, match=r"has no state_dict\(\)"):
        Forks(Nothing(), None)
    loop = Loop()
    loop.optimizer = None
    with pytest.raises(InputError, match=r"has no \.optimizer"):
        Forks(loop, None)
    loop = Loop()
    loop.optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    with pytest.raises(InputError, match="updates none"):
        Forks(loop, None)


@pytest.mark.parametrize(
    ("rates", "jumps"),
    [
        ([0.1, 0.2, 0.3, 0.4, 0.5], []),  # a warm-up
        ([0.1, 0.1, 0.1, 0.3, 0.3], [3]),
        ([0.1, 0.1, 0.1, 0.01, 0.01], [3]),
        ([1.0, 1.09, 1.19, 1.3, 1.4], []),
    ],
)
def test_a_rate_jumps_and_a_schedule_does_not(rates, jumps):
    seen, before, found = Observation(0, 3), [{"lr": rates[0]}], []
    for step, rate in enumerate(rates[1:], start=1):
        if seen._jumped(before, [{"lr": rate}]):
            found.append(step)
        before = [{"lr": rate}]
    assert found == jumps


@pytest.mark.parametrize(
    ("norms", "outputs", "quiet"),
    [
        ([1.0, 1.4, 0.8], [2.0, 2.0, 2.1], True),
        ([1.0, 1.4, 30.0], [2.0, 2.0, 2.1], False),
        ([1.0, 1.4, 0.8], [2.0, float("nan"), 2.1], False),
        ([1.0, 1.4, 0.8], [0.0, 0.0, 5.0], True),  # what has not begun yet
    ],
)
def test_first_steps_in_which_something_happens_are_not_usual(norms, outputs, quiet):
    seen = Observation(10, 16)
    seen.gradients["weight"] = dict(enumerate(norms, start=10))
    # A bias that attention does not feel: its gradient is rounding alone, and may grow a hundredfold.
    seen.gradients["key.bias"] = {10: 1e-9, 11: 1e-7, 12: 1e-8}
    seen.outputs["layer"] = dict(enumerate([*outputs, 50.0], start=10))
    assert seen.is_quiet() is quiet
