"""The sites of a model's activations: linear and norm layers, embeddings, and the blocks of the residual stream.

``stabilitylab.model_structure`` says what a linear layer, an embedding, a block is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stabilitylab.compat import in_backward
from stabilitylab.model_structure import blocks, is_embedding, is_linear, is_norm, named_modules
from stabilitylab.statistics.summary import measurable


def tensor_in(value: Any) -> Tensor | None:
    """The first measurable tensor in a module's input or output: itself, or inside a sequence, mapping or dataclass."""
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
    """For each watched module: its path, the module, and whether it is a linear or norm layer (else an embedding or a block, of
    which only the output counts)."""
    residual_stream = {id(block) for block in blocks(model).values()}
    for path, module in named_modules(model):
        layer = is_linear(module) or is_norm(module)
        if layer or is_embedding(module) or id(module) in residual_stream:
            yield path, module, layer


def counts(module: nn.Module) -> bool:
    """Whether the forward pass running now is one of training, and not the second one of activation recomputation.

    Recomputation happens inside the backward pass, where the autograd engine has a graph task; an evaluation runs without gradients
    in evaluation mode.
    """
    training = module.training or torch.is_grad_enabled()
    return training and not in_backward() and not torch.is_inference_mode_enabled()
