"""Weights against SVD and float64; curvature against exact Hessians; training is the same to the bit."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from stabilitylab import InputError, Monitor, Schedule
from stabilitylab.probes.curvature import CurvatureProbe
from stabilitylab.probes.everything import all_probes
from stabilitylab.probes.weights import WeightProbe
from tests.stabilitylab.gpt import GPT, batch, next_token_loss
from tests.stabilitylab.recording import Recording


def rows(sink):
    """[(step, metric, value)]; an index distinguishes several numbers of one metric."""
    return [
        (step, name if index < 0 else f"{name}[{index}]", value)
        for (step, name, index), value in sink.rows.items()
    ]


def trained(steps, *, probes, model=None, seed=0, **fields):
    torch.manual_seed(seed)
    model = GPT() if model is None else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    sink, seen = Recording(), []
    made = probes(model, seen)
    with Monitor(model, optimizer, every=1, probes=made, sinks=[sink], detector=None, **fields) as monitor:
        for step in range(steps):
            seen[:] = [batch(step)]
            next_token_loss(model, seen[0]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            before = {
                n: (p.detach().double().clone(), p.grad.double().clone()) for n, p in model.named_parameters()
            }
            optimizer.step()
            optimizer.zero_grad()
            monitor.step(step)
    return model, sink, before


def test_weights_against_float64():
    model, sink, before = trained(6, probes=lambda *_: [WeightProbe()])
    last = {name: value for step, name, value in rows(sink) if step == 5}
    for name, p in model.named_parameters():
        (w, g), u = before[name], None
        u = p.detach().double() - w
        found = {s: last[f"weight/{name}/{s}"] for s in ("l2", "cos_gradient_weight", "cos_update_gradient")}
        assert math.isclose(found["l2"], float(w.norm()), rel_tol=1e-5)
        if float(w.norm()) > 0:
            assert abs(found["cos_gradient_weight"] - float((g * w).sum() / g.norm() / w.norm())) < 1e-4
        assert abs(found["cos_update_gradient"] - float((u * g).sum() / u.norm() / g.norm())) < 1e-3
        if w.dim() == 2:
            sigma = float(torch.linalg.svdvals(w)[0])
            # Power iteration is a lower bound, and near it after 22 rounds.
            assert 0.93 * sigma < last[f"weight/{name}/sigma_max"] < sigma * (1 + 1e-5)
            own = last[f"weight/{name}/sigma_max"]
            assert math.isclose(
                last[f"weight/{name}/stable_rank"], float(w.norm()) ** 2 / own**2, rel_tol=1e-4
            )
        else:
            assert f"weight/{name}/sigma_max" not in last
    groups = {k.split("/")[1]: v for k, v in last.items() if k.endswith("group_l2")}
    assert math.isclose(
        math.hypot(*groups.values()),
        math.sqrt(sum(float(w.norm()) ** 2 for w, _ in before.values())),
        rel_tol=1e-5,
    )


def test_power_iteration_finds_the_largest_singular_value_of_a_still_matrix():
    torch.manual_seed(0)
    probe, weight = WeightProbe(), torch.randn(30, 50)
    for _ in range(200):
        sigma = probe._sigma("w", weight)
    np.testing.assert_allclose(float(sigma), float(torch.linalg.svdvals(weight.double())[0]), rtol=1e-5)


def test_a_gradient_before_a_norm_is_at_right_angles_to_the_weight():
    """The loss does not depend on a weight's size where a norm follows over all of its output."""

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(8, 16, bias=False), nn.Linear(16, 1)

        def forward(self, x):
            y = self.first(x)
            return self.last(torch.tanh(y / y.norm()))

    torch.manual_seed(0)
    model, sink = Normed(), Recording()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, every=1, probes=[WeightProbe()], sinks=[sink], detector=None) as monitor:
        for step in range(4):
            (model(torch.randn(6, 8)) ** 2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step(step)
    own = [v for _, name, v in rows(sink) if name == "weight/first.weight/cos_gradient_weight"]
    assert len(own) == 4
    assert max(map(abs, own)) < 1e-4
    down = [v for _, name, v in rows(sink) if name == "weight/first.weight/cos_update_gradient"]
    assert max(down) < -1 + 1e-4


class Quadratic(nn.Module):
    """w'Aw / 2"""

    def __init__(self, curvatures):
        super().__init__()
        self.a = torch.tensor(curvatures, dtype=torch.float32)
        self.w = nn.Parameter(torch.ones(len(curvatures)))

    def forward(self):
        return (self.a * self.w**2).sum() / 2


@pytest.mark.parametrize(("make", "threshold"), [
    (lambda p: torch.optim.AdamW(p, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0), 38 / 1e-3),
    (lambda p: torch.optim.SGD(p, lr=1e-2), 2 / 1e-2),
    (lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9), 3.8 / 1e-2),
])  # fmt: skip
def test_a_quadratic(make, threshold):
    model, sink = Quadratic([1.0, 4.0, 0.5]), Recording()
    optimizer = make(model.parameters())
    probe = CurvatureProbe(lambda: model().backward())
    right = {}
    with Monitor(model, optimizer, every=1, probes=[probe], sinks=[sink], detector=None) as monitor:
        for step in range(5):
            loss = model()
            loss.backward()
            g, state = model.w.grad.double(), optimizer.state.get(model.w, {})
            p = torch.ones_like(g)
            if "exp_avg_sq" in state:
                p = (state["exp_avg_sq"].double() / (1 - 0.99 ** float(state["step"]))).sqrt() + 1e-8
            d = g / p
            right[step] = float((d * model.a.double() * d).sum() / (d * p * d).sum())
            optimizer.step()
            optimizer.zero_grad()
            monitor.step(step)
    found = {(step, name.rpartition("/")[2]): value for step, name, value in rows(sink)}
    for step in range(1, 5):
        assert math.isclose(found[step, "preconditioned"], right[step], rel_tol=2e-3)
        assert math.isclose(found[step, "threshold"], threshold, rel_tol=1e-6)
        assert math.isclose(found[step, "margin"], threshold / found[step, "preconditioned"], rel_tol=1e-6)


@pytest.mark.parametrize("name", ["exp_avg_slow", "Q"])
def test_of_optimizers_that_step_otherwise_nothing_is_told(name):
    """AdEMAMix has a second momentum, SOAP a v in another basis: Adam's bound is not theirs."""
    model, sink = Quadratic([1.0, 4.0, 0.5]), Recording()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    probe = CurvatureProbe(lambda: model().backward())
    with Monitor(model, optimizer, every=1, probes=[probe], sinks=[sink], detector=None) as monitor:
        for step in range(4):
            model().backward()
            optimizer.step()
            optimizer.state[model.w][name] = torch.eye(3) if name == "exp_avg_slow" else [torch.eye(3)] * 2
            optimizer.zero_grad()
            monitor.step(step)
    assert {step for step, metric, _ in rows(sink) if metric.startswith("curvature/")} <= {0}


def test_curvature_against_exact_hessian_products():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
    optimizer, sink = torch.optim.Adam(model.parameters(), lr=1e-2), Recording()
    x, y = torch.randn(32, 6), torch.randn(32, 3)
    parameters = list(model.parameters())
    probe = CurvatureProbe(lambda: ((model(x) - y) ** 2).mean().backward())
    with Monitor(model, optimizer, every=1, probes=[probe], sinks=[sink], detector=None) as monitor:
        for step in range(4):
            loss = ((model(x) - y) ** 2).mean()
            g = torch.autograd.grad(loss, parameters, create_graph=True)
            if step == 3:
                p = [(optimizer.state[w]["exp_avg_sq"] / (1 - 0.999**3)).sqrt() + 1e-8 for w in parameters]
                d = [a.detach() / b for a, b in zip(g, p, strict=True)]
                h = torch.autograd.grad(g, parameters, d, retain_graph=True)
                right = sum(float((a * b).sum()) for a, b in zip(h, d, strict=True)) / sum(
                    float((a * b * a).sum()) for a, b in zip(d, p, strict=True)
                )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step(step)
    (found,) = [v for step, name, v in rows(sink) if step == 3 and name == "curvature/-/preconditioned"]
    assert math.isclose(found, right, rel_tol=0.02)


def test_training_is_the_same_to_the_bit_and_other_probes_do_not_see_the_pass():
    class Dropping(GPT):
        def forward(self, tokens):
            return nn.functional.dropout(super().forward(tokens), 0.2)

    def everything(model, seen):
        backward = CurvatureProbe(lambda: next_token_loss(model, seen[0]).backward())
        return [*all_probes(), WeightProbe(), backward]

    torch.manual_seed(1)
    plain, sink, _ = trained(5, probes=lambda *_: all_probes(), model=Dropping(), seed=1)
    torch.manual_seed(1)
    watched, more, _ = trained(5, probes=everything, model=Dropping(), seed=1)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    theirs = [(s, n, v) for s, n, v in rows(more) if not n.startswith(("weight/", "curvature/"))]
    assert [(s, n) for s, n, _ in theirs] == [(s, n) for s, n, _ in rows(sink)]
    np.testing.assert_array_equal([v for *_, v in theirs], [v for *_, v in rows(sink)])
    assert [s for s, n, _ in rows(more) if n == "curvature/-/margin"] == [1, 2, 3, 4]


def test_each_has_its_own_cadence():
    def two(model, seen):
        return [WeightProbe(), CurvatureProbe(lambda: next_token_loss(model, seen[0]).backward())]

    schedule = Schedule(every=0, probes={"weights": 2, "curvature": 3})
    _, sink, _ = trained(7, probes=two, schedule=schedule)
    assert sorted({s for s, n, _ in rows(sink) if n.startswith("weight/")}) == [0, 2, 4, 6]
    assert sorted({s for s, n, _ in rows(sink) if n.startswith("curvature/")}) == [3, 6]


def test_at_risk_is_told_once_and_only_where_it_is_asked_for():
    """SGD on w'Aw / 2 with A = 100 and rates around 2 / 100: the margin is 2 / (100 rate)."""
    told = {}
    for at_risk in (None, 1.0):
        model, sink = Quadratic([100.0]), Recording()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        probe = CurvatureProbe(lambda model=model: model().backward(), at_risk=at_risk)
        with Monitor(model, optimizer, every=1, probes=[probe], sinks=[sink], detector=None) as monitor:
            for step, rate in enumerate((0.015, 0.03, 0.015, 0.03, 0.03, 0.03, 0.015, 0.03, 0.03)):
                optimizer.param_groups[0]["lr"] = rate
                model().backward()
                optimizer.step()
                optimizer.zero_grad()
                monitor.step(step)
        told[at_risk] = [
            (event.step, round(event.data["margin"], 2)) for event in sink.events if event.kind == "at-risk"
        ]
    assert told == {None: [], 1.0: [(4, 0.67), (8, 0.67)]}
    with pytest.raises(InputError, match="is a margin"):
        CurvatureProbe(lambda: None, at_risk=0.0)
