"""A backward pass that holds one block at a time: what entered each linear layer, and gradients of functions of the output.

    held      h_0, h_1, ..., h_L      the blocks' outputs on every window, from one run without a graph
    stage L   what follows the last block:  graph from h_L to the output,    G_L = d f / d h_L
    stage b   block b alone:                graph from h_(b-1) to h_b,        G_(b-1) = (d h_b / d h_(b-1))' G_b

In each stage the layers' inputs x and the gradients d f / d y at their outputs exist, and go with the stage. Beside the model,
memory holds the blocks' outputs, G for every draw of f, and one block's graph on one window (checkpointing at every block: Chen et
al., arXiv:1604.06174). Stage L runs a few tokens at a time (logit_chunks.py). What the functions of all draws share goes back once;
gradients at layers are kept in bf16. Blocks must speak to each other through their outputs alone, which block_restart.py tries;
where they do not, the whole model is the only stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stabilitylab.models import TextModel, Window
from stabilitylab.models.freed_memory import let_go_of_pages
from stabilitylab.models.half_storage import products_of_rows
from stabilitylab.models.logit_chunks import Pieces, Stop, part_of, stopping
from stabilitylab.models.text_model import output_of
from stabilitylab.quantization.block_restart import Restart

# Given a window, its output [B, T, ...] and the place of its first token in the text's window, it returns a scalar that all draws
# share, or None, and a function that gives each draw's own part by the draw's number. The gradients are those of the sums.
Function = Callable[[Window, Tensor, int], tuple[Tensor | None, Callable[[int], Tensor]]]


@dataclass(kw_only=True)
class LayerCall:
    """One call of a layer.

    Attributes:
        window: number of the window.
        x: what entered, [..., K].
        gradients: at the output, for each draw; [draws, ..., N], bf16.
    """

    window: int
    x: Tensor
    gradients: Tensor


@dataclass(kw_only=True)
class Stage:
    """Calls of a block's layers, or of those behind the last block: path -> calls."""

    calls: dict[str, list[LayerCall]] = field(default_factory=dict)


class Backward:
    """Goes through the stages from the last to the first.

    Args:
        model: unchanged afterwards; its parameters get no gradients.
        windows: the text.
        layers: path -> layer to watch.
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
        self.outputs_square = 0.0  # sum of squares of all outputs, the measure for encoders
        self._restart = Restart(model)
        self._pieces = Pieces(model)
        self._held: list[list[Tensor]] = []
        with torch.no_grad():
            for number, window in enumerate(windows):
                if len(self._pieces.parts(window)) > 1:
                    if not number:
                        self._restart.begin(part_of(window, slice(0, 8)))
                    self._restart.hold(window)
                else:
                    output = self._restart.begin(window)
                    if not model.predicts:
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
            let_go_of_pages(self._model.module.parameters())
            yield stage

    def _one(self, stage: Stage, block: int, number: int, window: Window) -> Tensor:
        """Adds one window to a stage; returns the gradients at what entered it, [draws, ...]."""
        if block == len(self._blocks) and self._blocks:
            parts = self._pieces.parts(window)
        else:
            parts = [slice(0, window.tokens)]
        found: list[list[LayerCall]] = []
        back: list[Tensor] = []
        paths: list[str] = []
        for part in parts:
            calls, at_leaf = self._part(block, number, window, part if len(parts) > 1 else None)
            paths = [path for path, _ in calls]
            found.append([seen for _, seen in calls])
            back.append(at_leaf)
        for path, pieces in zip(paths, zip(*found, strict=True), strict=True):
            stage.calls.setdefault(path, []).append(_joined(pieces))
        return back[0] if len(back) == 1 else torch.cat(back, 2)  # [draws, B, T, C]

    def _part(
        self, block: int, number: int, window: Window, part: slice | None
    ) -> tuple[list[tuple[str, LayerCall]], Tensor]:
        """Calls of layers on a window, or on some of its tokens, with their gradients, and those at what entered the stage."""
        piece = window if part is None else part_of(window, part)
        calls: list[tuple[str, Tensor, Tensor]] = []
        rows = products_of_rows(self._model.module) if block == len(self._blocks) else nullcontext()
        with rows, torch.enable_grad(), self._watching(calls), self._from(block, number, part) as leaf:
            shared: Tensor | None = None
            try:
                output = output_of(self._model.module(**piece.inputs))
                of_draw = None
                wanted = [y for _, _, y in calls] + ([] if leaf is None else [leaf])
                if wanted:
                    shared, of_draw = self._function(piece, output, part.start if part else 0)
            except Stop as stop:
                output, of_draw = _hidden(stop.output), None
                wanted = [y for _, _, y in calls] + ([] if leaf is None else [leaf])
            once: Sequence[Tensor | None] = (
                [None] * len(wanted) if shared is None else _gradients(shared, wanted)
            )
            # Each draw's gradients go to their place before the next draw's are made: together they are a block's largest tensors.
            of_all: list[Tensor | None] = [None] * len(wanted)
            for draw in range(self._draws if wanted else 0):
                to = output if of_draw is None else of_draw(draw)
                back = self._gradients[number][draw] if of_draw is None else None
                for place, (one, more) in enumerate(zip(_gradients(to, wanted, back), once, strict=True)):
                    given = _sum(one, more)
                    if given is not None:
                        dtype = torch.bfloat16 if place < len(calls) else given.dtype
                        kept = of_all[place]
                        if kept is None:
                            kept = of_all[place] = torch.zeros(self._draws, *given.shape, dtype=dtype)
                        kept[draw] = given
        # A layer without gradients lies in front of this stage, or nothing that we look at depends on it.
        seen = [
            (path, LayerCall(window=number, x=x, gradients=kept))
            for (path, x, _), kept in zip(calls, of_all, strict=False)
            if kept is not None
        ]
        if leaf is None:
            return seen, torch.zeros(0)
        at_leaf = of_all[-1] if of_all else None
        return seen, leaf.new_zeros(self._draws, *leaf.shape) if at_leaf is None else at_leaf

    @contextmanager
    def _from(self, block: int, number: int, part: slice | None) -> Iterator[Tensor | None]:
        """Lets the model run from what entered a stage on; yields that as the leaf, or None where it is the input itself."""
        if not self._blocks or block == 0:
            with stopping(self._blocks[0]) if self._blocks else nullcontext():
                yield None
            return
        held = self._held[number][block - 1].detach()
        leaf = (held if part is None else held[:, part]).clone().requires_grad_()
        # Only their followers read what the blocks before the last skipped one answer, and those are skipped too.
        answers = [self._shape(index, leaf) for index in range(block)]
        stop = stopping(self._blocks[block]) if block < len(self._blocks) else nullcontext()
        with stop, self._restart.answering(answers):
            yield leaf

    def _shape(self, index: int, tensor: Tensor) -> Any:
        """A tensor in the form in which a block returned it."""
        held = self._restart.held[index]
        return (tensor, *held[1:]) if isinstance(held, tuple) else tensor

    @contextmanager
    def _watching(self, calls: list[tuple[str, Tensor, Tensor]]) -> Iterator[None]:
        copies: dict[tuple[int, int, torch.Size], tuple[Tensor, Tensor]] = {}

        def see(path: str, _module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad:
                output.requires_grad_()  # before the first block: nothing in front of it has a graph
            x = arguments[0].detach()
            # Layers with one input share one copy, and so its moments. The input itself is kept too: graphs of weights without
            # gradients let it go, and another tensor would come to lie in its place.
            mark = x.data_ptr(), x._version, x.shape
            if mark not in copies:
                copies[mark] = x, x.clone()
            calls.append((path, copies[mark][1], output))

        hooks = [layer.register_forward_hook(partial(see, path)) for path, layer in self._layers.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _gradients(to: Tensor, wanted: Sequence[Tensor], back: Tensor | None = None) -> Sequence[Tensor | None]:
    """Gradients at some tensors; None where the scalar does not depend on them."""
    if not to.requires_grad:
        return [None] * len(wanted)
    return torch.autograd.grad(to, wanted, back, retain_graph=True, allow_unused=True)


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other


def _joined(pieces: Sequence[LayerCall]) -> LayerCall:
    """One call from calls on the pieces of a window."""
    if len(pieces) == 1:
        return pieces[0]
    return LayerCall(
        window=pieces[0].window,
        x=torch.cat([one.x for one in pieces], -2),
        gradients=torch.cat([one.gradients for one in pieces], -2),
    )


def _hidden(output: Any) -> Tensor:
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, Tensor)
    return hidden
