"""Shows DeepSpeed's flat optimizer parameter by parameter.

ZeRO and half precision step on flat fp32 tensors, each of which holds, one after the other, this rank's parts of many parameters:

    flat = [ part of w_0 | part of w_1 | ... | padding ]         moments and gradient alike

A part is a view of it: a probe samples the optimizer's own memory before a step and compares it after, and nobody copies or gathers
anything. No two ranks hold the same element, and padding belongs to no parameter, so sums over the ranks are those of the whole
parameter.

Limits: the optimizer's state must be in memory, laid out as torch's (``state[flat]["exp_avg"]``); state on disk stays unseen.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle


class FragmentedOptimizer:
    """An optimizer as probes read it: groups, state and hooks, with parts of parameters in place of flat tensors.

    Args:
        optimizer: the flat optimizer.
        parts: by parameter name, views of its flat tensors, of one dimension.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parts: Mapping[str, Tensor]) -> None:
        self._optimizer = optimizer
        # Each a leaf, so that it can have its own gradient.
        self.parts = {name: part.detach().requires_grad_() for name, part in parts.items()}
        self._by_memory: dict[int, list[Tensor]] = {}  # parts of one storage, in their order
        self._lying: dict[int, list[Tensor]] = {}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the present step: ZeRO updates one after the other."""
        return [
            {**group, "params": [part for flat in group["params"] for part in self._within(flat)]}
            for group in self._optimizer.param_groups
        ]

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:
        """The state of each part in the present step."""
        found: dict[Tensor, dict[str, Any]] = {}
        for flat in self._flats():
            whole = self._optimizer.state.get(flat, {})
            for part in self._within(flat):
                found[part] = {
                    name: _cut(value, flat, part)
                    if isinstance(value, Tensor) and value.shape == flat.shape
                    else value
                    for name, value in whole.items()
                }
        return found

    def register_step_pre_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Call ``hook`` before each step of the flat optimizer, with the parts' gradients in place."""

        def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            for flat in self._flats():
                for part in self._within(flat):
                    gradient = flat.grad
                    part.grad = (
                        None if gradient is None else _cut(gradient.detach(), flat, part).to(part.dtype)
                    )
            hook(self, args, kwargs)

        return self._optimizer.register_step_pre_hook(before)

    def register_step_post_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Call ``hook`` after each step of the flat optimizer."""
        return self._optimizer.register_step_post_hook(lambda _, args, kwargs: hook(self, args, kwargs))

    def forget_gradients(self) -> None:
        """Release the flat gradients."""
        for part in self.parts.values():
            part.grad = None

    def _flats(self) -> list[Tensor]:
        return [flat for group in self._optimizer.param_groups for flat in group["params"]]

    def _within(self, flat: Tensor) -> list[Tensor]:
        """The parts in a flat tensor, in their order."""
        if id(flat) not in self._lying:
            if not self._by_memory:
                for part in sorted(self.parts.values(), key=Tensor.storage_offset):
                    self._by_memory.setdefault(part.untyped_storage().data_ptr(), []).append(part)
            begin, end = flat.storage_offset(), flat.storage_offset() + flat.numel()
            same = self._by_memory.get(flat.untyped_storage().data_ptr(), [])
            first, last = (bisect_left(same, at, key=Tensor.storage_offset) for at in (begin, end))
            self._lying[id(flat)] = same[first:last]
        return self._lying[id(flat)]


def _cut(whole: Tensor, flat: Tensor, part: Tensor) -> Tensor:
    """The elements at a part's place in a tensor of the flat one's layout."""
    return whole.reshape(-1).narrow(0, part.storage_offset() - flat.storage_offset(), part.numel())


def optimizer_parts(named: Mapping[str, Any]) -> dict[str, Tensor]:
    """By parameter name, the view of this rank's part in the flat fp32 tensor, if there is one."""
    parts = {}
    for name, parameter in named.items():
        if not parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_id"):
            part = parameter._z3_optimizer.get_local_fp32_param(parameter)
            parts[name] = part.narrow(0, 0, own_length(parameter))
        elif getattr(parameter, "_hp_mapping", None) is not None:
            parts[name] = parameter._hp_mapping.hp_fragment
    return {name: part for name, part in parts.items() if part.numel()}


def own_length(parameter: Any) -> int:
    """How many elements of a ZeRO-3 parameter this rank holds: ZeRO pads the last parts to the length of the others."""
    length = int(parameter.ds_tensor.ds_numel)
    rank = int(parameter._z3_optimizer._get_param_partition_rank(parameter))
    return max(0, min(length, int(parameter.ds_numel) - rank * length))
