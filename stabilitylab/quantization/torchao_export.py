"""A planned model as torchao's own quantized tensors: ``--apply OUT --format torchao``.

    scheme                              tensor of torchao               holds
    int8-row, int4-gG[-asym], ...       IntxUnpackedToInt8Tensor        int8 codes, a scale and a zero point a group
    w8a8-token, w8a8-channel-bytoken    Int8Tensor                      int8 codes, a scale a row; activations by the token
    fp8-e4m3-row, fp8-e4m3-tensor       Float8Tensor                    E4M3 codes, fp32 scales
    nvfp4                               NVFP4Tensor                     two E2M1 codes a byte, E4M3 scales, one of the tensor

They lie in a safetensors file as torchao flattens them, and its ``unflatten_tensor_state_dict`` makes them again; the card says
how. int4 takes a byte a weight here: none of torchao 0.18's packings of our schemes computes on a CPU. Its MX tensors compute with
rounded activations alone, so the export refuses weights in MXFP8 and MXFP4; rotations, SmoothQuant and ``mixed`` have no form.

Source: torchao 0.18 (``quantization``, ``prototype/mx_formats``, ``prototype/safetensors``), with which the tests open the folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from stabilitylab.errors import InputError
from stabilitylab.formats import pack_4bit
from stabilitylab.models import TextModel
from stabilitylab.models.weight_checks import narrowest
from stabilitylab.quantization.export_forms import card, holders, no_form, refuse_embeddings, refuse_layers
from stabilitylab.quantization.format_scheme import FormatLinear
from stabilitylab.quantization.plan import QuantizationPlan
from stabilitylab.quantization.replacement import quantizable_layers, quantized
from stabilitylab.quantization.serialization import copy_companions, new_folder, unquantized_tensors

NAME, FILE = "torchao", "model.safetensors"
HOW = (
    "Open it: `from safetensors import safe_open; from torchao.prototype.safetensors.safetensors_support import "
    "unflatten_tensor_state_dict; from transformers import AutoConfig, AutoModelForCausalLM`, then "
    '`file = safe_open("FOLDER/model.safetensors", "pt"); state, _ = unflatten_tensor_state_dict({n: file.get_tensor(n) for n in '
    "file.keys()}, file.metadata()); model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained('FOLDER')); "
    "model.load_state_dict(state, strict=False, assign=True); model.tie_weights()`."
)


def save_torchao(model: TextModel, plan: QuantizationPlan, out: Path) -> int:
    """Write a model quantized by a plan; returns the bytes of its weights file.

    Args:
        model: the original, of transformers; unchanged.
        plan: made for this model.
        out: folder to make.

    Raises:
        InputError: torchao is missing, ``out`` already exists, the plan is for another model, or a scheme has no form in torchao.
    """
    require_torchao()
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    plan.require(model.fingerprint, model.name)
    refuse_layers(model, NAME)
    refuse_embeddings(model, plan, NAME)
    layers = quantizable_layers(model.module)
    with new_folder(out) as partial:
        copy_companions(model, partial)
        others = unquantized_tensors(model.module, plan.schemes)
        dtype = _common(list(others.values()))
        state: dict[str, Tensor] = {name: tensor.to(dtype) for name, tensor in others.items()}
        for path, scheme in plan.schemes.items():
            twin = quantized(path, layers[path], scheme)
            state[f"{path}.weight"] = tensor_of(path, twin, dtype, scheme.name)
            if twin.bias is not None:
                state[f"{path}.bias"] = twin.bias.to(dtype)
        tensors, metadata = flatten_tensor_state_dict(state)
        save_file(
            {n: t.contiguous() for n, t in tensors.items()},
            partial / FILE,
            metadata={"format": "pt", **metadata},
        )
        size = (partial / FILE).stat().st_size
        plan.write(partial / "plan.json")
        notes = (
            HOW,
            f"The file has {size:,} bytes: int4 takes a byte a weight in torchao's tensors for a CPU.",
        )
        (partial / "QUANTIZATION.md").write_text(card(plan, NAME, notes), encoding="utf-8")
    return size


def require_torchao() -> None:
    """Raises InputError where torchao is missing, or too old to write its tensors."""
    try:
        import torchao.prototype.safetensors.safetensors_support  # noqa: F401
    except ImportError:
        raise InputError(
            "--format torchao needs the package torchao, 0.18 or newer: pip install torchao"
        ) from None


def tensor_of(path: str, twin: Any, dtype: torch.dtype, called: str) -> Tensor:
    """torchao's tensor of a quantized layer's weight [N, K], which computes in ``dtype``; ``called`` is its scheme in the plan.

    Raises:
        InputError: there is none.
    """
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
    from torchao.quantization import Float8Tensor, Int8Tensor, IntxUnpackedToInt8Tensor, PerRow
    from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

    if NAME not in holders(twin):
        raise no_form(path, called, NAME, twin)
    rows, columns = twin.out_features, twin.in_features
    made: Tensor
    if isinstance(twin, FormatLinear):
        stored = twin.stored
        assert stored.scales is not None
        if twin.scheme.weights == "nvfp4":
            if columns % 16:
                raise no_form(path, called, NAME, twin, f"{columns} columns are not whole blocks of 16")
            made = NVFP4Tensor(
                pack_4bit(stored.codes), stored.scales, 16, dtype, per_tensor_scale=stored.tensor_scale
            )
            return made
        block = [rows, columns] if stored.scales.numel() == 1 else [1, columns]
        scales = stored.scales.reshape(1, 1) if stored.scales.numel() == 1 else stored.scales
        made = Float8Tensor(stored.codes.view(torch.float8_e4m3fn), scales, block, dtype=dtype)
        return made
    weight, scheme = twin.stored, twin.scheme
    signed = (weight.codes().to(torch.int16) - 2 ** (weight.bits - 1)).to(torch.int8)
    scales = weight.scales.float()
    if scheme.activations is not None:
        by_token = QuantizeTensorToInt8Kwargs(granularity=PerRow())
        made = Int8Tensor(signed, scales, [1, columns], dtype, act_quant_kwargs=by_token)
        return made
    if columns % weight.group:
        raise no_form(path, called, NAME, twin, f"groups of {weight.group} do not fill {columns} columns")
    zeros = torch.zeros_like(scales, dtype=torch.int8)
    if weight.zeros is not None:
        zeros = (weight.zeros.to(torch.int16) - 2 ** (weight.bits - 1)).to(torch.int8)
    kind = torch.int8 if weight.bits == 8 else getattr(torch, "int4")  # noqa: B009 - its stubs do not know it
    made = IntxUnpackedToInt8Tensor(signed, scales, zeros, kind, (1, weight.group), dtype, None)
    return made


def _common(tensors: list[Tensor]) -> torch.dtype:
    """The shortest format that holds all of them: a model computes in one."""
    short = {narrowest(tensor).dtype for tensor in tensors if tensor.is_floating_point()}
    return short.pop() if len(short) == 1 else torch.float32
