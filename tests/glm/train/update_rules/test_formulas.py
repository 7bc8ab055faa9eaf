"""Every update rule, kind of decay and rate by group against its formula in float64, and torch's fused AdamW."""

from __future__ import annotations

import pytest

from glm.train.update_rules import RULES, OptimizerConfig
from glm.train.update_rules.config import GuardConfig, RateFactors
from tests.glm.train.update_rules.formulas import (
    FORMULAS,
    RATE,
    SLOW,
    STEPS,
    Net,
    adamw,
    by_formula,
    close,
    history,
    lion,
    trained,
)


@pytest.mark.parametrize("kind", RULES)
def test_every_rule_is_its_formula(kind):
    # A bound that is never met: AdamW too goes through its rule instead of torch's kernel.
    ours, _, _ = trained(OptimizerConfig(kind=kind, clip=1.0, slow=SLOW, guard=GuardConfig(update_norm=1e9)))
    # SOAP's eigenvectors are known to about 2^-24 / (what their eigenvalues differ by, of the largest).
    close(ours, by_formula(FORMULAS[kind], clip=1.0), tolerance=2e-3 if kind == "soap" else 2e-5)


def test_adamws_rule_is_torchs_kernel():
    fused, _, _ = trained(OptimizerConfig())
    rule, _, _ = trained(OptimizerConfig(guard=GuardConfig(update_norm=1e9)))
    close(rule, fused, tolerance=1e-6)


@pytest.mark.parametrize("decay", ["independent", "adamc"])
@pytest.mark.parametrize("update_norm", [0.0, 1e9])
def test_kinds_of_decay(decay, update_norm):
    rates = [RATE * (1 - step / 30) for step in range(STEPS)]
    config = OptimizerConfig(decay=decay, clip=0.0, guard=GuardConfig(update_norm=update_norm))
    ours, _, _ = trained(config, rates=rates, peak=RATE)

    def decayed(name, w, u, share):
        if not share or (decay == "adamc" and name == "projection.weight"):
            return share
        now = share / 0.1
        return now / RATE * 0.1 if decay == "independent" else now * (now / RATE) * 0.1

    close(ours, by_formula(adamw, rate=lambda t: rates[t - 1], decayed=decayed))


def test_cautious_keeps_what_points_the_gradients_way():
    def direction(name, g, memory, t):
        u = lion(name, g, memory, t)
        mask = (u * g > 0).double()
        return u * mask / mask.mean().clamp_min(1e-3)

    ours, _, _ = trained(OptimizerConfig(kind="lion", cautious=True, clip=0.0))
    close(ours, by_formula(direction))


def test_cautious_decay_takes_only_what_the_update_shrinks():
    ours, _, _ = trained(OptimizerConfig(cautious_decay=True, clip=0.0))
    close(ours, by_formula(adamw, decayed=lambda name, w, u, share: share * (u * w > 0).double()))


def test_rates_by_group_and_an_embedding_that_does_not_decay():
    config = OptimizerConfig(
        clip=0.0, decay_embedding=False, rates=RateFactors(embedding=3.0, output=0.5, vectors=2.0, hidden=0.1)
    )
    ours, optimizer, _ = trained(config)
    factors = {"embedding.weight": 3.0, "projection.weight": 0.5, "one.bias": 2.0}
    weights = {name: p.detach().double().clone() for name, p in Net().named_parameters()}
    memory = {name: {} for name in weights}
    for t, gradients in enumerate(history(), 1):
        for name, w in weights.items():
            rate = RATE * factors.get(name, 0.1)
            decay = 0.0 if name in ("embedding.weight", "one.bias") else 0.1
            u = adamw(name, gradients[name].double(), memory[name], t)
            weights[name] = w - rate * decay * w - rate * u
    close(ours, weights)
    assert len(optimizer.param_groups) == 4
