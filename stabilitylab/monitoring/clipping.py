"""Gradient clipping, noticed the moment before it happens, and gradients changed by other means, noticed afterwards.

The commonest loop is backward, ``clip_grad_norm_``, step, and the gradient that tells of a run that explodes is the one before the
second of these. ``from torch.nn.utils import clip_grad_norm_`` has bound the function before any monitor exists, so that to replace
it in its module is not enough. But what torch clips with are wrappers that one decorator has made, and a wrapper finds its function
in a cell:

    clip_grad_norm_ -> _get_total_norm(gradients, 2) -> norm
                    -> _clip_grads_with_norm_(parameters, max_norm, norm)         the cells' contents are exchanged
    clip_grad_value_(parameters, value)                                           for as long as somebody watches

So it is seen by whatever name it is called, also from within accelerate, Lightning, the Trainer and torchtitan, and the norm that
torch has worked out comes for free at every step.

Who clips by hand is not seen; ``Untouched`` then says that a gradient is no longer what the backward pass has left, by its version
counter and address. It does not know what a reduction by hand is from a clipping, and is for one process only.

Limits: where torch were to build these functions otherwise, nothing is seen before the optimizer's step, and that is all.
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

# Is told the parameters whose gradients are about to be clipped, and their L2 norm where torch has worked it out.
Told = Callable[[Sequence[Tensor], Tensor | None], None]

_log = logging.getLogger("stabilitylab")
_lock = threading.Lock()
_watching: list[weakref.WeakMethod[Any]] = []
_own: list[tuple[CellType, Callable[..., Any]]] = []
_latest: weakref.ref[Tensor] | None = None  # the latest L2 norm
_in_shards = False  # whether that is one of DTensor, whose plain number is another object


class ClipWatch:
    """Calls a method before torch clips gradients, for as long as its object lives or until ``remove``."""

    def __init__(self, told: Told) -> None:
        self._told: weakref.WeakMethod[Any] = weakref.WeakMethod(told)
        with _lock:
            if not _watching:
                _put()
            _watching.append(self._told)

    def remove(self) -> None:
        """Stop. With the last one torch has its own functions back."""
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
    """Where a wrapper of torch's decorator keeps the function that it wraps."""
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
        # Once: two groups that are clipped by one norm, as torchtitan's experts and the rest, have not each that norm.
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
        if told is None:  # dropped without a word
            with _lock:
                if reference in _watching:
                    _watching.remove(reference)
            continue
        try:
            told(parameters, norm)
        except Exception:
            _log.exception("gradients could not be read before they were clipped; training goes on")


class Untouched:
    """Whether gradients are still what the last backward pass has left, by two parameters that stand for all.

    Args:
        parameters: leaves that are trained.
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
        """What has changed them is known and is no clipping: a loss scale was divided out."""
        for reference in self._watched.values():
            if (p := reference()) is not None and id(p) in self._noted:
                self._note(p)

    def changed(self, parameters: Iterable[Tensor]) -> bool:
        """Whether those of the two that are among ``parameters`` were changed since."""
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
