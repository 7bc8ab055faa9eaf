"""A quantized model on disk: the original's folder with one safetensors file in the canonical form, and the plan.

    model.safetensors    for a quantized layer PATH its buffers PATH.values, PATH.scales, ... (stored_weight.py); everything else
                         under its own name. Shared tensors once, an embedding and an output tied to it too. In the header:
                         layout of each layer, shared names, fingerprint; version 2 where embeddings are quantized.
    plan.json            the plan
    config.json, ...     the original's, except its weights

Weights that stay floats are stored in bf16 or fp16 where that changes no bit, else as they are. Loading builds the model without
memory for its parameters and takes tensor after tensor from the file, so at its peak it holds about what the model holds then.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from stabilitylab.errors import InputError
from stabilitylab.models import TextModel, shared_parameters
from stabilitylab.models.description import location, quiet
from stabilitylab.models.freed_memory import give_back_memory
from stabilitylab.models.hugging_face import recognises
from stabilitylab.models.weight_checks import narrowest
from stabilitylab.quantization.plan import QuantizationPlan
from stabilitylab.quantization.replacement import put, quantizable_layers, quantized
from stabilitylab.quantization.twin_files import read_tensor, read_twin, twin_layout
from stabilitylab.quantization.vocabulary import EmbeddingMatrix, embedding_matrices

WEIGHTS, PLAN = "model.safetensors", "plan.json"
_FORMAT = "stabilitylab-quantized"
_VERSION, _WITH_EMBEDDINGS = 1, 2
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pkl")
_NEVER = (*_WEIGHT_FILES, ".index.json", ".py", ".jsonl", ".html", ".lock")


def save_quantized(model: TextModel, plan: QuantizationPlan, out: Path) -> int:
    """Write a model quantized by a plan; returns the bytes of its weights file.

    Args:
        model: the original; unchanged.
        plan: made for this model.
        out: folder to make.

    Raises:
        InputError: ``out`` already exists, or the plan is for another model.
    """
    plan.require(model.fingerprint, model.name)
    with new_folder(out) as partial:
        copy_companions(model, partial)
        tensors, header = _tensors(model, plan)
        save_file(tensors, partial / WEIGHTS, metadata=header)
        size = (partial / WEIGHTS).stat().st_size
        plan.write(partial / PLAN)
    return size


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into: it takes its name when all of it is written, and is gone if it was not.

    Raises:
        InputError: ``out`` already exists.
    """
    if out.exists():
        raise InputError(f"{out} exists already: give another place, or remove it")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def unquantized_tensors(module: nn.Module, layers: Iterable[str]) -> dict[str, Tensor]:
    """What a model holds besides these layers, each in its shortest exact form; shared tensors once."""
    again = {name for group in shared_parameters(module) for name in group[1:]}
    owned = tuple(f"{path}." for path in layers)
    return {
        name: narrowest(tensor).contiguous()
        for name, tensor in module.state_dict().items()
        if name not in again and not name.startswith(owned)
    }


def header_of(path: Path) -> dict[str, Any] | None:
    """The header of a quantized model's weights file; None for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_FORMAT, "null"))
    except (SafetensorError, OSError, ValueError):
        return None
    return header if isinstance(header, dict) else None


def holds(path: Path, prefix: str) -> bool:
    """Whether a safetensors file has a tensor whose name begins so."""
    return any(name.startswith(prefix) for name in _names(path))


def load_quantized(
    module: nn.Module, path: Path, *, dtype: torch.dtype = torch.float32, wide: Container[str] = ()
) -> None:
    """Fill a model, built with its parameters on the meta device (``without_parameters``), from a quantized weights file.

    Args:
        module: filled in place.
        path: the weights file.
        dtype: format of parameters that are not quantized; buffers keep the one that the module computes them in.
        wide: names of what stays in fp32 whatever the format.

    Raises:
        InputError: the file is not a quantized model's, or does not fit the module.
    """
    header = header_of(path)
    if header is None:
        raise InputError(f"{path} is not a quantized model: stabilitylab quantize --apply writes them")
    if header.get("version") not in (_VERSION, _WITH_EMBEDDINGS):
        raise InputError(
            f"{path} has version {header.get('version')}, this release reads {_VERSION} and {_WITH_EMBEDDINGS}"
        )
    layers: dict[str, dict[str, Any]] = header["layers"]
    names = _names(path)
    for layer_path, layout in layers.items():
        _check_place(module, layer_path, path)
        twin: Any = read_twin(path, names, layer_path, layout, dtype)
        if "embeddings" in layout:
            for place, stands in _uses(module, layer_path, layout, path).places(twin).items():
                put(module, place, stands)
        else:
            put(module, layer_path, twin)
        give_back_memory()
    owned = tuple(f"{layer_path}." for layer_path in layers)
    for name in sorted(names):
        if not name.startswith(owned):
            _set(module, name, read_tensor(path, name), torch.float32 if name in wide else dtype, path)
    for first, *others in header["shared"]:
        for name in others:
            parent, _, leaf = name.rpartition(".")
            module.get_submodule(parent)._parameters[leaf] = module.get_parameter(first)
    missing = [name for name, tensor in module.named_parameters() if tensor.is_meta]
    if missing:
        raise InputError(
            f"{path} lacks {len(missing)} weights, among them {missing[0]}: apply the plan again"
        )
    module.eval()


def matrices_of(model: TextModel, plan: QuantizationPlan) -> dict[str, EmbeddingMatrix]:
    """The embeddings that a plan quantizes."""
    layers = quantizable_layers(model.module)
    planned = [path for path in plan.schemes if path not in layers]
    if not planned:
        return {}
    found = embedding_matrices(model.module)
    lost = next((path for path in planned if path not in found), None)
    if lost is not None:
        raise InputError(
            f"{lost} is neither a linear layer with a weight of its own nor an embedding here: the plan is for another model"
        )
    return {path: found[path] for path in planned}


def _uses(module: nn.Module, path: str, layout: dict[str, Any], file: Path) -> EmbeddingMatrix:
    """Where an embedding's matrix stands in a model that is being filled."""
    embeddings, outputs = layout["embeddings"], layout["outputs"]
    for place in (*embeddings, *outputs):
        _check_place(module, place, file)
    at = {place: module.get_submodule(place) for place in (*embeddings, *outputs)}
    if not all(isinstance(at[place], nn.Embedding) for place in embeddings) or not all(
        isinstance(at[place], nn.Linear) for place in outputs
    ):
        raise InputError(f"{file} holds {path} as an embedding, which the model of its config.json has not")
    return EmbeddingMatrix(
        path=path,
        embeddings={place: at[place] for place in embeddings},  # type: ignore[misc]
        outputs={place: at[place] for place in outputs},  # type: ignore[misc]
    )


def _names(path: Path) -> set[str]:
    with safe_open(path, framework="pt") as file:
        names: list[str] = file.keys()
    return set(names)


def _tensors(model: TextModel, plan: QuantizationPlan) -> tuple[dict[str, Tensor], dict[str, str]]:
    module = model.module
    layers = quantizable_layers(module)
    matrices = matrices_of(model, plan)
    tensors: dict[str, Tensor] = {}
    layout: dict[str, Any] = {}
    for path, scheme in plan.schemes.items():
        if path in matrices:
            twins = matrices[path].twins(scheme)
            matrix: Any = twins[path]
            layout[path] = {
                **twin_layout(path, matrix.matrix, scheme.name),
                "embeddings": list(matrices[path].embeddings),
                "outputs": list(matrices[path].outputs),
            }
            tensors |= {
                f"{path}.{name}": tensor.contiguous() for name, tensor in matrix.matrix.state_dict().items()
            }
            continue
        smooth = plan.layers[path].smooth
        largest = None if smooth is None else torch.tensor(smooth)
        twin = quantized(path, layers[path], scheme, largest)
        layout[path] = twin_layout(path, twin, scheme.name)
        for name, tensor in twin.state_dict().items():
            tensors[f"{path}.{name}"] = tensor.contiguous()
    shared = shared_parameters(module)
    owned = tuple(f"{path}." for path in layout)
    tensors |= unquantized_tensors(module, layout)
    # A second name of a quantized layer needs no tensor: the layer is put in both places.
    groups = [group for group in shared if not any(name.startswith(owned) for name in group)]
    header = {
        "version": _WITH_EMBEDDINGS if matrices else _VERSION,
        "layers": layout,
        "shared": groups,
        "fingerprint": model.fingerprint,
        "name": model.name,
    }
    # One entry, since several would come in another order every time.
    return tensors, {_FORMAT: json.dumps(header)}


def _check_place(module: nn.Module, name: str, path: Path) -> None:
    try:
        module.get_submodule(name)
    except AttributeError:
        raise InputError(f"{path} holds {name}, which the model of its config.json has not") from None


def _set(module: nn.Module, name: str, tensor: Tensor, dtype: torch.dtype, path: Path) -> None:
    parent, _, leaf = name.rpartition(".")
    _check_place(module, parent, path)
    owner = module.get_submodule(parent)
    place: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers
    before = place.get(leaf)
    if tensor.is_floating_point():
        # A buffer may be computed in a wider format than the parameters are in; the files have its shortest exact one.
        own = dtype if before is None or place is owner._parameters else before.dtype
        tensor = tensor.to(torch.promote_types(own, dtype))
    if before is None or before.shape != tensor.shape:
        raise InputError(
            f"{path}: {name} of shape {list(tensor.shape)} does not fit the model of its config.json"
        )
    place[leaf] = nn.Parameter(tensor, requires_grad=False) if place is owner._parameters else tensor


def copy_companions(model: TextModel, out: Path) -> None:
    """Copies configuration and tokenizer. A GGUF file has both inside; they are written out in their usual form."""
    if model.path.is_dir() and (model.path / "config.json").is_file():
        for file in sorted(model.path.iterdir()):
            if file.is_file() and not file.name.endswith(_NEVER) and file.name != PLAN:
                shutil.copyfile(file, out / file.name)
        return
    if not recognises(model.path):
        raise InputError(
            f"{model.path} has no config.json to copy: give the run or export that it belongs to, or apply the plan when "
            "the model is opened"
        )
    folder, where = location(model.path)
    with quiet():
        import transformers

        model.module.config.save_pretrained(out)  # type: ignore[operator, union-attr]
        transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **where
        ).save_pretrained(out)
