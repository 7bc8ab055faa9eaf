"""Every rule by its name, and the state that it keeps for a parameter."""

from __future__ import annotations

from collections.abc import Mapping

from glm.train.update_rules.adam import ADAM_ATAN2, ADAMW, ADEMAMIX, LION
from glm.train.update_rules.config import Kind, OptimizerConfig
from glm.train.update_rules.muon import MUON
from glm.train.update_rules.parameter_groups import kind_of, role_of
from glm.train.update_rules.rule import UpdateRule
from glm.train.update_rules.soap import SOAP

RULES: Mapping[Kind, UpdateRule] = {
    "adamw": ADAMW,
    "adam-atan2": ADAM_ATAN2,
    "ademamix": ADEMAMIX,
    "lion": LION,
    "muon": MUON,
    "soap": SOAP,
}


def state_names(config: OptimizerConfig, name: str, dimensions: int) -> tuple[str, ...]:
    """Names of the tensors kept for a parameter, by its name and its number of dimensions."""
    return RULES[kind_of(config, role_of(name, dimensions))].names
