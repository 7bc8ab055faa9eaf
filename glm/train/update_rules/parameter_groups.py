"""Which rule, rate and decay a parameter has: a function of its name and number of dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from glm.train.update_rules.config import Kind, OptimizerConfig

Role = Literal["embedding", "output", "vectors", "hidden"]


def role_of(name: str, dimensions: int) -> Role:
    """A parameter's role in the model, by its name and its number of dimensions (the whole's, for a share)."""
    if dimensions < 2:
        return "vectors"
    if name in ("embedding.weight", "positions"):
        return "embedding"
    return "output" if name == "projection.weight" else "hidden"


def kind_of(config: OptimizerConfig, role: Role) -> Kind:
    """The rule of a parameter."""
    return config.kind if role == "hidden" or config.kind not in ("muon", "soap") else "adamw"


def decay_of(config: OptimizerConfig, role: Role) -> float:
    """The weight decay of a parameter."""
    if role == "vectors" or (role == "embedding" and not config.decay_embedding):
        return 0.0
    return config.weight_decay


def rate_factor(config: OptimizerConfig, role: Role) -> float:
    """The factor on its learning rate."""
    factor: float = getattr(config.rates, role)
    return factor


def grouped(
    config: OptimizerConfig, dimensions: Mapping[str, int], factors: Mapping[str, float]
) -> list[tuple[dict[str, Any], tuple[str, ...]]]:
    """Parameters that share rule, decay and rate: the settings of each group, and their names.

    Args:
        dimensions: how many each parameter has, by its name.
        factors: on the rates of single parameters; they divide those parameters' decay.
    """
    untied = "projection.weight" in dimensions
    found: dict[tuple[Kind, float, float, bool], list[str]] = {}
    for name, count in dimensions.items():
        role = role_of(name, count)
        # AdamC leaves the output projection, which no norm follows, to AdamW's decay.
        leads_out = config.decay == "adamc" and role == ("output" if untied else "embedding")
        own = factors.get(name, 1.0)
        decay, rate = decay_of(config, role) / own, rate_factor(config, role) * own
        key = kind_of(config, role), decay, rate, leads_out
        found.setdefault(key, []).append(name)
    names = "rule", "weight_decay", "rate_factor", "leads_out"
    return [(dict(zip(names, key, strict=True)), tuple(own)) for key, own in found.items()]
