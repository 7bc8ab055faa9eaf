"""Runs a model from one of its blocks on, with what came before taken from an earlier run.

To see what one changed layer does to the output, the model need not compute the blocks before it again. The blocks are the module
list that holds most linear layers; while a restarted run passes the blocks before the first changed one, each returns what it
returned before. That is right only if blocks speak to each other through their outputs alone, so ``Restart`` tries it first:
restarted runs of the unchanged model must give the same output bit for bit, or it makes whole runs instead. This saves half of the
work on average.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stabilitylab.models import TextModel, Window
from stabilitylab.models.logit_chunks import Stop, answering, largest_stack, stopping


class Restart:
    """Runs of a model on one window after another.

    Args:
        model: its parameters do not change, its layers may be replaced between runs.
    """

    def __init__(self, model: TextModel) -> None:
        self._model = model
        self._name, self._blocks = largest_stack(model.module)
        self._held: list[Any] = []
        self._window: Window | None = None
        self._tried = False

    @property
    def blocks(self) -> int:
        """How many blocks there are to restart from; 0 where only whole runs are right."""
        return len(self._blocks)

    @property
    def modules(self) -> list[nn.Module]:
        """The blocks."""
        return list(self._blocks)

    @property
    def held(self) -> list[Any]:
        """What the blocks returned on the current window; some may have been let go."""
        return list(self._held)

    def block_of(self, path: str) -> int:
        """The number of the block that contains a layer; 0 for layers outside all blocks."""
        if self._blocks and path.startswith(f"{self._name}."):
            return int(path.removeprefix(f"{self._name}.").split(".")[0])
        return 0

    def begin(self, window: Window) -> Tensor:
        """Run the whole, unchanged model on a window and keep the blocks' outputs. Returns the model's output."""
        self._window = window
        output = self._whole(window)
        if not self._tried:
            self._tried = True
            tries = {1, self.blocks // 2, self.blocks - 1} if self._blocks else set()
            if not all(torch.equal(self.run(start), output) for start in tries):
                self._blocks = []
        return output

    def hold(self, window: Window) -> None:
        """As ``begin``, without what follows the last block; only after a ``begin``, which finds out whether that is right."""
        self._window = window
        if self._blocks:
            with self._keeping(), torch.no_grad(), stopping(self._blocks[-1]):
                try:
                    self._model.module(**window.inputs)
                except Stop:
                    return

    @property
    def _begun(self) -> Window:
        assert self._window is not None
        return self._window

    def run(self, start: int) -> Tensor:
        """The model's output on the current window, computed from block ``start`` on."""
        with self._skipping(start if self._blocks else 0):
            return self._model.run(self._begun)

    def _whole(self, window: Window) -> Tensor:
        with self._keeping():
            return self._model.run(window)

    @contextmanager
    def _keeping(self) -> Iterator[None]:
        """Keeps the blocks' outputs; drops the blocks if the model calls them several times, in another order or not at all."""
        self._held = [None] * len(self._blocks)
        calls: list[int] = []

        def keep(index: int, _module: nn.Module, _arguments: Any, output: Any) -> None:
            calls.append(index)
            self._held[index] = output

        hooks = [
            block.register_forward_hook(partial(keep, index)) for index, block in enumerate(self._blocks)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            if calls != list(range(len(self._blocks))):
                self._blocks = []

    @contextmanager
    def _skipping(self, count: int) -> Iterator[None]:
        """Makes the first blocks answer with what they returned before."""
        with self.answering(self._held[:count]):
            yield

    def answering(self, answers: Sequence[Any]) -> AbstractContextManager[None]:
        """Makes the first blocks answer with these."""
        return answering(self._blocks, answers)
