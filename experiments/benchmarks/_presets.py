"""Presets of ``glm train`` without data: with a vocabulary where they leave it open."""

from __future__ import annotations

import dataclasses
from typing import Any

from glm.commands.train import preset_config
from glm.train.config import TrainConfig


def preset(name: str, vocabulary: int, **changes: Any) -> TrainConfig:
    """The preset with ``changes`` to fields of the training configuration.

    Raises:
        InputError: there is no such preset.
    """
    config = preset_config(name)
    model = config.model
    if model.vocabulary is None:
        model = dataclasses.replace(model, vocabulary=vocabulary)
    return dataclasses.replace(config, model=model, **changes)
