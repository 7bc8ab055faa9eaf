"""Notices gradient clipping the moment before it happens, and gradients changed by other means afterwards.

The commonest loop is backward, ``clip_grad_norm_``, step, and the gradient before clipping shows that a run explodes. ``from
torch.nn.utils import clip_grad_norm_`` binds the function before any monitor exists, so replacing it in its module is not enough.
But torch's clipping functions are wrappers made by one decorator, and a wrapper finds its function in a cell:

    clip_grad_norm_ -> _get_total_norm(gradients, 2) -> norm
                    -> _clip_grads_with_norm_(parameters, max_norm, norm)         the cells' contents are exchanged
    clip_grad_value_(parameters, value)                                           for as long as somebody watches

So the watch sees clipping under any name, also from within accelerate, Lightning, the Trainer and torchtitan, and at every step
gets for free the norm that torch computes.

The watch does not see hand-written clipping. There ``Untouched`` notices, by version counter and address, that a gradient is no
longer as the backward pass left it. It cannot tell a hand-written reduction from clipping, and works for one process only.

Limits: if torch ever builds these functions differently, the monitor sees nothing before the optimizer's step; nothing else breaks.
"""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad

from stabilitylab.compat import is_dtensor

# Called with the parameters whose gradients torch is about to clip, and their L2 norm where torch has computed it.
Told = Callable[[Sequence[Tensor], Tensor | None], None]

_log = logging.getLogger("stabilitylab")
_lock = threading.Lock()
_watching: list[weakref.WeakMethod[Any]] = []
_own: list[tuple[CellType, Callable[..., Any]]] = []
_latest: weakref.ref[Tensor] | None = None  # the latest L2 norm
_in_shards = False  # whether that is a DTensor, whose plain number is another object


class ClipWatch:
    """Calls a method before torch clips gradients, for as long as its object lives or until ``remove``."""

    def __init__(self, told: Told) -> None:
        self._told: weakref.WeakMethod[Any] = weakref.WeakMethod(told)
        with _lock:
            if not _watching:
                _put()
            _watching.append(self._told)

    def remove(self) -> None:
        """Stop. The last watch to stop gives torch its own functions back."""
        with _lock:
            if self._told in _watching:
                _watching.remove(self._told)
            if not _watching:
                _take_away()


def _put() -> None:
    for name, around in (
        ("_get_total_norm", _total_norm),
        ("_clip_grads_with_norm_", _clip_with_norm),
        ("clip_grad_value_", _clip_value),
    ):
        cell = _cell(getattr(clip_grad, name, None))
        if cell is not None:
            own = cell.cell_contents
            _own.append((cell, own))
            cell.cell_contents = functools.partial(around, own)


def _take_away() -> None:
    for cell, own in _own:
        cell.cell_contents = own
    _own.clear()


def _cell(wrapper: Any) -> CellType | None:
    """The cell in which a wrapper of torch's decorator keeps its function."""
    if not isinstance(wrapper, FunctionType) or "func" not in wrapper.__code__.co_freevars:
        return None
    return (wrapper.__closure__ or ())[wrapper.__code__.co_freevars.index("func")]


def _total_norm(
    own: Callable[..., Any], tensors: Any, norm_type: float = 2.0, *args: Any, **more: Any
) -> Any:
    global _latest, _in_shards
    norm = own(tensors, norm_type, *args, **more)
    if not torch.compiler.is_compiling():
        is_l2 = float(norm_type) == 2.0
        _in_shards = is_l2 and is_dtensor(norm)
        if is_l2 and type(norm) is Tensor:
            _latest = weakref.ref(norm)
    return norm


def _clip_with_norm(
    own: Callable[..., Any], parameters: Any, max_norm: float, total_norm: Any, *args: Any, **more: Any
) -> Any:
    global _in_shards
    parameters = _listed(parameters)
    if not torch.compiler.is_compiling():
        is_latest = _latest is not None and _latest() is total_norm
        # Once: of two groups clipped by one norm, as torchtitan's experts and the rest, neither has that norm.
        joined, _in_shards = _in_shards and type(total_norm) is Tensor, False
        _tell(parameters, total_norm if is_latest or joined else None)
    return own(parameters, max_norm, total_norm, *args, **more)


def _clip_value(own: Callable[..., Any], parameters: Any, *args: Any, **more: Any) -> Any:
    parameters = _listed(parameters)
    if not torch.compiler.is_compiling():
        _tell(parameters, None)
    return own(parameters, *args, **more)


def _listed(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [parameters] if isinstance(parameters, Tensor) else list(parameters)


def _tell(parameters: Sequence[Tensor], norm: Tensor | None) -> None:
    for reference in tuple(_watching):
        told = reference()
        if told is None:  # its object is gone
            with _lock:
                if reference in _watching:
                    _watching.remove(reference)
            continue
        try:
            told(parameters, norm)
        except Exception:
            _log.exception("gradients could not be read before they were clipped; training continues")


class Untouched:
    """Whether gradients are still as the last backward pass left them, by two parameters that stand for all.

    Args:
        parameters: trained leaves.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        leaves = [
            p for p in parameters if type(p) in (Tensor, torch.nn.Parameter) and p.requires_grad and p.is_leaf
        ]
        self._noted: dict[int, tuple[int, int]] = {}
        note = weakref.WeakMethod(self._note)
        self._watched = {id(p): weakref.ref(p) for p in (*leaves[:1], *leaves[-1:])}
        self._handles = [
            p.register_post_accumulate_grad_hook(functools.partial(_call, note))  # type: ignore[no-untyped-call]
            for p in (reference() for reference in self._watched.values())
            if p is not None
        ]

    def _note(self, p: Tensor) -> None:
        if (gradient := p.grad) is not None and gradient.layout is torch.strided:
            self._noted[id(p)] = gradient.data_ptr(), gradient._version

    def note(self) -> None:
        """Accept the gradients as they are: a known change that is no clipping, such as dividing out a loss scale."""
        for reference in self._watched.values():
            if (p := reference()) is not None and id(p) in self._noted:
                self._note(p)

    def changed(self, parameters: Iterable[Tensor]) -> bool:
        """Whether the gradients of those of the two among ``parameters`` have changed since."""
        for p in parameters:
            if (noted := self._noted.get(id(p))) is not None and (gradient := p.grad) is not None:
                here = (gradient.data_ptr(), gradient._version) if gradient.layout is torch.strided else noted
                if here != noted:
                    return True
        return False

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _call(method: weakref.WeakMethod[Any], p: Tensor) -> None:
    if (note := method()) is not None:
        note(p)
