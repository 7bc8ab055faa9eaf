"""Where in a model to look: linear and norm layers, the blocks of the main branch, materialised attention
scores.

Decided from what every model has: module types and names, and the longest ``ModuleList`` as the stack of
blocks whose outputs are the main branch (residual stream).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn

from stabilitylab.statistics.summary import measurable


def is_linear(module: nn.Module) -> bool:
    """``nn.Linear``, its subclasses, and layers that call themselves so (``ColumnParallelLinear``, HF's
    ``Conv1D``)."""
    name = type(module).__name__
    return isinstance(module, nn.Linear) or name.endswith("Linear") or name == "Conv1D"


def is_norm(module: nn.Module) -> bool:
    """Any layer whose type is called a norm: ``LayerNorm``, ``RMSNorm``, ``LlamaRMSNorm``, ..."""
    return "Norm" in type(module).__name__


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of the longest ``ModuleList`` by path; empty where the model has none of two or more."""
    longest: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > max(1, len(longest)):
            longest = {f"{path}.{i}" if path else str(i): block for i, block in enumerate(module)}
    return longest


def tensor_in(value: Any) -> Tensor | None:
    """The first measurable tensor in a module's input or output: a tensor, or inside a sequence, mapping or
    dataclass."""
    if isinstance(value, Tensor):
        return value if measurable(value) else None
    parts: Iterable[Any]
    if isinstance(value, dict):
        parts = value.values()
    elif isinstance(value, (tuple, list)):
        parts = value
    elif is_dataclass(value) and not isinstance(value, type):
        parts = [getattr(value, field.name) for field in fields(value)]
    else:
        return None
    for part in parts:
        found = tensor_in(part)
        if found is not None:
            return found
    return None
