"""A backward pass that holds one block at a time: what entered each linear layer, and gradients of functions of the output.

    held      h_0, h_1, ..., h_L      the blocks' outputs on every window, from one run without a graph
    stage L   what follows the last block:  graph from h_L to the output,    G_L = d f / d h_L
    stage b   block b alone:                graph from h_(b-1) to h_b,        G_(b-1) = (d h_b / d h_(b-1))' G_b

In each stage the layers' inputs x and the gradients d f / d y at their outputs are there, and are let go with the stage: beside the
model there are the held outputs, G for every draw of f, and one block's graph on one window (checkpointing at every block: Chen et
al., arXiv:1604.06174). Blocks must speak to each other through their outputs alone, which is tried (restart.py); where they do
not, the whole model is the only stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stabilitylab.models import TextModel, Window
from stabilitylab.models.text_model import output_of
from stabilitylab.quantization.restart import Restart

# Of a window and its output [B, T, ...]: a scalar whose gradients are wanted.
Function = Callable[[Window, Tensor, int], Tensor]


@dataclass(kw_only=True)
class Seen:
    """One call of a layer.

    Attributes:
        window: number of the window.
        x: what entered, [..., K].
        gradients: at the output, for each draw; [draws, ..., N].
    """

    window: int
    x: Tensor
    gradients: Tensor


@dataclass(kw_only=True)
class Stage:
    """What was seen of a block's layers, or of those behind the last block: path -> calls."""

    calls: dict[str, list[Seen]] = field(default_factory=dict)


class _Stop(Exception):  # noqa: N818 - no error: the block that was wanted has run
    """Carries a block's output out of the model."""

    def __init__(self, output: Tensor) -> None:
        self.output = output


class Backward:
    """Stages from the last to the first.

    Args:
        model: unchanged afterwards; its parameters get no gradients.
        windows: the text.
        layers: path -> layer to be seen.
        function: of the output, one for each draw.
        draws: how many.
    """

    def __init__(
        self,
        model: TextModel,
        windows: Sequence[Window],
        layers: Mapping[str, nn.Module],
        function: Function,
        draws: int,
    ) -> None:
        self._model, self._windows, self._layers = model, windows, layers
        self._function, self._draws = function, draws
        self.outputs_square = 0.0  # sum of squares of all outputs, which encoders are measured by
        self._restart = Restart(model)
        self._held: list[list[Tensor]] = []
        with torch.no_grad():
            for window in windows:
                output = self._restart.begin(window)
                self.outputs_square += float(output.double().square().sum())
                self._held.append([_hidden(held) for held in self._restart.held])
        self._blocks = self._restart.modules
        if not self._blocks:
            self._held = []
        self._gradients: list[Tensor] = []

    @property
    def stages(self) -> int:
        """How many there are."""
        return len(self._blocks) + 1

    def __iter__(self) -> Iterator[Stage]:
        for block in range(len(self._blocks), -1, -1):
            stage, gradients = Stage(), []
            for number, window in enumerate(self._windows):
                gradients.append(self._one(stage, block, number, window))
            self._gradients = gradients
            if self._held:
                for held in self._held:
                    del held[block:]
            yield stage

    def _one(self, stage: Stage, block: int, number: int, window: Window) -> Tensor:
        """Adds one window to a stage; returns the gradients at what entered it, [draws, ...]."""
        calls: list[tuple[str, Tensor, Tensor]] = []
        with torch.enable_grad(), self._watching(calls), self._from(block, number) as leaf:
            try:
                output = output_of(self._model.module(**window.inputs))
                stopped = False
            except _Stop as stop:
                output, stopped = stop.output, True
            wanted = [y for _, _, y in calls] + ([] if leaf is None else [leaf])
            drawn: list[tuple[Tensor | None, ...]] = []
            for draw in range(self._draws if wanted else 0):
                to = output if stopped else self._function(window, output, draw)
                back = self._gradients[number][draw] if stopped else None
                drawn.append(torch.autograd.grad(to, wanted, back, retain_graph=True, allow_unused=True))
        for place, (path, x, y) in enumerate(calls):
            found = [one[place] for one in drawn]
            stage.calls.setdefault(path, []).append(
                Seen(
                    window=number,
                    x=x,
                    gradients=torch.stack([torch.zeros_like(y) if g is None else g for g in found]).detach(),
                )
            )
        if leaf is None:
            return torch.zeros(0)
        return torch.stack([torch.zeros_like(leaf) if one[-1] is None else one[-1] for one in drawn])

    @contextmanager
    def _from(self, block: int, number: int) -> Iterator[Tensor | None]:
        """The model from what entered a stage on; the leaf is that, or None where it is the input itself."""
        if not self._blocks or block == 0:
            hooks = [self._blocks[0].register_forward_hook(_stop)] if self._blocks else []
            try:
                yield None
            finally:
                for hook in hooks:
                    hook.remove()
            return
        leaf = self._held[number][block - 1].detach().clone().requires_grad_()
        # What the blocks before the last skipped one answer is read by nobody but their followers, which are skipped too.
        answers = [self._shape(index, leaf) for index in range(block)]
        hooks = [self._blocks[block].register_forward_hook(_stop)] if block < len(self._blocks) else []
        try:
            with self._restart.answering(answers):
                yield leaf
        finally:
            for hook in hooks:
                hook.remove()

    def _shape(self, index: int, tensor: Tensor) -> Any:
        """A tensor in the form in which a block returned it."""
        held = self._restart.held[index]
        return (tensor, *held[1:]) if isinstance(held, tuple) else tensor

    @contextmanager
    def _watching(self, calls: list[tuple[str, Tensor, Tensor]]) -> Iterator[None]:
        copies: dict[tuple[int, int, torch.Size], Tensor] = {}

        def see(path: str, _module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad:
                output.requires_grad_()  # before the first block: nothing in front of it has a graph
            x = arguments[0].detach()
            # Layers with one input share one copy, and so its moments.
            mark = x.data_ptr(), x._version, x.shape
            calls.append((path, copies.setdefault(mark, x.clone()), output))

        hooks = [layer.register_forward_hook(partial(see, path)) for path, layer in self._layers.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _stop(_module: nn.Module, _arguments: Any, output: Any) -> None:
    raise _Stop(_hidden(output))


def _hidden(output: Any) -> Tensor:
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, Tensor)
    return hidden
