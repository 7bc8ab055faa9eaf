"""The linear layers of a model, its shared weights, and a fingerprint that tells one model from another.

A linear layer is ``nn.Linear``, its subclasses, and the layer with which GPT-2 and its like compute the same thing from a
transposed weight: transformers' ``Conv1D``, y = x W + b with W [in, out], known here by its shape of interface so that
transformers need not be installed. ``nn.MultiheadAttention``'s output projection is left out: torch reads its weight and
never calls it, so neither a hook nor a replacement would take effect.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

_SAMPLE = 64


@runtime_checkable
class Conv1D(Protocol):
    """What transformers' ``Conv1D`` has: weight [in, out], bias [out], and ``nf``, the number of outputs."""

    weight: nn.Parameter
    bias: nn.Parameter
    nf: int


def linear_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer by its path, in the model's own order; one used under several paths comes once."""
    return {path: layer for path, layer in module.named_modules() if _is_linear(layer)}


def linear_weight(layer: nn.Module) -> Tensor:
    """A linear layer's weight as [out, in]; for ``Conv1D`` a transposed view."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight if isinstance(layer, nn.Linear) else weight.T


def _is_linear(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Linear):
        return type(layer).__name__ != "NonDynamicallyQuantizableLinear"
    return type(layer).__name__ == "Conv1D" and isinstance(layer, Conv1D) and layer.weight.dim() == 2


def shared_parameters(module: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Groups of parameter names that are one tensor: ``(("embed_tokens.weight", "lm_head.weight"),)``."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return tuple(tuple(several) for several in names.values() if len(several) > 1)


def first_nonfinite(module: nn.Module) -> str | None:
    """The name of a parameter or buffer with a NaN or an infinity in it; None where there is none.

    Infinite buffers are usual (masks), so of those only NaN counts.
    """
    for name, parameter in module.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            return name
    for name, buffer in module.named_buffers():
        if buffer.is_floating_point() and bool(torch.isnan(buffer).any()):
            return name
    return None


def fingerprint(module: nn.Module) -> str:
    """The fingerprint of a model's parameters: see ``fingerprint_of``."""
    return fingerprint_of(sorted(module.named_parameters()))


def fingerprint_of(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """16 hexadecimal digits over parameter names, shapes, and 64 evenly spaced values of each parameter, in order of names.

    Values count in bfloat16, so that the same model opened in float32 and in bfloat16 is the same model. (Opened in
    float16 it may differ: values are then rounded twice.) Two fine-tunings of one model differ, unless every sampled value
    agrees to 8 bits. Parameters may come one by one, so a model need not fit into memory.
    """
    digest = hashlib.sha256()
    for name, parameter in parameters:
        flat = parameter.detach().reshape(-1)
        at = torch.linspace(0, max(0, flat.numel() - 1), min(_SAMPLE, flat.numel()), dtype=torch.float64)
        values = flat[at.round().long()].to("cpu", torch.bfloat16).view(torch.int16)
        digest.update(f"{name} {tuple(parameter.shape)} ".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:16]
