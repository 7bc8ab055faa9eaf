"""What each form that other programs open can hold exactly, and what to say of a layer that it cannot hold.

An export stores the plan's own numbers. It refuses a layer whose numbers a form cannot hold, in one line that names the layer and
the forms that can: it rounds nothing a second time in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stabilitylab.errors import InputError
from stabilitylab.models import TextModel
from stabilitylab.models.fused_experts import SplitExperts
from stabilitylab.quantization.format_scheme import FormatLinear
from stabilitylab.quantization.linear import QuantizedLinear
from stabilitylab.quantization.plan import QuantizationPlan
from stabilitylab.quantization.replacement import quantizable_layers
from stabilitylab.quantization.schemes import LinearScheme, nearest

OWN = "stabilitylab"
_WITH_EMBEDDINGS = (OWN, "gguf")  # formats that hold quantized embeddings as we write them
# Formats of floating-point weights whose codes have a form there.
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
_INSTEAD = {
    "compressed-tensors": "int4-g128, nvfp4, fp8-e4m3-row",
    "gguf": "int8-g32, int4-g32, mxfp4",
    "torchao": "int8-row, int4-g32-asym, fp8-e4m3-row, nvfp4",
}


@dataclass(frozen=True, kw_only=True)
class Export:
    """An export format of your own.

    Attributes:
        name: for ``--format``.
        save: writes a model quantized by a plan to a path that does not exist yet; returns the bytes of its weights.
        holds: whether a quantized layer's numbers have an exact form in it.
        instead: schemes whose layers it holds, to say where it does not.
        embeddings: whether it holds quantized embeddings.
    """

    name: str
    save: Callable[[TextModel, QuantizationPlan, Path], int]
    holds: Callable[[Any], bool] = lambda layer: True
    instead: str = "any name"
    embeddings: bool = True


REGISTERED: dict[str, Export] = {}


def register_export(export: Export) -> None:
    """Make a format known by its name.

    Raises:
        InputError: the name is taken.
    """
    if not export.name or export.name in formats():
        raise InputError(f"there is a format {export.name!r} already: choose another name")
    REGISTERED[export.name] = export


def formats() -> list[str]:
    """The names that ``--format`` takes."""
    return [OWN, *_FLOATS, *REGISTERED]


def instead(format: str) -> str:
    """Schemes that a format holds."""
    return REGISTERED[format].instead if format in REGISTERED else _INSTEAD[format]


def holds_embeddings(format: str) -> bool:
    """Whether a format holds quantized embeddings as we write it."""
    return REGISTERED[format].embeddings if format in REGISTERED else format in _WITH_EMBEDDINGS


def holders(layer: Any) -> list[str]:
    """The formats, beside our own, that can hold a quantized layer's numbers."""
    return _known_holders(layer) + [name for name, export in REGISTERED.items() if export.holds(layer)]


def _known_holders(layer: Any) -> list[str]:
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
        f"--schemes of {instead(format)}"
    )


def held_schemes(format: str, schemes: Sequence[LinearScheme]) -> tuple[list[LinearScheme], list[str]]:
    """The schemes whose numbers a format can hold, and the names of the others; called before anything is measured."""
    if format == OWN:
        return list(schemes), []
    held, others = [], []
    for scheme in schemes:
        try:
            tried: Any = nearest(scheme).layer(torch.ones(128, 128), largest=torch.ones(128))
        except InputError:
            tried = None
        # AWQ divides the input by factors, for which no format here has a place.
        fits = (
            tried is not None
            and format in holders(tried)
            and (format in REGISTERED or "-awq" not in scheme.name)
        )
        held.append(scheme) if fits else others.append(scheme.name)
    return held, others


def refuse_layers(model: TextModel, format: str) -> None:
    """Raises InputError where a format cannot represent a model's layers whatever their scheme: experts that were split are not
    layers of the file, and some weights are stored transposed."""
    if any(isinstance(module, SplitExperts) for module in model.module.modules()):
        raise InputError(
            f"{model.name} has experts, whose layers are not written as {format}: leave out --format"
        )
    layers = quantizable_layers(model.module)
    turned = [path for path, layer in layers.items() if not isinstance(layer, nn.Linear)]
    if turned:
        raise InputError(
            f"{model.name} has layers whose weights are [in, out] ({turned[0]}, {len(turned)} in all), which {format} has no form "
            "for: leave out --format"
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


def card(plan: QuantizationPlan, format: str, notes: tuple[str, ...] = ()) -> str:
    """What the command did to the model and what it costs, for the folder.

    Args:
        plan: what the command did.
        format: the folder's.
        notes: how to open it, and what to know of that form.
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
