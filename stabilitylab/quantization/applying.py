"""Puts a plan's schemes into an open model for good: into linear layers, and into embeddings with the outputs tied to them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from stabilitylab.errors import InputError
from stabilitylab.quantization.replacement import put, quantizable_layers, quantized
from stabilitylab.quantization.schemes import LinearScheme
from stabilitylab.quantization.vocabulary import embedding_matrices


def quantize_layers(
    module: nn.Module, schemes: Mapping[str, LinearScheme], largest: Mapping[str, Tensor] | None = None
) -> None:
    """Quantize layers of a model for good, one after another; each original is let go at once.

    Args:
        module: changed in place.
        schemes: path -> scheme.
        largest: path -> max|x| of each input channel, for SmoothQuant.

    Raises:
        InputError: a path is not a linear layer of the model, or its weights cannot be quantized.
    """
    layers = quantizable_layers(module)
    matrices = embedding_matrices(module) if schemes.keys() - layers.keys() else {}
    for path, scheme in schemes.items():
        if path in matrices:
            meant = matrices[path].scheme(scheme)
            for place, twin in matrices.pop(path).twins(meant).items() if meant is not None else ():
                put(module, place, twin)
            continue
        if path not in layers:
            raise InputError(
                f"{path} is neither a linear layer with a weight of its own nor an embedding here: the plan is for another model"
            )
        put(module, path, quantized(path, layers.pop(path), scheme, (largest or {}).get(path)))
