"""Weights in 16 bits, arithmetic in 32: a model computes in fp32 and takes no more memory than its file.

fp32 holds every number of a file in bf16 or fp16, so a weight need be wide only while it multiplies:

    y = x W' + b        W in 16 bits, widened some rows at a time; x, y and b in fp32
    rows of a table     widened after they were looked up

Products are those of the model opened in fp32, bit for bit where a weight is widened in one piece. Weights lie in the pages of the
file (safetensors are mapped), which the system may take back and read again. Everything else (norms, biases, buffers, parameters
that modules multiply themselves) is widened for good.

A module may look at the format of a layer's weight and round what it gives to it, as in ``x.to(self.wo.weight.dtype)``. So
``computes_wide`` tries the model: if one operator makes a number of 16 bits that is not a part of a weight, or anything fails, the
model is not held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stabilitylab.compat import TorchDispatchMode
from stabilitylab.model_structure import has_known_layout, linear_layers, linear_weight, token_embeddings
from stabilitylab.models.freed_memory import let_go_of_pages
from stabilitylab.models.weight_files import StoredTensor

NARROW = {"BF16": torch.bfloat16, "F16": torch.float16}
_AT_ONCE = 1 << 23  # numbers of a weight that are widened together: 32 MiB
_MANY = 1 << 13  # outputs from which on we look for gradients that are mostly zero
# Operators whose 16-bit results are parts of a weight and no new numbers.
_PARTS = frozenset(
    [
        "t",
        "view",
        "slice",
        "select",
        "split",
        "split_with_sizes",
        "transpose",
        "index",
        "index_select",
        "embedding",
        "detach",
        "alias",
        "unsqueeze",
        "squeeze",
        "expand",
        "unbind",
        "as_strided",
        "permute",
        "_unsafe_view",
        "clone",
        "lift_fresh",
    ]
)


def format_of(stored: Mapping[str, StoredTensor]) -> torch.dtype | None:
    """The one 16-bit format that all of a folder's weights are in; None where there is none."""
    kinds = {one.dtype for one in stored.values()}
    return NARROW.get(next(iter(kinds))) if len(kinds) == 1 else None


def _product(x: Tensor, weight_NK: Tensor, bias: Tensor | None) -> Tensor:
    rows = max(1, _AT_ONCE // max(1, weight_NK.shape[1]))
    if len(weight_NK) <= rows:
        return F.linear(x, weight_NK.float(), bias)
    y = x.new_empty(*x.shape[:-1], len(weight_NK))
    for start in range(0, len(weight_NK), rows):
        part = slice(start, start + rows)
        y[..., part] = F.linear(x, weight_NK[part].float(), None if bias is None else bias[part])
        let_go_of_pages([weight_NK[part]])
    return y


class _Product(torch.autograd.Function):
    """``_product`` with a gradient for x, which keeps no wide weight.

    Where the gradient comes back for few outputs (the logits of single tokens), their rows alone make x's gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_NK: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight_NK
        return _product(x, weight_NK, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (y,) = gradients
        if len(ctx.weight) >= _MANY and int(torch.count_nonzero(y)) <= 2 * y[..., 0].numel():
            y_MN = y.reshape(-1, y.shape[-1])
            place_n, output_n = y_MN.nonzero(as_tuple=True)
            of_rows = ctx.weight[output_n].float() * y_MN[place_n, output_n, None]
            found = y.new_zeros(len(y_MN), ctx.weight.shape[1]).index_add_(0, place_n, of_rows)
            return found.view(*y.shape[:-1], -1), None, None
        rows = max(1, _AT_ONCE // max(1, ctx.weight.shape[1]))
        x: Tensor | None = None
        for start in range(0, len(ctx.weight), rows):
            part = slice(start, start + rows)
            one = y[..., part] @ ctx.weight[part].float()
            x = one if x is None else x.add_(one)
            if len(ctx.weight) > rows:
                let_go_of_pages([ctx.weight[part]])
        assert x is not None
        return x, None, None


def _linear(self: Any, x: Tensor) -> Tensor:
    if x.dtype != torch.float32:
        raise RuntimeError(f"a layer that computes in float32 was given {x.dtype}")
    weight = linear_weight(self)
    if torch.is_grad_enabled() and x.requires_grad:
        found: Tensor = _Product.apply(x, weight, self.bias)  # type: ignore[no-untyped-call]
        return found
    y = _product(x, weight, self.bias)
    let_go_of_pages([self.weight])
    return y


def look_up(table: nn.Module, ids: Tensor, rows_of: Callable[[Tensor], Tensor]) -> Tensor:
    """What an embedding returns, its rows taken from elsewhere: only the wanted rows are made.

    Args:
        table: ``nn.Embedding``, or of a type that scales what it looks up.
        ids: whole numbers.
        rows_of: numbers of rows, ascending -> the rows.
    """
    wanted, places = torch.unique(ids, return_inverse=True)
    kind = getattr(type(table), "held_kind", type(table))
    # A table of the wanted rows alone, otherwise as it is.
    small = object.__new__(kind)
    small.__dict__.update(table.__dict__)
    small.__dict__.update(padding_idx=None, num_embeddings=len(wanted))
    small.__dict__["_parameters"] = {**table._parameters, "weight": rows_of(wanted)}
    found: Tensor = kind.forward(small, places)
    return found


@contextmanager
def products_of_rows(module: nn.Module) -> Iterator[None]:
    """While this lasts, gradients of a model's wide outputs go back through the rows that they concern."""
    wide = [
        layer
        for layer in linear_layers(module).values()
        if len(linear_weight(layer)) >= _MANY
        and (type(layer) is nn.Linear or type(layer).__name__ == "Conv1D")
    ]
    before = [type(layer) for layer in wide]
    try:
        for layer in wide:
            if linear_weight(layer).dtype == torch.float32:
                kind: Any = type(layer)
                layer.__class__ = _held(kind, _linear)
        yield
    finally:
        for layer, was in zip(wide, before, strict=True):
            layer.__class__ = was


def _embedding(self: Any, ids: Tensor) -> Tensor:
    return look_up(self, ids, lambda rows: self.weight[rows].float())


@cache
def _held(kind: Any, forward: Any) -> Any:
    """A layer's type with another forward, under the same name, by which it is known."""
    return type(
        kind.__name__, (kind,), {"forward": forward, "held_kind": kind, "__module__": kind.__module__}
    )


def _way(module: nn.Module, tables: set[int]) -> Any:
    """How to compute a layer with a weight that is held; None for modules that are not known so well."""
    if has_known_layout(module) and (type(module) is nn.Linear or type(module).__name__ == "Conv1D"):
        return _linear
    if isinstance(module, nn.Embedding) and id(module) in tables and module.max_norm is None:
        return _embedding
    return None


def is_held(layer: nn.Module) -> bool:
    """Whether a layer computes in fp32 with a weight of 16 bits."""
    return hasattr(type(layer), "held_kind")


def multiplies(layer: nn.Module) -> bool:
    """Whether a linear layer does what ``nn.Linear`` does, held or not."""
    return type(layer).forward in (nn.Linear.forward, _linear)


def hold(module: nn.Module) -> None:
    """Make a model with parameters in 16 bits compute in fp32, in place."""
    tables = {id(table) for table in token_embeddings(module).values()}
    owners: dict[int, list[nn.Module]] = {}
    for owner in module.modules():
        for parameter in owner._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(owner)
    held = {key for key, all_of in owners.items() if all(_way(owner, tables) for owner in all_of)}
    wide: dict[int, nn.Parameter] = {}
    for owner in list(module.modules()):
        for name, parameter in list(owner._parameters.items()):
            if parameter is None or not parameter.is_floating_point():
                continue
            if name == "weight" and id(parameter) in held:
                kind: Any = type(owner)
                owner.__class__ = _held(kind, _way(owner, tables))
            else:
                key = id(parameter)
                if key not in wide:
                    wide[key] = nn.Parameter(parameter.detach().float(), requires_grad=False)
                owner._parameters[name] = wide[key]


@contextmanager
def without_parameters() -> Iterator[None]:
    """Modules made inside have parameters on the meta device, to be replaced later, and buffers in memory."""
    register: Any = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None:
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        register(self, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def transplant(loaded: nn.Module, skeleton: nn.Module) -> bool:
    """Give a model that was built in fp32, without parameters, those of the same model as it was read; False where they differ.

    Buffers that files do not hold (rotary frequencies, scales of embeddings) are the skeleton's: built in 16 bits they would be
    rounded.
    """
    taken = dict(loaded.named_parameters(remove_duplicate=False))
    wanted = dict(skeleton.named_parameters(remove_duplicate=False))
    buffers = dict(loaded.named_buffers())
    if taken.keys() != wanted.keys() or any(wanted[name].shape != p.shape for name, p in taken.items()):
        return False
    for name, parameter in taken.items():
        parent, _, leaf = name.rpartition(".")
        place: dict[str, Any] = skeleton.get_submodule(parent)._parameters
        place[leaf] = parameter.requires_grad_(False)
    for name, _ in list(skeleton.named_buffers()):
        parent, _, leaf = name.rpartition(".")
        owner = skeleton.get_submodule(parent)
        if leaf not in owner._non_persistent_buffers_set and name in buffers:
            found = buffers[name]
            owner._buffers[leaf] = found.float() if found.is_floating_point() else found
    return not any(buffer.is_meta for buffer in skeleton.buffers())


class _Narrowings(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees whether an operator makes numbers of 16 bits."""

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for one in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(one, Tensor) and one.dtype in NARROW.values():
                self.seen = self.seen or func.overloadpacket.__name__ not in _PARTS
        return found


def computes_wide(module: nn.Module) -> bool:
    """Whether a held model runs on a few tokens and rounds nothing to 16 bits."""
    size = min((len(table.weight) for table in token_embeddings(module).values()), default=0)  # type: ignore[arg-type]
    if not size:
        return False
    ids = (torch.arange(8) % size)[None]
    try:
        with torch.no_grad(), _Narrowings() as watch:  # type: ignore[no-untyped-call]
            module(input_ids=ids)
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError):
        return False
    return not watch.seen
