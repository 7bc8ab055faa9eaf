"""Quantized layers as tensors of a safetensors file, and back: their buffers, and a layout that says how to read them.

    layout    {"scheme", "shape", "group", "fingerprint"}

``scheme`` is the one that the stored numbers follow. Reading them does not take how they were rounded to it (GPTQ, AWQ).
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from stabilitylab.errors import InputError
from stabilitylab.formats import Quantized, scaled_format
from stabilitylab.quantization.format_scheme import FormatLinear, FormatScheme
from stabilitylab.quantization.linear import QuantizedLinear
from stabilitylab.quantization.rotated_linear import RotatedLinear
from stabilitylab.quantization.scheme import Scheme
from stabilitylab.quantization.schemes import LinearScheme, RotatedScheme, scheme_of
from stabilitylab.quantization.stored_weight import StoredWeight


def twin_layout(path: str, twin: Any, scheme: str) -> dict[str, Any]:
    """How to read a quantized layer's buffers.

    Raises:
        InputError: the layer is not one of this package's.
    """
    inner = getattr(twin, "layer", twin)
    if not isinstance(inner, (QuantizedLinear, FormatLinear)):
        raise InputError(
            f"{path}: the scheme {scheme} is none of this package's, so its weights have no form on disk: leave it out "
            "of --schemes"
        )
    followed: LinearScheme = inner.scheme
    if isinstance(twin, RotatedLinear):
        followed = RotatedScheme(inner=inner.scheme)
    return {
        "scheme": followed.name,
        "shape": [twin.out_features, twin.in_features],
        "group": inner.group,
        "fingerprint": inner.fingerprint,
    }


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor, in the file's own pages. Each call maps the file anew, so that no tensor keeps another in memory."""
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor


def read_twin(
    file: Path, names: Container[str], path: str, layout: Mapping[str, Any], dtype: torch.dtype
) -> nn.Module:
    """The quantized layer whose tensors' names begin with a path.

    Args:
        file: safetensors.
        names: of its tensors.
        path: of the layer.
        layout: from ``twin_layout``.
        dtype: of the bias.

    Raises:
        InputError: tensors are missing.
    """
    scheme = scheme_of(layout["scheme"])
    if isinstance(scheme, RotatedScheme):
        return RotatedLinear(_unrotated(file, names, f"{path}.layer", scheme.inner, layout, dtype), scheme)
    return _unrotated(file, names, path, scheme, layout, dtype)


def _unrotated(
    file: Path,
    names: Container[str],
    path: str,
    scheme: LinearScheme,
    layout: Mapping[str, Any],
    dtype: torch.dtype,
) -> nn.Module:
    def get(name: str) -> Tensor | None:
        return read_tensor(file, f"{path}.{name}") if f"{path}.{name}" in names else None

    bias = get("bias")
    bias = None if bias is None else bias.to(dtype)
    rows, columns = layout["shape"]
    if isinstance(scheme, FormatScheme) and (codes := get("codes")) is not None:
        stored = Quantized(
            codes=codes,
            scales=get("scales"),
            tensor_scale=get("tensor_scale"),
            format=scaled_format(scheme.weights),
        )
        return FormatLinear(
            stored,
            scheme,
            bias=bias,
            smooth=get("smooth"),
            fingerprint=layout["fingerprint"],
            columns=columns,
        )
    values, scales = get("values"), get("scales")
    if not isinstance(scheme, Scheme) or values is None or scales is None:
        raise InputError(f"the quantized weights of {path} are incomplete: apply the plan again")
    weight = StoredWeight(
        values=values,
        scales=scales,
        zeros=get("zeros"),
        bits=scheme.bits,
        shape=(rows, columns),
        group=layout["group"],
        fingerprint=layout["fingerprint"],
    )
    return QuantizedLinear(weight, scheme, bias=bias, smooth=get("smooth"))
