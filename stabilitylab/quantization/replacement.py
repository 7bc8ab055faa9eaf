"""Puts quantized layers in the place of linear ones, and takes them back.

A layer that appears in a model under several paths is one layer: every path gets its quantized twin. A layer that shares its weight
with something else (an output projection tied to the embedding) stays as it is here: quantizing it alone would not save a byte.
vocabulary.py quantizes both together as one matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stabilitylab.models import linear_layers, linear_weight, shared_parameters
from stabilitylab.models.half_storage import is_held
from stabilitylab.quantization.calibrated import needs_moments
from stabilitylab.quantization.input_moments import Moments
from stabilitylab.quantization.schemes import LinearScheme
from stabilitylab.quantization.weight_on_paper import HasWeightOnPaper


def quantizable_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Linear layers with a weight of their own, by path."""
    shared = {name for group in shared_parameters(module) for name in group}
    # A layer under two paths shares its weight only with itself.
    weights: dict[int, set[int]] = {}
    for _, owner in module.named_modules():
        for parameter in owner.parameters(recurse=False):
            weights.setdefault(id(parameter), set()).add(id(owner))
    return {
        path: layer
        for path, layer in linear_layers(module).items()
        if f"{path}.weight" not in shared or len(weights[id(layer.weight)]) == 1
    }


def quantized(
    path: str,
    layer: nn.Module,
    scheme: LinearScheme,
    largest: Tensor | None = None,
    moments: Moments | None = None,
) -> Any:
    """The quantized twin of a linear layer.

    Args:
        path: how errors call it.
        layer: left as it is.
        scheme: of the twin.
        largest: max|x| of each input channel, [K]: for SmoothQuant.
        moments: of its input: for schemes that round for it.

    Raises:
        InputError: its weights are not finite, or what the scheme needs to know of its input is missing.
    """
    bias = layer.bias if isinstance(layer.bias, Tensor) else None
    if needs_moments(scheme):
        calibrated: Any = scheme
        return calibrated.layer(linear_weight(layer), bias=bias, name=path, moments=moments)
    return scheme.layer(linear_weight(layer), bias=bias, largest=largest, name=path)


def put(module: nn.Module, path: str, layer: nn.Module) -> None:
    """Set a layer at a path, and at every other path of the layer that was there."""
    before = module.get_submodule(path)
    if isinstance(layer, HasWeightOnPaper):
        dtype = None if is_held(before) else getattr(getattr(before, "weight", None), "dtype", None)
        layer.computes = layer.computes.to(dtype or torch.float32)
    for name, found in list(module.named_modules(remove_duplicate=False)):
        if found is before:
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, layer)


@contextmanager
def replaced(module: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """The model with other layers in some places; afterwards it is restored."""
    before = {path: module.get_submodule(path) for path in layers}
    try:
        for path, layer in layers.items():
            put(module, path, layer)
        yield
    finally:
        for path, layer in before.items():
            put(module, path, layer)
