"""What a whole plan does to a model, measured with all its layers quantized together, on text that the plan was not made from.

The result is what users ask about: the loss increase per target in nats, or for an encoder ||y_q - y|| / ||y|| of its output.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from stabilitylab.models import TextModel, Window, linear_weight
from stabilitylab.models.freed_memory import give_back_memory, let_go_of_pages
from stabilitylab.models.logit_chunks import largest_stack
from stabilitylab.models.text_model import loss_of
from stabilitylab.quantization.blockwise import Blockwise, Layers, as_it_is
from stabilitylab.quantization.calibrated import needs_moments
from stabilitylab.quantization.replacement import quantizable_layers, quantized, replaced
from stabilitylab.quantization.rounded_weights import RoundedWeights
from stabilitylab.quantization.schemes import LinearScheme
from stabilitylab.quantization.vocabulary import EmbeddingMatrix

_MODEL = "the model as it is"


def _nothing() -> None:
    """Nobody looks on."""


def block_count(model: TextModel) -> int:
    """How many blocks a model is read by; 1 where it is read whole."""
    return max(1, len(largest_stack(model.module)[1]))


class Twins:
    """Makes the quantized layers of plans. It keeps what it made in files, where there is a folder for them: whole plans differ in
    few layers, and rounding takes long.

    Args:
        module: the model.
        largest: path -> max|x| of each input channel.
        rounded: weights that were rounded for their inputs, and the place to keep others.
        matrices: embeddings that plans may quantize, by path.
    """

    def __init__(
        self,
        module: nn.Module,
        largest: Mapping[str, Tensor],
        rounded: RoundedWeights | None = None,
        matrices: Mapping[str, EmbeddingMatrix] | None = None,
    ) -> None:
        self._module, self._layers = module, quantizable_layers(module)
        self._largest, self._rounded = largest, rounded
        self._matrices = matrices or {}

    def of(self, schemes: Mapping[str, LinearScheme]) -> dict[str, nn.Module]:
        """Path -> the layer to put there."""
        found: dict[str, nn.Module] = {}
        for path, scheme in schemes.items():
            found |= self._made(path, scheme)
        return found

    def by_block(
        self, schemes: Mapping[str, LinearScheme], blocks: Sequence[str]
    ) -> dict[str | None, dict[str, LinearScheme]]:
        """Schemes by the block that contains the layer; None: in none, or in several."""
        places: dict[int, list[str]] = {}
        for name, found in self._module.named_modules(remove_duplicate=False):
            places.setdefault(id(found), []).append(name)
        parted: dict[str | None, dict[str, LinearScheme]] = {}
        for path, scheme in schemes.items():
            names = places[id(self._module.get_submodule(path))]
            block = next((one for one in blocks if path.startswith(f"{one}.")), None)
            if block is not None and not all(name.startswith(f"{block}.") for name in names):
                block = None
            parted.setdefault(block, {})[path] = scheme
        return parted

    def _made(self, path: str, scheme: LinearScheme) -> dict[str, nn.Module]:
        matrix = self._matrices.get(path)
        if matrix is not None:
            meant = matrix.scheme(scheme)
            if meant is None:
                return {}
            if self._rounded is not None and needs_moments(meant):
                return matrix.places(self._rounded.scheme(path, meant).layer(matrix.weight, name=path))
            return matrix.places(self._kept(path, meant, matrix.weight, lambda: matrix.made(meant)))
        layer = self._layers[path]
        if self._rounded is not None and needs_moments(scheme):
            return {path: quantized(path, layer, self._rounded.scheme(path, scheme))}
        largest = self._largest.get(path)
        bias = layer.bias if isinstance(layer.bias, Tensor) else None
        made = self._kept(
            path, scheme, linear_weight(layer), lambda: quantized(path, layer, scheme, largest), bias
        )
        return {path: made}

    def _kept(
        self,
        path: str,
        scheme: LinearScheme,
        weight: Tensor,
        make: Callable[[], Any],
        bias: Tensor | None = None,
    ) -> Any:
        """A layer from its file, or made and filed."""
        if self._rounded is None:
            return make()
        found = self._rounded.found(path, scheme, weight, bias)
        if found is None:
            found = self._rounded.filed(path, scheme, make(), weight, bias)
        let_go_of_pages([weight])
        return found


class Verification:
    """Measures assignments of schemes to layers, each once, a block at a time (blockwise.py).

    Args:
        model: unchanged afterwards.
        windows: the text.
        twins: makes the plans' layers; may be shared with another text's.
        known: earlier measurements, to which new ones are added; nothing by default.
        step: called for every block of a plan.
    """

    def __init__(
        self,
        model: TextModel,
        windows: Iterable[Window],
        twins: Twins,
        known: MutableMapping[str, float] | None = None,
        step: Callable[[], None] = _nothing,
    ) -> None:
        self._model, self._twins, self._step = model, twins, step
        self._windows = list(windows)
        self._known: MutableMapping[str, float] = {} if known is None else known
        self._own: list[Tensor] = []
        self.tokens = sum(window.tokens for window in self._windows)
        self._reading = Blockwise(model, self._windows[0])
        self._loss = 0.0
        if model.predicts:
            if _MODEL not in self._known:
                self._known[_MODEL] = self._mean_loss()
            self._loss = self._known[_MODEL]
        else:
            # Hidden states of the text: small beside the logits that a predicting model would need.
            self._own = [output.float() for _, _, output in self._reading.outputs(self._windows)]

    @property
    def loss(self) -> float | None:
        """The unchanged model's loss per target in nats; None for encoders."""
        return self._loss if self._model.predicts else None

    def measure(self, schemes: Mapping[str, LinearScheme]) -> float:
        """The loss increase, or the relative error of the output, of the model with these layers quantized (path -> scheme)."""
        key = plan_mark(schemes)
        if key not in self._known:
            self._known[key] = self._measure(schemes)
        return self._known[key]

    def _measure(self, schemes: Mapping[str, LinearScheme]) -> float:
        module, blocks = self._model.module, self._reading.paths
        parted = self._twins.by_block(schemes, blocks)

        @contextmanager
        def layers(block: str) -> Iterator[None]:
            with replaced(module, self._twins.of(parted.get(block, {}))):
                yield
            give_back_memory()
            self._step()

        with replaced(module, self._twins.of(parted.get(None, {}))):
            found = self._measured(layers)
        give_back_memory()
        return found

    def of_the_model_as_it_stands(self) -> float:
        """The same for a model in which somebody else has replaced layers."""
        return self._measured(as_it_is)

    def _measured(self, layers: Layers) -> float:
        if self._model.predicts:
            return self._mean_loss(layers) - self._loss
        off = total = 0.0
        outputs = self._reading.outputs(self._windows, layers)
        for (_, _, output), own in zip(outputs, self._own, strict=True):
            off += float((output.float() - own).double().square().sum())
            total += float(own.double().square().sum())
        return math.sqrt(off / total) if total else 0.0

    def _mean_loss(self, layers: Layers = as_it_is) -> float:
        sums = [0.0] * len(self._windows)
        count = 0
        for number, piece, output in self._reading.outputs(self._windows, layers):
            assert piece.targets_BT is not None
            loss, targets = loss_of(output, piece.targets_BT)
            sums[number] += loss
            count += targets
        return sum(sums) / max(count, 1)


def plan_mark(schemes: Mapping[str, LinearScheme]) -> str:
    """16 hexadecimal digits of which layer has which scheme."""
    named = sorted((path, scheme.name) for path, scheme in schemes.items())
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()[:16]
