"""The output of a model a few tokens at a time: logits of a large vocabulary are the largest thing that reading a text makes.

What follows the last block (a norm, the output projection, its scaling) looks at one token at a time in nearly every model. So we
read a window up to the last block, and run the rest on pieces of the result, with the blocks answering with them:

    hidden(window)                 the last block's output, [B, T, C]
    output(window, hidden, part)   the model's output at some of the tokens, [B, t, V]

A model with a vocabulary of 262,144 makes 268 MB of logits from 256 tokens, and 17 MB from 16 of them. A few tokens try whether a
model's end is of that kind; where it is not, or outputs are small, pieces are whole windows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stabilitylab.model_structure import Stack, linear_layers, stacks
from stabilitylab.models.text import Window
from stabilitylab.models.text_model import TextModel, loss_of

_NUMBERS = 1 << 22  # of outputs made at once: 16 MiB
_TRIED = 8  # tokens


class Pieces:
    """Runs of a model in pieces.

    Args:
        model: its layers may be replaced between runs.
    """

    def __init__(self, model: TextModel) -> None:
        self._model = model
        self._blocks = largest_stack(model.module)[1] if model.predicts else []
        self._tokens: int | None = None  # of a piece; None: not known yet

    def parts(self, window: Window) -> list[slice]:
        """The tokens of each piece."""
        count = window.tokens
        tokens = self._size(window)
        return [slice(start, min(start + tokens, count)) for start in range(0, count, tokens)]

    def hidden(self, window: Window) -> Any:
        """What the last block returned; None where pieces are whole windows."""
        if len(self.parts(window)) == 1:
            return None
        return self._hidden(window)

    def output(self, window: Window, hidden: Any, part: slice) -> Tensor:
        """The model's output at some tokens."""
        if hidden is None:
            return self._model.run(window)
        with answering(self._blocks, [_at(hidden, part)] * len(self._blocks)):
            return self._model.run(part_of(window, part))

    def outputs(self, window: Window) -> Iterator[tuple[Window, Tensor]]:
        """Each piece as a window of its own, with the output there."""
        hidden = self.hidden(window)
        for part in self.parts(window):
            yield (window if hidden is None else part_of(window, part)), self.output(window, hidden, part)

    def loss(self, window: Window) -> tuple[float, int]:
        """As ``TextModel.loss``."""
        total, count = 0.0, 0
        for piece, output in self.outputs(window):
            assert piece.targets_BT is not None
            loss, targets = loss_of(output, piece.targets_BT)
            total, count = total + loss, count + targets
        return total, count

    def _size(self, window: Window) -> int:
        if self._tokens is None:
            self._tokens = self._tried(window)
        return min(self._tokens, max(1, window.tokens))

    def _tried(self, window: Window) -> int:
        """Tokens of a piece; more than any window has where only whole windows are right."""
        never = 1 << 40
        ids = window.inputs.get("input_ids")
        if (
            not self._blocks
            or set(window.inputs) != {"input_ids"}
            or not isinstance(ids, Tensor)
            or ids.dim() != 2
        ):
            return never
        start = part_of(window, slice(0, _TRIED))
        whole = self._model.run(start)
        tokens = max(1, _NUMBERS // max(1, whole.shape[-1]))
        if whole.dim() != 3 or tokens >= (self._model.longest or never):
            return never
        half = max(1, start.tokens // 2)
        try:
            hidden = self._hidden(start)
            if not isinstance(_tensor(hidden), Tensor) or _tensor(hidden).shape[:2] != ids[:, :_TRIED].shape:
                return never
            cut = [self.output(start, hidden, part) for part in (slice(0, half), slice(half, start.tokens))]
        except (RuntimeError, IndexError, TypeError, ValueError):
            return never
        # Products of fewer rows may be added up in another order.
        near = 1e-4 * float(whole.abs().amax())
        again = torch.cat(cut, 1)
        return tokens if again.shape == whole.shape and bool(((again - whole).abs() <= near).all()) else never

    def _hidden(self, window: Window) -> Any:
        with torch.no_grad(), stopping(self._blocks[-1]):
            try:
                self._model.module(**window.inputs)
            except Stop as stop:
                return stop.output
        raise RuntimeError("the last block was not called")


class Stop(Exception):  # noqa: N818 - no error: what was wanted has run
    """Carries a block's output out of the model."""

    def __init__(self, output: Any) -> None:
        self.output = output


@contextmanager
def stopping(block: nn.Module) -> Iterator[None]:
    """Ends the model with ``Stop`` behind a block."""

    def stop(_module: nn.Module, _arguments: Any, output: Any) -> None:
        raise Stop(output)

    hook = block.register_forward_hook(stop)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def answering(blocks: Sequence[nn.Module], answers: Sequence[Any]) -> Iterator[None]:
    """Keeps the first blocks from running: they answer with these."""

    def answer(index: int, *_arguments: Any, **_named: Any) -> Any:
        return answers[index]

    skipped = blocks[: len(answers)]
    try:
        for index, block in enumerate(skipped):
            block.forward = partial(answer, index)
        yield
    finally:
        for block in skipped:
            del block.forward


def part_of(window: Window, part: slice) -> Window:
    """Some tokens of a window that holds nothing but tokens."""
    ids_BT = window.inputs["input_ids"][:, part]
    targets_BT = None if window.targets_BT is None else window.targets_BT[:, part]
    return Window(inputs={"input_ids": ids_BT}, tokens=ids_BT.shape[1], targets_BT=targets_BT)


def largest_stack(module: nn.Module) -> tuple[str, list[nn.Module]]:
    """Path and blocks of the stack that holds most linear layers; no blocks where there is none of at least two."""
    largest = max(stacks(module), key=_linear_in, default=None)
    if largest is None or len(largest.blocks) < 2:
        return "", []
    return largest.path, list(largest.blocks.values())


def _linear_in(stack: Stack) -> int:
    return sum(len(linear_layers(block)) for block in stack.blocks.values())


def _tensor(hidden: Any) -> Any:
    return hidden[0] if isinstance(hidden, tuple) else hidden


def _at(hidden: Any, part: slice) -> Any:
    """Some tokens of what a block returned, in the form in which it returned it."""
    if isinstance(hidden, tuple):
        return (hidden[0][:, part], *hidden[1:])
    return hidden[:, part]
