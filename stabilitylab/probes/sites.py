"""Where in a model to look: linear and norm layers, the blocks of the residual stream, materialised attention
scores.

Decided from what every model has: module types and names, and the longest ``ModuleList`` as the stack of
blocks whose outputs are the residual stream (residual stream).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stabilitylab.errors import InputError
from stabilitylab.statistics.summary import measurable

# Attributes under which wrappers (torch.compile, FSDP, activation checkpointing) keep the module they wrap.
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def clean(path: str) -> str:
    """The path of a module or parameter as it would be without wrappers."""
    return ".".join(part for part in path.split(".") if part not in _WRAPPED)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside wrappers of ``torch.compile``, FSDP, activation checkpointing."""
    while True:
        inner = next((module._modules[name] for name in _WRAPPED if name in module._modules), None)
        if inner is None:
            return module
        module = inner


def bare(model: nn.Module) -> nn.Module:
    """The model itself, without DDP and other wrappers around it. Raises InputError where it is no module."""
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}: the monitor attaches to a torch.nn.Module")
    while True:
        inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else unwrapped(model)
        if inner is model:
            return model
        model = inner


def named_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by path, with wrappers left out of the paths; a tied one under its first name."""
    return {clean(name): parameter for name, parameter in model.named_parameters()}


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Like ``model.named_modules()``, with wrappers left out of the walk and of the paths."""
    for path, module in model.named_modules():
        if unwrapped(module) is module:
            yield clean(path), module


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
    for path, module in named_modules(model):
        if isinstance(module, nn.ModuleList) and len(module) > max(1, len(longest)):
            longest = {f"{path}.{i}" if path else str(i): unwrapped(block) for i, block in enumerate(module)}
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


def watched(model: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """Path, module, and whether it is a linear or norm layer (else a block), of all whose activations are
    watched."""
    residual_stream = {id(block) for block in blocks(model).values()}
    for path, module in named_modules(model):
        layer = is_linear(module) or is_norm(module)
        if layer or id(module) in residual_stream:
            yield path, module, layer


def counts(module: nn.Module) -> bool:
    """Whether a forward pass running now is one of training, and not the second one of activation
    recomputation.

    Recomputation happens inside the backward pass, where the autograd engine has a graph task; an evaluation
    runs without gradients in evaluation mode.
    """
    training = module.training or torch.is_grad_enabled()
    return training and torch._C._current_graph_task_id() == -1 and not torch.is_inference_mode_enabled()
