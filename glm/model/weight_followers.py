"""Modules that follow the weights outside the gradient: the engine calls them once per update, at its end."""

from __future__ import annotations

from torch import nn

from glm.model.config import ModelConfig
from glm.model.experts import Experts
from glm.model.spectral import SpectralLinear


def has_followers(config: ModelConfig) -> bool:
    """Whether there is any such module."""
    return config.spectral or config.feed_forward.experts.count > 0


def follow_all(model: nn.Module, *, applied: bool) -> None:
    """Tell every such module that an update was applied, or skipped."""
    for module in model.modules():
        if isinstance(module, SpectralLinear) and applied:
            module.advance()
        elif isinstance(module, Experts):
            module.follow(applied=applied)
