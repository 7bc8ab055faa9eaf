"""How gradients become updates: one pure function per rule, and what all rules share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from glm.train.update_rules.config import Kind, OptimizerConfig
from stabilitylab.lazy_names import lazy_names

if TYPE_CHECKING:
    from glm.train.update_rules.rule import State as State
    from glm.train.update_rules.rule import Tensors as Tensors
    from glm.train.update_rules.rule import UpdateRule as UpdateRule
    from glm.train.update_rules.table import RULES as RULES
    from glm.train.update_rules.table import state_names as state_names

# Imported on first use: presets are configurations, and planning with them must not load torch.
_PUBLIC = {
    "RULES": "glm.train.update_rules.table",
    "State": "glm.train.update_rules.rule",
    "Tensors": "glm.train.update_rules.rule",
    "UpdateRule": "glm.train.update_rules.rule",
    "state_names": "glm.train.update_rules.table",
}
__all__ = ["RULES", "Kind", "OptimizerConfig", "State", "Tensors", "UpdateRule", "state_names"]

__getattr__, __dir__ = lazy_names(__name__, __all__, _PUBLIC)
