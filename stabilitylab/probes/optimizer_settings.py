"""Which entries of an optimizer's parameter groups are settings, and which are state that the optimizer keeps there.

torch's optimizers keep their state apart from the groups. Others keep some of it in the groups and change it at every step:
schedule-free AdamW its counter ``k`` and its ``weight_sum``, Prodigy and D-Adaptation their distance ``d`` with the sums behind it.
There a change means nothing, and whoever puts it back breaks the optimizer. What a user sets goes through the constructor, so

    settings = arguments of the constructor, and the names that torch's own optimizers use (a wrapper's groups are its inner one's)
"""

from __future__ import annotations

import inspect
from typing import Any

USUAL = frozenset(
    {"lr", "betas", "eps", "weight_decay", "momentum", "dampening", "alpha", "rho", "lambd", "etas"}
)
_NEVER = ("self", "params")


def setting_names(optimizer: Any) -> frozenset[str]:
    """Names that settings have in this optimizer's parameter groups."""
    try:
        arguments = inspect.signature(type(optimizer)).parameters
    except (TypeError, ValueError):  # it cannot be told
        return USUAL
    return USUAL.union(arguments).difference(_NEVER)
