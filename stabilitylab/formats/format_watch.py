"""What formats would cost the operands of a model's products, without using them: any module, any machine.

    with FormatWatch(model, ("fp8-e4m3-tensor", "mxfp4")) as watch:
        loss(model(x)).backward()
    monitor.step(step, **watch.readings())

The watch looks at leaf modules that have a matrix ``weight``: their input, their weight, and the gradient of their output. A
reading is ``format/SITE:OPERAND/FORMAT_error``, ``_underflow`` or ``_overflow`` (``what_if``), OPERAND input, weight or gradient;
of several calls the last one counts. The watch waits for nothing before ``readings``, and changes nothing about the model.

Limits: a measured step rounds every operand once a format: some two to four times a step's time on a CPU. Measure seldom.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stabilitylab.errors import InputError
from stabilitylab.formats.what_if import FormatError, what_if_format, what_if_values
from stabilitylab.forward_watch import ForwardHook, ForwardWatch


class FormatWatch(ForwardWatch):
    """Measures while it is entered; keeps what it measured.

    Args:
        model: to watch.
        formats: names of ``what_if_format``.
        sites: glob of the layers' paths.

    Raises:
        InputError: there is no such format, or no such layer.
    """

    def __init__(self, model: nn.Module, formats: Sequence[str], *, sites: str = "*") -> None:
        super().__init__()
        self._formats = {name: what_if_format(name) for name in formats}
        self._modules = {
            path: module
            for path, module in model.named_modules()
            if _has_matrix(module) and fnmatch.fnmatch(path, sites)
        }
        if not self._modules:
            raise InputError(f"no layer with a matrix is called {sites!r}: choose another glob of sites")
        self._values: dict[tuple[str, str, str], Tensor] = {}

    def _hooks(self) -> Iterator[tuple[nn.Module, ForwardHook]]:
        for path, module in self._modules.items():
            yield module, partial(self._look, path)

    def _look(self, path: str, module: nn.Module, given: tuple[Any, ...], out: Any) -> None:
        if given and isinstance(given[0], Tensor):
            self._measure(path, "input", given[0])
        if isinstance(module.weight, Tensor):
            self._measure(path, "weight", module.weight)
        if isinstance(out, Tensor) and out.requires_grad:
            out.register_hook(lambda grad: self._measure(path, "gradient", grad))  # type: ignore[no-untyped-call]

    def _measure(self, path: str, operand: str, tensor: Tensor) -> None:
        if not tensor.is_floating_point() or not tensor.numel():
            return
        for name, format in self._formats.items():
            self._values[path, operand, name] = what_if_values(tensor.detach(), format)

    def errors(self) -> dict[tuple[str, str, str], FormatError]:
        """Errors by layer, operand and format."""
        if not self._values:
            return {}
        rows = torch.stack([value.cpu() for value in self._values.values()]).tolist()
        return {
            key: FormatError(error=error, underflow=underflow, overflow=overflow)
            for key, (error, underflow, overflow) in zip(self._values, rows, strict=True)
        }

    def readings(self) -> dict[str, float]:
        """Readings by telemetry name, as ``Monitor.step`` takes them."""
        found: dict[str, float] = {}
        for (path, operand, name), one in self.errors().items():
            for statistic in ("error", "underflow", "overflow"):
                found[f"format/{path}:{operand}/{name}_{statistic}"] = getattr(one, statistic)
        return found


def _has_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    is_leaf = next(module.children(), None) is None
    return (
        is_leaf and isinstance(weight, Tensor) and weight.dim() >= 2 and not isinstance(module, nn.Embedding)
    )
