"""Formats that other programs open, and what each of them can hold exactly: ``--apply OUT --format ...``.

    compressed-tensors    vLLM, transformers                    compressed_tensors.py
    gguf                  llama.cpp, transformers, gguf-py      gguf_export.py
    torchao               torchao, transformers                 torchao_export.py

An export stores the plan's own numbers. A layer whose numbers a format cannot hold is refused in one line that names the layer and
the formats that can: nothing is rounded a second time in silence.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from stabilitylab.errors import InputError
from stabilitylab.models import TextModel
from stabilitylab.models.experts import SplitExperts
from stabilitylab.quantization.format_scheme import FormatLinear
from stabilitylab.quantization.linear import QuantizedLinear
from stabilitylab.quantization.plan import QuantizationPlan
from stabilitylab.quantization.replacement import quantizable_layers
from stabilitylab.quantization.schemes import LinearScheme, nearest

OWN = "stabilitylab"
WITH_EMBEDDINGS = (OWN, "gguf")  # formats that hold quantized embeddings as they are written here
# Of floating-point formats, weights alone: where their codes have a form.
_FLOATS = {
    "compressed-tensors": (
        "fp8-e4m3-tensor",
        "fp8-e4m3-row",
        "fp8-e4m3-block128",
        "mxfp8-e4m3",
        "mxfp4",
        "nvfp4",
    ),
    "gguf": ("mxfp4",),
    "torchao": ("fp8-e4m3-tensor", "fp8-e4m3-row", "nvfp4"),
}
INSTEAD = {
    "compressed-tensors": "int4-g128, nvfp4, fp8-e4m3-row",
    "gguf": "int8-g32, int4-g32, mxfp4",
    "torchao": "int8-row, int4-g32-asym, fp8-e4m3-row, nvfp4",
}


def holders(layer: Any) -> list[str]:
    """The formats that can hold a quantized layer's numbers."""
    if getattr(layer, "smooth", None) is not None:  # a factor a channel, of SmoothQuant or AWQ
        return []
    if isinstance(layer, FormatLinear):
        activations = layer.scheme.activations
        return [
            name
            for name, known in _FLOATS.items()
            if layer.scheme.weights in known
            and (activations is None or (name == "compressed-tensors" and activations != "nvfp4"))
        ]
    if not isinstance(layer, QuantizedLinear):
        return []
    scheme = layer.scheme
    if scheme.threshold is not None:
        return []
    if scheme.activations is not None:
        by_token = scheme.activations == "token" and scheme.share == "row"
        return ["compressed-tensors", "torchao"] if by_token else ["compressed-tensors"]
    return ["compressed-tensors", "torchao"] + ([] if layer.stored.zeros is not None else ["gguf"])


def no_form(path: str, scheme: str, format: str, layer: Any, why: str = "") -> InputError:
    """What to say of a layer that a format cannot hold."""
    others = [name for name in holders(layer) if name != format] + [OWN]
    reason = f" ({why})" if why else ""
    return InputError(
        f"{path}: {scheme} has no exact form in {format}{reason}: --format {' or '.join(others)} holds it; or make the plan with "
        f"--schemes of {INSTEAD[format]}"
    )


def held_schemes(format: str, schemes: Sequence[LinearScheme]) -> tuple[list[LinearScheme], list[str]]:
    """Those of some schemes whose numbers a format can hold, and the names of the others; asked before anything is measured."""
    if format == OWN:
        return list(schemes), []
    held, others = [], []
    for scheme in schemes:
        try:
            tried: Any = nearest(scheme).layer(torch.ones(128, 128), largest=torch.ones(128))
        except InputError:
            tried = None
        # AWQ divides the input by factors that no format has a place for.
        fits = tried is not None and format in holders(tried) and "-awq" not in scheme.name
        held.append(scheme) if fits else others.append(scheme.name)
    return held, others


def require_form(format: str, model: TextModel) -> None:
    """Refuse what can be told before the plan is made.

    Raises:
        InputError: the package that writes the format is missing, or it has no form for a model of this kind.
    """
    if format == "gguf":
        from stabilitylab.quantization.gguf_export import require_gguf

        require_gguf(model)
    if format == "torchao":
        from stabilitylab.quantization.torchao_export import require_torchao

        require_torchao()
    if format != OWN:
        refuse_experts(model, format)


def refuse_experts(model: TextModel, format: str) -> None:
    """Raises InputError where a model has experts that were taken apart: their layers are no layers of the file."""
    if any(isinstance(module, SplitExperts) for module in model.module.modules()):
        raise InputError(
            f"{model.name} has experts, whose layers are not written as {format}: leave out --format"
        )


def refuse_embeddings(model: TextModel, plan: QuantizationPlan, format: str) -> None:
    """Raises InputError where a plan quantizes an embedding, which only some formats hold."""
    layers = quantizable_layers(model.module)
    for path, scheme in plan.schemes.items():
        if path not in layers:
            raise InputError(
                f"{path} is an embedding in {scheme.name}, and {format} as it is written here holds linear layers alone: "
                f"--format gguf or {OWN} takes it; or make the plan with --no-embeddings"
            )


def save_as(format: str, model: TextModel, plan: QuantizationPlan, out: Path) -> int:
    """Write a model quantized by a plan in one of the formats; returns the bytes of its weights.

    Raises:
        InputError: ``out`` stands already, the plan is for another model, a scheme has no exact form there, or the package that
            writes it is missing.
    """
    from stabilitylab.quantization.compressed_tensors import save_compressed_tensors
    from stabilitylab.quantization.gguf_export import save_gguf
    from stabilitylab.quantization.serialization import save_quantized
    from stabilitylab.quantization.torchao_export import save_torchao

    writers = {
        OWN: save_quantized,
        "compressed-tensors": save_compressed_tensors,
        "gguf": save_gguf,
        "torchao": save_torchao,
    }
    return writers[format](model, plan, out)


def card(plan: QuantizationPlan, format: str, notes: tuple[str, ...] = ()) -> str:
    """What was done to the model and what it costs, for the folder.

    Args:
        plan: what was done.
        format: as what it is written.
        notes: how to open it, and what is to be known of that form.
    """
    unit = "nats per token" if plan.criterion == "loss" else "relative error of the output"
    rows = "\n".join(
        f"| {path} | {layer.scheme or '16-bit'} | {layer.reason} |" for path, layer in plan.layers.items()
    )
    said = "\n".join(f"- {note}" for note in (*notes, *plan.notes))
    return (
        f"# {plan.model}, quantized\n\nAsked for: {plan.budget.text}. Cost: {plan.planned.loss:+.4f} {unit}, told on "
        f"{plan.told_tokens:,} tokens that nothing was chosen by; {plan.planned.bytes:,} bytes of "
        f"{plan.singles['16-bit'].bytes:,} in 16 bits. Made by stabilitylab quantize as {format}; plan.json has every figure.\n\n"
        f"{said}\n\n| layer | scheme | because |\n| --- | --- | --- |\n{rows}\n"
    )
