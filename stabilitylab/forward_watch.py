"""Looks at a model's forward passes while a ``with`` block lasts, through hooks that are gone afterwards.

A watch names its hooks in ``_hooks``:

    class ShapeWatch(ForwardWatch):
        def _hooks(self):
            for path, module in self._model.named_modules():
                yield module, partial(self._look, path)  # called with (module, given, out)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self

from torch import nn
from torch.utils.hooks import RemovableHandle

ForwardHook = Callable[[nn.Module, tuple[Any, ...], Any], None]


class ForwardWatch:
    """Hooks modules while entered; keeps what it saw."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for module, hook in self._hooks():
            self._handles.append(module.register_forward_hook(hook))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hooks(self) -> Iterable[tuple[nn.Module, ForwardHook]]:
        """The modules, each with the hook to call after its forward passes."""
        raise NotImplementedError
