"""A planned model as a folder of compressed-tensors, which transformers and vLLM open: ``--apply OUT --format compressed-tensors``.

    scheme                          format                   tensors of layer P beside P.bias
    int8-row, int4-row, int4-gG     pack-quantized           weight_packed int32, weight_scale, weight_shape [, weight_zero_point]
    w8a8-token, w8a8-channel        int-quantized            weight int8 [N, K], weight_scale [N, 1]
    w8a8-tensor                     int-quantized            weight int8, weight_scale [1]
    fp8-e4m3-{row,tensor,block128}  float-quantized          weight E4M3, weight_scale [N, 1], [1], [N / 128, K / 128]
    mxfp8-e4m3                      mxfp8-quantized          weight E4M3, weight_scale uint8 [N, K / 32]
    mxfp4                           mxfp4-pack-quantized     weight_packed uint8 [N, K / 2], weight_scale uint8 [N, K / 32]
    nvfp4                           nvfp4-pack-quantized     the same with E4M3 [N, K / 16], weight_global_scale, its inverse

Activations are dynamic: scaled by the token, or by the tile of 128, at run time. int4 codes lie eight in a word, the first lowest,
each plus 8. The export refuses what has no such form: rotations, SmoothQuant, mixed decomposition, schemes of your own, experts
that were taken apart.

Source: compressed-tensors 0.20 (``quantization/quant_args.py``, ``compressors/``), with which the test opens the folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from stabilitylab.errors import InputError
from stabilitylab.formats import pack_4bit
from stabilitylab.models import TextModel
from stabilitylab.models.weight_checks import narrowest
from stabilitylab.quantization.export_forms import card, no_form, refuse_embeddings, refuse_layers
from stabilitylab.quantization.format_scheme import FormatLinear, FormatScheme
from stabilitylab.quantization.linear import QuantizedLinear
from stabilitylab.quantization.plan import QuantizationPlan
from stabilitylab.quantization.replacement import quantizable_layers, quantized
from stabilitylab.quantization.scheme import Scheme
from stabilitylab.quantization.serialization import copy_companions, new_folder, unquantized_tensors

NAME = "compressed-tensors"
_TOKEN = {"num_bits": 8, "strategy": "token", "symmetric": True, "dynamic": True}
# Format of the weights -> compressed-tensors' format, its arguments for weights, for activations of the same format.
_FLOATS: Mapping[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "fp8-e4m3-tensor": ("float-quantized", {"strategy": "tensor"}, "fp8-e4m3-row", {"strategy": "token"}),
    "fp8-e4m3-row": ("float-quantized", {"strategy": "channel"}, "fp8-e4m3-row", {"strategy": "token"}),
    "fp8-e4m3-block128": (
        "float-quantized",
        {"strategy": "block", "block_structure": [128, 128]},
        "fp8-e4m3-tile128",
        {"strategy": "group", "group_size": 128},
    ),
    "mxfp8-e4m3": (
        "mxfp8-quantized",
        {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
        "mxfp8-e4m3",
        {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    ),
    "mxfp4": (
        "mxfp4-pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
        "mxfp4",
        {"num_bits": 4, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    ),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {"num_bits": 4, "strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"},
        "",
        {},
    ),
}


@dataclass(kw_only=True)
class _Group:
    """Layers that are stored alike: an entry of ``config_groups``."""

    format: str
    weights: dict[str, Any]
    activations: dict[str, Any] | None = None
    targets: list[str] = field(default_factory=list)

    def entry(self) -> dict[str, Any]:
        return {
            "targets": self.targets,
            "weights": {"num_bits": 8, "symmetric": True, "dynamic": False, **self.weights},
            "input_activations": self.activations,
            "output_activations": None,
            "format": self.format,
        }


def save_compressed_tensors(model: TextModel, plan: QuantizationPlan, out: Path) -> int:
    """Write a model quantized by a plan; returns the bytes of its weights file.

    Args:
        model: the original, of transformers; unchanged.
        plan: made for this model.
        out: folder to make.

    Raises:
        InputError: ``out`` already exists, the plan is for another model, or a scheme has no form in compressed-tensors.
    """
    plan.require(model.fingerprint, model.name)
    refuse_layers(model, NAME)
    refuse_embeddings(model, plan, NAME)
    with new_folder(out) as partial:
        copy_companions(model, partial)
        tensors, groups = _tensors(model, plan)
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        size = (partial / "model.safetensors").stat().st_size
        _write_config(partial / "config.json", groups, plan)
        plan.write(partial / "plan.json")
        (partial / "QUANTIZATION.md").write_text(card(plan, NAME), encoding="utf-8")
    return size


def _tensors(model: TextModel, plan: QuantizationPlan) -> tuple[dict[str, Tensor], list[_Group]]:
    layers = quantizable_layers(model.module)
    tensors: dict[str, Tensor] = {}
    groups: dict[str, _Group] = {}
    for path, scheme in plan.schemes.items():
        twin = quantized(path, layers[path], scheme)
        if isinstance(twin, QuantizedLinear):
            held, group = _integers(path, twin, scheme.name)
        elif isinstance(twin, FormatLinear):
            held, group = _floats(path, twin, scheme.name)
        else:
            raise no_form(path, scheme.name, NAME, twin)
        tensors |= {f"{path}.{name}": tensor.contiguous() for name, tensor in held.items()}
        if twin.bias is not None:
            tensors[f"{path}.bias"] = narrowest(twin.bias)
        groups.setdefault(scheme.name, group).targets.append(path)
    return tensors | unquantized_tensors(model.module, plan.schemes), list(groups.values())


def _integers(path: str, twin: QuantizedLinear, called: str) -> tuple[dict[str, Tensor], _Group]:
    scheme: Scheme = twin.scheme
    stored = twin.stored
    if twin.smooth is not None or scheme.threshold is not None:
        raise no_form(path, called, NAME, twin)
    if scheme.activations is not None:
        if scheme.activations == "tensor" and scheme.share != "tensor":
            strategy, activations = "channel", {**_TOKEN, "strategy": "tensor"}
        else:
            strategy = "tensor" if scheme.share == "tensor" else "channel"
            activations = {**_TOKEN, "strategy": scheme.activations}
        scale = stored.scales.reshape(1) if strategy == "tensor" else stored.scales
        group = _Group(
            format="int-quantized",
            weights={"type": "int", "strategy": strategy},
            activations={**activations, "type": "int"},
        )
        return {"weight": stored.values, "weight_scale": scale}, group
    codes = stored.codes().to(torch.int32)
    held = {
        "weight_packed": _packed(codes, scheme.bits),
        "weight_scale": stored.scales,
        "weight_shape": torch.tensor(stored.shape, dtype=torch.int64),
    }
    weights: dict[str, Any] = {"num_bits": scheme.bits, "type": "int", "symmetric": not scheme.asymmetric}
    if scheme.share == "row":
        weights["strategy"] = "channel"
    else:
        if stored.shape[1] % stored.group:
            raise InputError(
                f"{path} has {stored.shape[1]} columns, which groups of {stored.group} do not fill: {NAME} needs whole groups"
            )
        weights |= {"strategy": "group", "group_size": stored.group}
    if stored.zeros is not None:
        held["weight_zero_point"] = _packed(stored.zeros.to(torch.int32).T, scheme.bits).T
    return held, _Group(format="pack-quantized", weights=weights)


def _floats(path: str, twin: FormatLinear, called: str) -> tuple[dict[str, Tensor], _Group]:
    scheme: FormatScheme = twin.scheme
    known = _FLOATS.get(scheme.weights)
    stored = twin.stored
    if (
        known is None
        or twin.smooth is not None
        or stored.scales is None
        or scheme.activations not in (None, known[2])
    ):
        raise no_form(path, called, NAME, twin)
    format, weights, _, activations = known
    scales = stored.scales
    if scales.dtype == torch.float8_e8m0fnu:
        scales = scales.view(torch.uint8)
    elif scheme.weights == "fp8-e4m3-tensor":
        scales = scales.reshape(1)
    if stored.format.element.bits == 4:
        if twin.in_features % 2:
            raise no_form(path, called, NAME, twin)
        held = {"weight_packed": pack_4bit(stored.codes), "weight_scale": scales}
        if stored.tensor_scale is not None:
            held["weight_global_scale"] = (1.0 / stored.tensor_scale).reshape(1)
    else:
        held = {"weight": stored.codes.view(torch.float8_e4m3fn), "weight_scale": scales}
    group = _Group(format=format, weights={"type": "float", **weights})
    if scheme.activations is not None:
        group.activations = {
            "num_bits": 8,
            "type": "float",
            "symmetric": True,
            "dynamic": True,
            **activations,
        }
    return held, group


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Codes [n, K] below 2^bits, 32 / bits in a word of 32 bits, the first lowest; [n, ceil(K bits / 32)]."""
    each = 32 // bits
    spare = -codes.shape[1] % each
    parts = torch.nn.functional.pad(codes.to(torch.int64), (0, spare)).view(codes.shape[0], -1, each)
    words = (parts << (bits * torch.arange(each))).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _write_config(file: Path, groups: list[_Group], plan: QuantizationPlan) -> None:
    config = json.loads(file.read_text(encoding="utf-8"))
    formats = {group.format for group in groups}
    config["quantization_config"] = {
        "quant_method": NAME,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": group.entry() for i, group in enumerate(groups)},
        "ignore": [*(path for path, layer in plan.layers.items() if layer.scheme is None), *plan.kept],
        "kv_cache_scheme": None,
    }
    file.write_text(json.dumps(config, indent=2), encoding="utf-8")
