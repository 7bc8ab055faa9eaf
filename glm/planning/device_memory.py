"""Whether a device can hold a model in training at all: tells before the first tensor is made, instead of a death without a word.

A lower bound by the planner's own count (``memory.py``): weights, gradients and optimizer states of one process, without
activations. A refused model cannot train there at any batch size; one that passes may still be too large.
"""

from __future__ import annotations

import os

import torch

from glm.errors import InputError
from glm.model.config import ModelConfig
from glm.planning.hardware import GIB, GPUS
from glm.planning.layout import Layout
from glm.planning.memory import training_memory
from glm.planning.shape import shape_of


def check_fits(model: ModelConfig, precision: str, device: torch.device) -> None:
    """Refuse a model whose states alone exceed the device's memory.

    Raises:
        InputError: with both numbers, and what to do.
    """
    available = device_memory(device)
    if available is None:
        return
    # The card matters only for its reserved memory, which does not count here.
    gpu = next(iter(GPUS.values()))
    memory = training_memory(shape_of(model), Layout(tensor=1, pipeline=1, data=1), 0, 1, gpu, precision)
    needed = memory.weights + memory.gradients + memory.optimizer
    if needed > available:
        raise InputError(
            f"the model needs {needed / GIB:,.0f} GiB for weights, gradients and optimizer states alone, and "
            f"{'this machine' if device.type == 'cpu' else 'the device'} has {available / GIB:,.0f} GiB: choose a smaller preset, "
            "or spread it over devices (--parallel...; `glm plan` says over how many)"
        )


def device_memory(device: torch.device) -> int | None:
    """The device's memory in bytes; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type != "cpu":
        return None
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows
        return None
