"""What a whole plan does to a model, measured: all its layers quantized together, on text that the plan was not made from.

The result is what users ask about: the loss increase per target in nats, or for an encoder ||y_q - y|| / ||y|| of its output.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from stabilitylab.models import TextModel, Window
from stabilitylab.models.freed_memory import give_back_memory
from stabilitylab.models.pieces import Pieces
from stabilitylab.quantization.replacement import quantizable_layers, quantized, replaced
from stabilitylab.quantization.rounded import RoundedWeights
from stabilitylab.quantization.schemes import LinearScheme
from stabilitylab.quantization.vocabulary import EmbeddingMatrix


class Twins:
    """The quantized layers of the plan that was measured last: whole plans differ in few layers, and rounding takes long.

    Args:
        module: the model.
        largest: path -> max|x| of each input channel.
        rounded: weights that were rounded for their inputs.
        matrices: embeddings that plans may quantize, by path.
    """

    def __init__(
        self,
        module: nn.Module,
        largest: Mapping[str, Tensor],
        rounded: RoundedWeights | None = None,
        matrices: Mapping[str, EmbeddingMatrix] | None = None,
    ) -> None:
        self._layers, self._largest, self._rounded = quantizable_layers(module), largest, rounded
        self._matrices = matrices or {}
        self._held: dict[str, tuple[str, dict[str, nn.Module]]] = {}

    def of(self, schemes: Mapping[str, LinearScheme]) -> dict[str, nn.Module]:
        """The layers of a plan, path -> scheme. Those of the one before that it does not share are let go first."""
        self._held = {
            path: held
            for path, held in self._held.items()
            if path in schemes and held[0] == schemes[path].name
        }
        for path, scheme in schemes.items():
            if path not in self._held:
                self._held[path] = scheme.name, self._made(path, scheme)
        give_back_memory()
        return {place: twin for _, twins in self._held.values() for place, twin in twins.items()}

    def _made(self, path: str, scheme: LinearScheme) -> dict[str, nn.Module]:
        if path in self._matrices:
            meant = self._matrices[path].scheme(scheme)
            return {} if meant is None else self._matrices[path].twins(meant)
        made = scheme if self._rounded is None else self._rounded.scheme(path, scheme)
        return {path: quantized(path, self._layers[path], made, self._largest.get(path))}


class Verification:
    """Measures assignments of schemes to layers, each once.

    Args:
        model: unchanged afterwards.
        windows: the text.
        twins: makes the plans' layers; may be shared with another text's.
    """

    def __init__(self, model: TextModel, windows: Iterable[Window], twins: Twins) -> None:
        self._model, self._twins = model, twins
        self._windows = list(windows)
        self._pieces = Pieces(model)
        self._known: dict[tuple[tuple[str, str], ...], float] = {}
        self._own: list[Tensor] = []
        self.tokens = sum(window.tokens for window in self._windows)
        self._loss = 0.0
        if model.predicts:
            self._loss = self._mean_loss()
        else:
            # Hidden states of the text: small beside the logits that a predicting model would need.
            self._own = [model.run(window).float() for window in self._windows]

    @property
    def loss(self) -> float | None:
        """The unchanged model's loss per target in nats; None for encoders."""
        return self._loss if self._model.predicts else None

    def measure(self, schemes: Mapping[str, LinearScheme]) -> float:
        """The loss increase, or the relative error of the output, of the model with these layers quantized (path -> scheme)."""
        key = tuple(sorted((path, scheme.name) for path, scheme in schemes.items()))
        if key not in self._known:
            self._known[key] = self._measure(schemes)
        return self._known[key]

    def _measure(self, schemes: Mapping[str, LinearScheme]) -> float:
        with replaced(self._model.module, self._twins.of(schemes)):
            return self.of_the_model_as_it_stands()

    def of_the_model_as_it_stands(self) -> float:
        """The same of a model in which somebody else has replaced layers."""
        if self._model.predicts:
            return self._mean_loss() - self._loss
        off = total = 0.0
        for window, own in zip(self._windows, self._own, strict=True):
            off += float((self._model.run(window).float() - own).double().square().sum())
            total += float(own.double().square().sum())
        return math.sqrt(off / total) if total else 0.0

    def _mean_loss(self) -> float:
        total, count = 0.0, 0
        for window in self._windows:
            loss, targets = self._pieces.loss(window)
            total, count = total + loss, count + targets
        return total / max(count, 1)
