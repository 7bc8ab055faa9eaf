"""Plans keep their budget, are verified, are never worse than one scheme everywhere, and fit no other model."""

from __future__ import annotations

import json

import pytest
import torch

from stabilitylab.errors import InputError
from stabilitylab.quantization.latency import KEPT
from stabilitylab.quantization.page import _trade
from stabilitylab.quantization.plan import Budget, PlanFigures, PlannedLayer, QuantizationPlan, load_plan
from stabilitylab.quantization.plan_search import Advisor, reason
from stabilitylab.quantization.ranges import ChannelRange
from stabilitylab.quantization.sensitivity import Effect, LayerSensitivity, measure_sensitivity
from stabilitylab.quantization.verification import Twins, Verification
from tests.stabilitylab.quantization.folders import TEXT

BATCHES = (1, 32)


def latencies(layers, names):
    """Made-up seconds: by shape, so that every layer has some; fewer bytes are quicker."""
    speed = {name: 1.0 + at for at, name in enumerate([*names, KEPT])}
    return {
        layer.shape: {name: {batch: speed[name] * batch for batch in BATCHES} for name in speed}
        for layer in layers
    }


@pytest.fixture
def advisor(model, windows, inputs, schemes):
    with torch.inference_mode():
        layers = measure_sensitivity(model, windows[:1], schemes, inputs.largest)
    twins = Twins(model.module, inputs.largest)
    verification = Verification(model, list(model.windows([TEXT[400:]], 32, 64)), twins)
    return Advisor(layers, latencies(layers, [scheme.name for scheme in schemes]), verification)


@pytest.mark.parametrize(
    "budget",
    [
        Budget(kind="memory", value=0.35),
        Budget(kind="memory", value=0.6),
        Budget(kind="latency", value=0.5, batch=32),
        Budget(kind="loss", value=0.02),
        Budget(kind="loss", value=0.0),
    ],
    ids=lambda budget: f"{budget.kind} {budget.value}",
)
def test_a_plan_keeps_its_budget_and_loses_to_no_single_scheme(advisor, budget):
    advice = advisor.advise(budget)
    planned, kept = advice.planned, advice.singles[KEPT]
    spent = {
        "memory": planned.bytes / kept.bytes,
        "latency": planned.seconds[32] / kept.seconds[32],
        "loss": planned.loss,
    }
    assert spent[budget.kind] <= budget.value
    for name, single in advice.singles.items():
        if name != KEPT and single.bytes <= planned.bytes and budget.allows(single, kept):
            assert planned.loss <= single.loss
    # What is told of the plan is that of its assignment.
    assert planned == advisor.outcome(advice.assignment)


def test_a_budget_that_cannot_be_met(advisor):
    with pytest.raises(InputError, match=r"cannot be met: the cheapest schemes take 0\.\d+"):
        advisor.advise(Budget(kind="memory", value=0.1))
    with pytest.raises(InputError, match="at batch 1, 32, not 256"):
        advisor.advise(Budget(kind="latency", value=0.5, batch=256))


class Surprising:
    """A verification in which harms do not add up: any mixture of schemes is bad."""

    loss = 1.0

    def measure(self, schemes):
        names = {scheme.name for scheme in schemes.values()}
        return 0.0 if not names else 0.1 if len(names) == 1 else 0.5


def test_where_harms_do_not_add_up_one_scheme_is_the_plan():
    layers = [
        LayerSensitivity(
            path=path,
            shape=(8, 8),
            range=ChannelRange(channels=8, outliers=0, ratio=2.0, largest=1.0),
            effects={
                "int8-row": Effect(error=0.01, harm=eight, loss=0.0, bytes=64),
                "w8a8-token": Effect(error=0.01, harm=other, loss=0.0, bytes=64),
            },
        )
        for path, eight, other in (("a", 0.0, 1.0), ("b", 1.0, 0.0))
    ]
    advisor = Advisor(layers, latencies(layers, ["int8-row", "w8a8-token"]), Surprising())
    advice = advisor.advise(Budget(kind="memory", value=0.5))
    assert len(set(advice.assignment.values())) == 1
    assert advice.planned.loss == 0.1
    assert "everywhere" in advice.notes[-1]


def test_reasons_are_told_in_numbers():
    layer = LayerSensitivity(
        path="down",
        shape=(576, 1536),
        range=ChannelRange(channels=1536, outliers=3, ratio=62.3, largest=187.0),
        effects={
            "w8a8-token": Effect(error=0.31, harm=0.02, loss=0.0, bytes=1000),
            "mixed": Effect(error=0.07, harm=0.0011, loss=0.0, bytes=1000),
            "int4-row": Effect(error=0.2, harm=0.5, loss=0.0, bytes=500),
        },
    )
    assert reason(layer, "mixed", "loss") == (
        "3 channels of 1536 hold up to 62x the median; mixed error 0.07 (0.0011 nats), w8a8-token 0.31 (0.02), "
        "int4-row 0.2 (0.5): mixed"
    )
    assert reason(layer, "int4-row", "loss").endswith("mixed 0.07 (0.0011) at 2.0x the bytes: int4-row")
    assert reason(layer, KEPT, "loss").endswith("even mixed costs 0.0011 nats: left as it is")


def plan(**changes):
    outcome = PlanFigures(bytes=100, seconds={1: 0.5, 32: 1.0}, loss=0.01, schemes={"mixed": 1})
    fields = {
        "model": "mine",
        "fingerprint": "0123456789abcdef",
        "criterion": "loss",
        "loss": 2.0,
        "budget": Budget(kind="memory", value=0.5),
        "tokens": (10, 20),
        "machine": "this",
        "layers": {
            "a": PlannedLayer(scheme="smoothquant", reason="why", smooth=[0.1, 1e-30, 3.0]),
            "b": PlannedLayer(scheme=None, reason="because"),
        },
        "kept": {"head": "tied"},
        "planned": outcome,
        "singles": {KEPT: outcome, "mixed": outcome},
        "notes": ["one"],
        "sensitivity": {},
        "latency": {},
    }
    return QuantizationPlan(**{**fields, **changes})


def test_losses_near_zero_are_drawn_between_round_ticks():
    made = PlanFigures(bytes=100, seconds={1: 0.5, 32: 1.0}, loss=5.3e-5, schemes={"mixed": 1})
    (axes,) = _trade(plan(planned=made, singles={KEPT: made}), "loss").axes
    assert axes.get_ylim() == (-1e-3, 1e-3)
    (axes,) = _trade(plan(), "loss").axes  # a loss of .01
    assert axes.get_ylim()[1] > 0.01


def test_a_plan_is_its_file(tmp_path):
    made = plan()
    made.write(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == made
    assert set(made.schemes) == {"a"}
    assert made.best_single is None  # 100 bytes of 100 are not within a budget of half
    assert plan(budget=Budget(kind="loss", value=0.02)).best_single is not None
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data.pop("layers"), "missing or broken"),
        (lambda data: data.update(version=2), "a plan of version 2"),
        (lambda data: data.update(format="else"), "is not a plan"),
        (lambda data: data["layers"]["a"].update(scheme="int3-row"), "no scheme 'int3-row'"),
        (lambda data: data["budget"].update(value=-1), "must be a number of at least 0"),
    ],
)
def test_broken_plans_are_refused(tmp_path, change, said):
    file = tmp_path / "plan.json"
    plan().write(file)
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))
    with pytest.raises(InputError, match=said):
        load_plan(file)


def test_what_is_no_plan_is_refused(tmp_path):
    (tmp_path / "text").write_text("no JSON")
    for file in (tmp_path / "text", tmp_path / "missing", tmp_path):
        with pytest.raises(InputError, match="plan"):
            load_plan(file)


def test_another_models_plan_is_refused():
    with pytest.raises(InputError, match=r"made for mine \(fingerprint 0123456789abcdef\), not for yours"):
        plan().require("fedcba9876543210", "yours")


def test_layers_of_a_group_have_one_scheme(advisor, model, windows, inputs, schemes):
    """The best common scheme of each group by trying all of them, where bytes bind."""
    groups = {path: path.rpartition(".")[0] for path in inputs.largest}
    with torch.inference_mode():
        layers = measure_sensitivity(model, windows[:1], schemes, inputs.largest)
    names = [scheme.name for scheme in schemes]
    grouped = Advisor(layers, latencies(layers, names), advisor._verification, groups)
    budget = Budget(kind="memory", value=0.45)
    found = grouped.advise(budget)
    assert budget.allows(found.planned, found.singles[KEPT])
    chosen = {}
    for path, name in found.assignment.items():
        chosen.setdefault(groups[path], set()).add(name)
    assert all(len(names) == 1 for names in chosen.values())
    assert set(found.assignment) == {layer.path for layer in layers}
    harms, costs = grouped._harms(), grouped._costs(budget)
    assert len(harms) == len(costs) == len(chosen) < len(layers)
    assert sum(row[0] for row in costs) == sum(layer.effects[names[0]].bytes for layer in layers)
    assert sum(row[1] for row in harms) == pytest.approx(
        sum(layer.effects[names[1]].harm for layer in layers)
    )
