"""A trained GLM opened with quantized linear layers, one tensor at a time.

    int8     8-bit weights with a scale for each output channel: GLM-130B's (2210.02414, section 5)
    int4     4-bit weights with scale and zero point for each 64 columns: rows are too coarse for models much smaller than 130B,
             which lose most of their accuracy by them (same section)
    PLAN     a file made by stabilitylab quantize: a scheme for each layer

``open_quantized`` quantizes query-key-value, attention output and both feed-forward matrices, not embeddings, norms and biases. It
reads, quantizes and releases each weight before it reads the next, so its peak memory is about that of the quantized model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from glm.errors import InputError
from glm.inference.loading import OpenedModel, find_files, parts_of, prepare, refuse_not_finite
from glm.model.transformer import Transformer
from glm.precision.policy import DTYPES, Precision
from stabilitylab.models.freed_memory import give_back_memory
from stabilitylab.models.weight_checks import fingerprint_of
from stabilitylab.quantization.plan import QuantizationPlan, load_plan
from stabilitylab.quantization.replacement import put
from stabilitylab.quantization.scheme import Scheme
from stabilitylab.quantization.schemes import LinearScheme
from stabilitylab.quantization.serialization import header_of, load_quantized
from stabilitylab.quantization.twin_files import read_tensor

NAMED = {"int8": Scheme.parse("int8-row"), "int4": Scheme.parse("int4-g64-asym")}


def open_quantized(
    path: Path, how: str | None, *, precision: Precision | None = None, device: torch.device | str = "cpu"
) -> OpenedModel:
    """Open a run, a checkpoint or an export with quantized layers.

    Args:
        path: the folder.
        how: "int8", "int4", or a plan's file; None for a folder that stabilitylab quantize --apply wrote.
        precision: format of unquantized weights and of activations; None: as stored.
        device: where the model goes.

    Raises:
        InputError: as ``open_model``; or the plan is for another model, or is missing.
    """
    prepared = prepare(path)
    with torch.device("meta"):
        model = Transformer(prepared.config.model)
    dtype = None if precision is None else DTYPES[precision]
    if how is None:
        load_quantized(model, prepared.weights, dtype=dtype or torch.float32)
        return OpenedModel(model.to(device), prepared.tokenizer, prepared.config)
    if header_of(prepared.weights) is not None:
        raise InputError(f"{path} is quantized already: open it without --quantize")
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    _check_names(prepared.weights, expected)
    schemes, largest = _schemes(model, prepared.weights, path, how)
    biases: dict[str, Tensor] = {}
    for name, tensor in read_one_by_one(prepared.weights, expected):
        layer, _, kind = name.rpartition(".")
        if layer in schemes and kind == "bias":
            # The layer may not exist yet; a bias is small.
            biases[layer] = tensor if dtype is None else tensor.to(dtype)
        elif layer in schemes:
            put(
                model,
                layer,
                schemes[layer].layer(tensor, largest=largest.get(layer), name=f"{prepared.weights}: {name}"),
            )
            del tensor
            give_back_memory()
        else:
            refuse_not_finite(name, tensor, prepared.weights)
            owner = model.get_submodule(layer)
            if kind in owner._buffers:  # kept beside the weights, in a format of its own
                owner._buffers[kind] = tensor
            else:
                own = tensor if dtype is None else tensor.to(dtype)
                setattr(owner, kind, nn.Parameter(own, requires_grad=False))
    for layer, bias in biases.items():
        refuse_not_finite(f"{layer}.bias", bias, prepared.weights)
        model.get_submodule(layer).register_buffer("bias", bias)
    return OpenedModel(model.eval().to(device), prepared.tokenizer, prepared.config)


def is_quantized(path: Path) -> bool:
    """Whether a folder's model has quantized layers already."""
    return header_of(find_files(path).weights) is not None


def read_one_by_one(file: Path, names: Mapping[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a weights file or of its parts, one after another; a released tensor leaves the memory.

    Raises:
        InputError: the file is damaged, or a shape differs.
    """
    part = _parts(file)
    for name, shape in names.items():
        try:
            tensor = read_tensor(part.get(name, file), name)
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{file} cannot be read as safetensors ({error}): export the model again"
            ) from None
        if tensor.shape != shape:
            raise InputError(
                f"{file}: {name} is {list(tensor.shape)}, but its config.json makes it {list(shape)}"
            )
        yield name, tensor


def _parts(file: Path) -> dict[str, Path]:
    """The file of each tensor. Raises InputError where one is damaged."""
    found: dict[str, Path] = {}
    for part in parts_of(file):
        try:
            with safe_open(part, framework="pt") as opened:
                found |= dict.fromkeys(opened.keys(), part)
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{part} cannot be read as safetensors ({error}): export the model again"
            ) from None
    return found


def _check_names(file: Path, expected: Mapping[str, torch.Size]) -> None:
    found = _parts(file).keys()
    if missing := sorted(expected.keys() - found):
        raise InputError(f"{file} lacks {len(missing)} of {len(expected)} tensors, {missing[0]} the first")
    if extra := sorted(found - expected.keys()):
        raise InputError(f"{file} holds {extra[0]}, which the model of its config.json has not")


def _schemes(
    model: Transformer, weights: Path, path: Path, how: str
) -> tuple[dict[str, LinearScheme], dict[str, Tensor]]:
    """The scheme of each layer, and what SmoothQuant needs of its input."""
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("layers.")
    ]
    if how in NAMED:
        return dict.fromkeys(layers, NAMED[how]), {}
    if not Path(how).is_file():
        raise InputError(
            f"--quantize {how}: choose int8, int4, or the file of a plan (stabilitylab quantize)"
        )
    plan = load_plan(Path(how))
    _require(plan, model, weights, path)
    if strange := sorted(plan.schemes.keys() - set(layers)):
        raise InputError(f"--quantize {how}: {strange[0]} is not a linear layer of {path}")
    largest = {
        name: torch.tensor(layer.smooth) for name, layer in plan.layers.items() if layer.smooth is not None
    }
    return plan.schemes, largest


def _require(plan: QuantizationPlan, model: Transformer, weights: Path, path: Path) -> None:
    """Refuse a plan for another model."""
    shapes = {name: parameter.shape for name, parameter in sorted(model.named_parameters())}
    own = fingerprint_of((name, tensor.float()) for name, tensor in read_one_by_one(weights, shapes))
    plan.require(own, path.resolve().name)
