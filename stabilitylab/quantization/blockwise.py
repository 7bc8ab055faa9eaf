"""Reads a text one block at a time: of a plan's quantized layers, memory need hold only one block's.

    h_0 = blocks[0](start of the model)      on every window
    h_b = blocks[b](h_(b-1))                 on every window, before block b + 1 is made
    output = end of the model (h_L)          some tokens at a time (logit_chunks.py)

Memory holds the latest block's outputs on the text, T C numbers, and one block. Each stage lets the blocks in front answer at once
and stops the model behind its own block. So the model computes everything else that it passes to blocks (positions, masks) as
usual, and the output is that of a whole run bit for bit. A run on a few tokens tries that; models whose blocks know more of each
other than their outputs are read whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from stabilitylab.models import TextModel, Window
from stabilitylab.models.logit_chunks import Pieces, Stop, answering, largest_stack, part_of, stopping

# Called with a block's path; while the context that it returns lasts, the block has the layers that are wanted.
Layers = Callable[[str], AbstractContextManager[None]]

_TRIED = 8  # tokens


def as_it_is(_path: str) -> AbstractContextManager[None]:
    """Leaves a block the layers that it has."""
    return nullcontext()


class Blockwise:
    """Reads texts one block at a time.

    Args:
        model: its layers may be replaced between runs.
        window: one of the text's, to try it on.
    """

    def __init__(self, model: TextModel, window: Window) -> None:
        self._model = model
        self._pieces = Pieces(model)
        path, self._blocks = largest_stack(model.module)
        self.paths = [f"{path}.{index}" for index in range(len(self._blocks))]
        if not self._right(window):
            self._blocks, self.paths = [], []

    def outputs(
        self, windows: Sequence[Window], layers: Layers = as_it_is
    ) -> Iterator[tuple[int, Window, Tensor]]:
        """Yields each window's number, the window or its pieces one after another, and the model's output there.

        Args:
            windows: the text.
            layers: makes a block's layers; not called where there are no ``paths``.
        """
        if not self._blocks:
            for number, window in enumerate(windows):
                for piece, output in self._pieces.outputs(window):
                    yield number, piece, output
            return
        held = self._hidden(windows, layers)
        for number, window in enumerate(windows):
            hidden, held[number] = held[number], None
            for piece, output in self._ends(window, hidden):
                yield number, piece, output

    def _hidden(self, windows: Sequence[Window], layers: Layers) -> list[Any]:
        held: list[Any] = [None] * len(windows)
        for index, path in enumerate(self.paths):
            with layers(path):
                for number, window in enumerate(windows):
                    held[number] = self._block(index, window, held[number])
        return held

    def _block(self, index: int, window: Window, before: Any) -> Any:
        with torch.no_grad(), answering(self._blocks, [before] * index), stopping(self._blocks[index]):
            try:
                self._model.module(**window.inputs)
            except Stop as stop:
                return stop.output
        raise RuntimeError("a block was not called")

    def _ends(self, window: Window, hidden: Any) -> Iterator[tuple[Window, Tensor]]:
        parts = self._pieces.parts(window)
        if len(parts) == 1:
            with answering(self._blocks, [hidden] * len(self._blocks)):
                output = self._model.run(window)
            yield window, output
            return
        for part in parts:
            yield part_of(window, part), self._pieces.output(window, hidden, part)

    def _right(self, window: Window) -> bool:
        """Whether reading by blocks gives the model's output, bit for bit."""
        if not self._blocks:
            return False
        self._pieces.parts(window)  # tried before anything is replaced
        short = part_of(window, slice(0, _TRIED)) if set(window.inputs) == {"input_ids"} else window
        try:
            hidden = self._hidden([short], as_it_is)
            with answering(self._blocks, hidden * len(self._blocks)):
                found = self._model.run(short)
        except (RuntimeError, IndexError, TypeError, ValueError, AttributeError, KeyError):
            return False
        return torch.equal(found, self._model.run(short))
