"""Sensitivities of a model's two ends, as large as its vocabulary: embedding and output, one matrix where they are tied.

Gradients at an output of V numbers would take draws x tokens x V numbers, and a matrix with two uses is off at both ends of the
model. So runs measure these few layers: with all uses of a matrix quantized, the divergence from the model's own output
(divergence.py), a few tokens at a time (logit_chunks.py).

    error    ||W_q - W|| / ||W|| of the matrix' numbers
    harm     as in sensitivity.py
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from stabilitylab.model_structure import blocks
from stabilitylab.models import TextModel, Window, linear_layers, linear_weight
from stabilitylab.models.freed_memory import give_back_memory, let_go_of_pages
from stabilitylab.models.logit_chunks import Pieces, part_of
from stabilitylab.quantization.calibrated import needs_moments
from stabilitylab.quantization.divergence import Divergence, ReferenceOutput
from stabilitylab.quantization.input_moments import Moments
from stabilitylab.quantization.plan_checkpoint import SoFar
from stabilitylab.quantization.ranges import ChannelRange
from stabilitylab.quantization.replacement import quantizable_layers, quantized, replaced
from stabilitylab.quantization.rounded_weights import RoundedWeights, dear
from stabilitylab.quantization.schemes import LinearScheme
from stabilitylab.quantization.sensitivity import Effect, LayerSensitivity
from stabilitylab.quantization.time_left import Pace
from stabilitylab.quantization.vocabulary import EmbeddingMatrix, rows_of

_AT_ONCE = 1 << 22


def output_layers(model: TextModel, matrices: Mapping[str, EmbeddingMatrix]) -> dict[str, nn.Module]:
    """Linear layers behind the blocks, with a weight of their own, that make as many numbers as the vocabulary has pieces.

    Args:
        model: only one that predicts tokens has such layers.
        matrices: of its embeddings; they say how many pieces there are.
    """
    module: Any = model.module
    sizes = {len(matrix.weight) for matrix in matrices.values()}
    ask = getattr(module, "get_output_embeddings", None)
    try:
        told = ask() if callable(ask) else None
    except (NotImplementedError, AttributeError):
        told = None
    inside = tuple(f"{path}." for path in blocks(module))
    if not model.predicts:
        return {}
    return {
        path: layer
        for path, layer in quantizable_layers(module).items()
        if not path.startswith(inside) and (layer is told or len(linear_weight(layer)) in sizes)
    }


class Ends:
    """Measures the sensitivities of the ends.

    Args:
        model: unchanged afterwards.
        windows: the text.
        largest: path -> max|x| of each input channel of linear layers.
    """

    def __init__(self, model: TextModel, windows: Sequence[Window], largest: Mapping[str, Tensor]) -> None:
        self._model, self._windows, self._largest = model, windows, largest
        self._pieces = Pieces(model)

    @cached_property
    def _own(self) -> list[Any]:
        """The last block's outputs in the model as it is."""
        return [self._pieces.hidden(window) for window in self._windows]

    @torch.inference_mode()
    def embedding(
        self, matrix: EmbeddingMatrix, schemes: Sequence[LinearScheme], rounded: RoundedWeights | None = None
    ) -> LayerSensitivity:
        """Sensitivity of an embedding's matrix, with all its uses."""
        effects: dict[str, Effect] = {}
        known: dict[str, Effect] = {}
        rows, columns = matrix.weight.shape
        moments: Moments | None = None
        for scheme in schemes:
            meant = matrix.scheme(scheme)
            if meant is None:
                effects[scheme.name] = Effect(error=0.0, harm=0.0, loss=0.0, bytes=2 * rows * columns)
                continue
            if meant.name not in known:
                if needs_moments(meant) and moments is None:
                    moments = self._moments(*next(iter(matrix.outputs.items())))
                made = matrix.made(meant, moments)
                give_back_memory()  # the search for scales leaves holes
                if (
                    rounded is not None
                ):  # lookups read the file's pages, and memory holds the output's kernel alone
                    made = rounded.filed(matrix.path, meant, made, matrix.weight)
                error = _error(matrix.weight, made)
                give_back_memory()
                known[meant.name] = self._effect(matrix.places(made), error, made.nbytes, from_start=True)
                del made
                give_back_memory()
            effects[scheme.name] = known[meant.name]
        output = next(iter(matrix.outputs), None)
        largest = self._largest.get(output) if output is not None else None
        if largest is None:
            largest = _largest(matrix.weight)
        return LayerSensitivity(
            path=matrix.path,
            shape=(rows, columns),
            range=ChannelRange.of(largest),
            effects=effects,
            also=tuple(place for place in (*matrix.embeddings, *matrix.outputs) if place != matrix.path),
            timed=bool(matrix.outputs),
        )

    @torch.inference_mode()
    def output(
        self, path: str, schemes: Sequence[LinearScheme], rounded: RoundedWeights | None
    ) -> LayerSensitivity:
        """Sensitivity of an output projection with a weight of its own."""
        layer = linear_layers(self._model.module)[path]
        weight = linear_weight(layer)
        moments = self._moments(path, layer) if any(needs_moments(scheme) for scheme in schemes) else None
        effects = {}
        bias = layer.bias if isinstance(layer.bias, Tensor) else None
        for scheme in schemes:
            twin = quantized(path, layer, scheme, self._largest[path], moments)
            if rounded is not None and dear(scheme):
                twin = rounded.filed(path, scheme, twin, weight, bias)
            effects[scheme.name] = self._effect({path: twin}, None, twin.nbytes, from_start=False)
        return LayerSensitivity(
            path=path,
            shape=(weight.shape[0], weight.shape[1]),
            range=ChannelRange.of(self._largest[path]),
            effects=effects,
        )

    def _moments(self, path: str, layer: nn.Module) -> Moments:
        found = Moments(linear_weight(layer).shape[1])
        hook = layer.register_forward_pre_hook(lambda _module, arguments: found.add(arguments[0]))
        try:
            for window in self._windows:
                for _ in self._pieces.outputs(window):
                    pass
        finally:
            hook.remove()
        return found

    def _effect(
        self, twins: Mapping[str, nn.Module], error: float | None, nbytes: int, *, from_start: bool
    ) -> Effect:
        sums, off, square = Divergence(), 0.0, 0.0
        for window, own in zip(self._windows, self._own, strict=True):
            hidden = own
            if from_start:
                with replaced(self._model.module, twins):
                    hidden = self._pieces.hidden(window)
            for part in self._pieces.parts(window):
                piece = window if own is None else part_of(window, part)
                before = self._pieces.output(window, own, part)
                with replaced(self._model.module, twins):
                    after = self._pieces.output(window, hidden, part)
                sums.add(ReferenceOutput(self._model, piece, before).harm(after))
                if error is None:
                    off += float((after - before).double().square().sum())
                    square += float(before.double().square().sum())
        if error is None:
            error = math.sqrt(off / square) if square else 0.0
        return Effect(error=error, harm=sums.mean, loss=sums.mean_loss, bytes=nbytes)


def measured_ends(
    ends: Ends,
    matrices: Mapping[str, EmbeddingMatrix],
    outputs: Sequence[str],
    schemes: Sequence[LinearScheme],
    rounded: RoundedWeights | None,
    pace: Pace,
    so_far: SoFar,
) -> tuple[list[LayerSensitivity], list[LayerSensitivity]]:
    """Sensitivities of embeddings, and of output projections; those that an interrupted pass measured stay as they were."""
    if not matrices and not outputs:
        return [], []
    give_back_memory()  # what gradients of the layers left
    known = dict(so_far.ends)
    total = len(matrices) + len(outputs)
    with pace.of(
        "measuring embedding and output", total, sum(path in known for path in [*matrices, *outputs])
    ):

        def one(path: str, measure: Callable[[], LayerSensitivity]) -> LayerSensitivity:
            if path in known:
                return known[path]
            found = measure()
            so_far.add_end(found)
            pace.step()
            return found

        first = [
            one(path, partial(ends.embedding, matrix, schemes, rounded)) for path, matrix in matrices.items()
        ]
        last = [one(path, partial(ends.output, path, schemes, rounded)) for path in outputs]
    return first, last


def _split(weight: Tensor) -> tuple[Tensor, ...]:
    return torch.split(weight, max(1, _AT_ONCE // max(1, weight.shape[1])))


def _largest(weight: Tensor) -> Tensor:
    """max |w| of each column."""
    found = torch.zeros(weight.shape[1], device=weight.device)
    for part in _split(weight):
        ends = torch.aminmax(part, dim=0)
        found = torch.maximum(found, torch.maximum(ends.max, -ends.min).float())
        let_go_of_pages([part])
    return found


def _error(weight: Tensor, made: Any) -> float:
    off = square = 0.0
    start = 0
    for part in _split(weight):
        rows = torch.arange(start, start + len(part), device=weight.device)
        start += len(part)
        off += float((rows_of(made, rows) - part.float()).double().square().sum())
        square += float(part.double().square().sum())
        let_go_of_pages([part])
    return math.sqrt(off / square) if square else 0.0
