"""A model's structure, in one place for everybody: stacks of blocks, embeddings, linear layers, tied weights.

The residual stream flows from block to block, so its sites are the blocks' outputs. A *stack* is a numbered container
(``ModuleList``, ``Sequential``, a ``ModuleDict`` or module whose children are called 0, 1, ...) that lies in no block of another,
and its *blocks* are

    the members that hold weights and are no single layer; of a container that runs its members itself, where such
    members repeat their type, only those that do (stem and head stand beside them)

    experts, parallel heads       no stack: they work side by side, whatever holds them
    a list of stages              the stages' own lists, where their members are of one type (and hold norms: Swin, ConvNeXt)
    a plain MLP                   its linear layers, where a model has nothing better: three of them are three layers
    one block alone               a stack of one, likewise

So an encoder-decoder model has two stacks, a model of vision and language too, and a mixture of experts one.

*Token embeddings* are the modules that look rows up, except those for positions or segments; in a model without any, its so-called
input embedding (a ViT's patches). A *linear layer* computes y = x W' + b: ``nn.Linear`` and its subclasses; transformers'
``Conv1D`` (W is [in, out]), known by its interface so that transformers need not be installed; and layers with that name
(``ColumnParallelLinear``), whose weight's layout is unknown, so stabilitylab watches them but never replaces them.
``nn.MultiheadAttention``'s output projection is none: torch reads its weight and never calls it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

from stabilitylab.errors import InputError

# Attributes under which wrappers (torch.compile, FSDP, activation checkpointing) keep the module they wrap.
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Types around a whole model, by name: DeepSpeed need not be installed.
_AROUND = frozenset({"DistributedDataParallel", "DataParallel", "DeepSpeedEngine", "PipelineEngine"})
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_SIDE_BY_SIDE = re.compile(r"expert|head|branch|adapter|lora", re.IGNORECASE)
_NOT_TOKENS = re.compile(r"pos|wpe|type|segment|relative|rotary|norm|time|timestep", re.IGNORECASE)


# Wrappers, and walks that skip them.


def clean(path: str) -> str:
    """The path of a module or parameter without wrappers."""
    return ".".join(part for part in path.split(".") if part not in _WRAPPED)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside wrappers of ``torch.compile``, FSDP, activation checkpointing."""
    while True:
        inner = next((module._modules[name] for name in _WRAPPED if name in module._modules), None)
        if inner is None:
            return module
        module = inner


def bare(model: nn.Module) -> nn.Module:
    """The model itself, without DDP, DeepSpeed's engine and other wrappers around it.

    Raises:
        InputError: ``model`` is no module, or has lazy layers that no forward pass has given their shapes yet.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}: the monitor attaches to a torch.nn.Module")
    if lazy := [name for name, parameter in model.named_parameters() if is_lazy(parameter)]:
        raise InputError(
            f"{lazy[0]} is a parameter without a shape, of a lazy layer: run a forward pass, then make optimizer and monitor"
        )
    while True:
        inner = unwrapped(model)
        if any(kind.__name__ in _AROUND for kind in type(model).__mro__):
            inner = model._modules.get("module") or inner
        if inner is model:
            return model
        model = inner


def named_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by path, without wrappers in the paths; a tied one under its first name."""
    return {clean(name): parameter for name, parameter in model.named_parameters()}


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Like ``model.named_modules()``, without wrappers in the walk and in the paths."""
    for path, module in model.named_modules():
        if unwrapped(module) is module:
            yield clean(path), module


# Layers.


class Conv1D(Protocol):
    """The interface of transformers' ``Conv1D``: weight [in, out], bias [out], and ``nf``, the number of outputs."""

    weight: nn.Parameter
    bias: nn.Parameter
    nf: int


def _is_conv1d(module: object) -> TypeGuard[Conv1D]:
    # Checked one by one: from Python 3.12 on, ``isinstance`` with a protocol does not see a module's parameters.
    return type(module).__name__ == "Conv1D" and all(hasattr(module, one) for one in ("weight", "bias", "nf"))


def has_known_layout(module: nn.Module) -> bool:
    """Whether it is a linear layer whose weight reads as [out, in] and that another layer can replace."""
    if isinstance(module, nn.Linear):
        kind: Any = type(module)
        return kind.__name__ != "NonDynamicallyQuantizableLinear" and _returns_product(kind)
    return _is_conv1d(module) and module.weight.dim() == 2


@cache
def _returns_product(kind: Any) -> bool:
    """Whether a kind of ``nn.Linear`` returns x W' + b and nothing else: makes one with six outputs and tries it."""
    if kind.forward is nn.Linear.forward:
        return True
    drawn = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(shape, generator=drawn) for shape in ((6, 4), (6,), (3, 4)))
    tried = object.__new__(kind)
    nn.Module.__init__(tried)
    tried.in_features, tried.out_features = 4, 6
    tried.weight, tried.bias = nn.Parameter(weight), nn.Parameter(bias)
    try:
        with torch.no_grad():
            y: object = kind.forward(tried.eval(), x)
    except Exception:  # anything that it needs besides a weight and a bias makes it another layer
        return False
    expected = F.linear(x, weight, bias)
    return (
        isinstance(y, Tensor) and y.shape == expected.shape and bool(torch.allclose(y, expected, atol=1e-5))
    )


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer, or is named like one."""
    if isinstance(module, nn.Linear):
        return type(module).__name__ != "NonDynamicallyQuantizableLinear"
    return type(module).__name__.endswith("Linear") or type(module).__name__ == "Conv1D"


def is_norm(module: nn.Module) -> bool:
    """Whether its type is called a norm: ``LayerNorm``, ``RMSNorm``, ``LlamaRMSNorm``, ..."""
    return "Norm" in type(module).__name__


def is_embedding(module: nn.Module) -> bool:
    """Whether it looks up rows of a table: ``nn.Embedding``, and layers that are named like it and hold a table
    (``VocabParallelEmbedding``)."""
    if isinstance(module, nn.Embedding):
        return True
    if not type(module).__name__.endswith("Embedding"):
        return False
    return any(name == "weight" and p.dim() == 2 for name, p in module.named_parameters(recurse=False))


def linear_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer with a known weight layout, by path, in the model's own order; one used under several paths comes once."""
    return {path: layer for path, layer in module.named_modules() if has_known_layout(layer)}


def weights_outside_layers(module: nn.Module) -> tuple[float, list[str]]:
    """Matrices outside linear layers of known layout, embeddings and convolutions: fused experts, routers, the model's own
    parameters.

    Returns:
        Their share of all parameters' numbers, and their names.
    """
    held = {
        id(parameter)
        for part in module.modules()
        if has_known_layout(part) or is_embedding(part) or _is_conv(part)
        for parameter in part.parameters(recurse=False)
    }
    loose = [
        (clean(name), parameter.numel())
        for name, parameter in module.named_parameters()
        if parameter.dim() > 1 and id(parameter) not in held
    ]
    total = sum(parameter.numel() for parameter in module.parameters())
    return sum(size for _, size in loose) / max(1, total), [name for name, _ in loose]


def linear_weight(layer: nn.Module) -> Tensor:
    """A linear layer's weight as [out, in]; for ``Conv1D`` a transposed view."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight if isinstance(layer, nn.Linear) else weight.T


def shared_parameters(module: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Tied weights: groups of names of one tensor, such as ``(("embed_tokens.weight", "lm_head.weight"),)``."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return tuple(tuple(several) for several in names.values() if len(several) > 1)


# The residual stream.


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """Blocks through which one residual stream flows.

    Attributes:
        path: the container's.
        blocks: path -> block, in order.
    """

    path: str
    blocks: dict[str, nn.Module]


def stacks(model: nn.Module) -> list[Stack]:
    """The stacks of blocks, in the model's order; none in a model without numbered parts."""
    found = _search("", model)
    best = min((rank for rank, _ in found), default=0)
    return [stack for rank, stack in found if rank == best]


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> block, for all stacks."""
    return {path: block for stack in stacks(model) for path, block in stack.blocks.items()}


# Ranks of stacks: blocks proper, the layers of a plain MLP, a block alone. Only the model's best rank counts.
_BLOCKS, _LAYERS, _ALONE = range(3)


def parameter_groups(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Parameters in groups that people have names for: each block's attention, feed-forward and norms, embedding, head.

    Each child of a block is a group, but all its norms form one; outside blocks each outermost module is a group. Label ->
    parameters, in the order of ``names``, each in one group.
    """
    paths = sorted(blocks(model), key=len, reverse=True)
    norms = {path for path, module in named_modules(model) if is_norm(module)}
    found: dict[str, list[str]] = {}
    for name in names:
        module = name.rpartition(".")[0]
        block = next((path for path in paths if module == path or module.startswith(path + ".")), None)
        if block is None:
            label = name.partition(".")[0]
        elif module == block:
            label = name
        else:
            child = module[len(block) + 1 :].partition(".")[0]
            label = (
                f"{block}'s norms" if module in norms and f"{block}.{child}" == module else f"{block}.{child}"
            )
        found.setdefault(label, []).append(name)
    return {label: tuple(members) for label, members in found.items()}


def _search(path: str, module: nn.Module) -> list[tuple[int, Stack]]:
    """Stacks at and below a module, each with its rank."""
    module = unwrapped(module)
    children = {name: unwrapped(child) for name, child in module._modules.items() if child is not None}
    if not children or _is_side_by_side(path, children):
        return []
    numbered = isinstance(module, (nn.ModuleList, nn.Sequential)) or all(name.isdigit() for name in children)
    below = {_join(path, name): child for name, child in children.items()}
    if not numbered:
        return [stack for at, child in below.items() for stack in _search(at, child)]
    parts = {at: child for at, child in below.items() if _holds_weights(child) and not _is_layer(child)}
    if not parts and isinstance(module, nn.ModuleList):
        parts = {at: child for at, child in below.items() if not _is_layer(child)}  # blocks without weights
    inner = [stack for at, child in parts.items() for stack in _stages(at, child)]
    if inner:
        return inner
    others: list[tuple[int, Stack]] = []
    if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        kinds = Counter(type(part) for part in parts.values())
        repeated = {at: part for at, part in parts.items() if kinds[type(part)] > 1}
        for at, part in parts.items():
            if at not in repeated:
                others += _search(at, part)
        if not repeated and any(rank == _BLOCKS for rank, _ in others):
            return others
        parts = repeated or parts
    if len(parts) > 1:
        return [(_BLOCKS, Stack(path=path, blocks=parts)), *others]
    layers = {at: child for at, child in below.items() if at in parts or is_linear(child) or _is_conv(child)}
    if len(layers) > 1:
        return [(_LAYERS, Stack(path=path, blocks=layers)), *others]
    if parts:
        at, part = next(iter(parts.items()))
        return others or _search(at, part) or [(_ALONE, Stack(path=path, blocks=parts))]
    return others


def _stages(path: str, part: nn.Module) -> Iterator[tuple[int, Stack]]:
    """The stacks of a stage: a list of blocks right below it, each with its norm; or a bare container's own."""
    bare_container = isinstance(part, (nn.ModuleList, nn.Sequential))
    lists = {path: part} if bare_container else {_join(path, n): c for n, c in part.named_children()}
    for at, child in lists.items():
        if not isinstance(unwrapped(child), (nn.ModuleList, nn.Sequential)):
            continue
        for rank, stack in _search(at, child):
            kinds = {type(block) for block in stack.blocks.values()}
            residual = bare_container or all(_has_norm(block) for block in stack.blocks.values())
            if rank == _BLOCKS and len(kinds) == 1 and residual:
                yield rank, stack


def _is_side_by_side(path: str, children: dict[str, nn.Module]) -> bool:
    """Whether it lists experts, heads or adapters, through which no stream flows in sequence."""
    kinds = {type(child).__name__ for child in children.values()}
    name = path.rpartition(".")[2]
    return bool(_SIDE_BY_SIDE.search(name)) or (len(kinds) == 1 and "Expert" in next(iter(kinds)))


def _is_layer(module: nn.Module) -> bool:
    """Whether it is a single layer, not a module made of several."""
    return is_linear(module) or is_norm(module) or is_embedding(module) or _is_conv(module)


def _has_norm(module: nn.Module) -> bool:
    return any(is_norm(part) for part in module.modules())


def _is_conv(module: nn.Module) -> bool:
    return isinstance(module, _CONVOLUTIONS)


def _holds_weights(module: nn.Module) -> bool:
    return any(parameter.dim() > 1 for parameter in module.parameters())


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


# Embeddings.


def token_embeddings(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> module of the token embeddings; one used under several paths comes once. See the module's docstring."""
    tables = {path: module for path, module in named_modules(model) if is_embedding(module)}
    tokens = {path: module for path, module in tables.items() if not _NOT_TOKENS.search(path)}
    inside = blocks(model)
    outside = {at: m for at, m in tokens.items() if not any(at.startswith(f"{block}.") for block in inside)}
    if found := outside or tokens:
        return found
    ask = getattr(model, "get_input_embeddings", None)
    try:
        given: Any = ask() if callable(ask) else None
    except (NotImplementedError, AttributeError):
        given = None
    if isinstance(given, nn.Module):
        return {path: module for path, module in named_modules(model) if module is given}
    # Tables named only after what they count: the largest is the tokens'.
    largest = max(tables.items(), key=lambda pair: len(pair[1].weight), default=None)  # type: ignore[arg-type]
    return {} if largest is None else dict([largest])


def describe(model: nn.Module) -> dict[str, Any]:
    """The structure as plain JSON, for a run's ``model_structure.json``.

    Returns:
        ``stacks``: container -> paths of its blocks; ``embeddings``: parameters of the token embeddings; ``tied``: groups of
            parameter names of one tensor.
    """
    inside = {id(p) for module in token_embeddings(model).values() for p in module.parameters()}
    return {
        "stacks": {stack.path: list(stack.blocks) for stack in stacks(model)},
        "embeddings": [name for name, p in named_parameters(model).items() if id(p) in inside],
        "tied": [[clean(name) for name in group] for group in shared_parameters(model)],
    }
