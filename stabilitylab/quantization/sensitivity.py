"""What each scheme does to a model, one layer at a time, on real text.

For every linear layer and scheme, on windows of text:

    error    ||y_q - y|| / ||y||, y the layer's output on its real input
    harm     divergence per target, or squared relative error of an encoder's output (divergence.py), with only this layer quantized
    loss     increase per target, likewise
    bytes    of the stored weights, beside 2 a weight in 16 bits

Each run restarts the model at the layer's block (block_restart.py), so a text of T tokens costs about layers x schemes / 2 runs
over T tokens. Beside the model, memory holds one window's block outputs and log-probabilities, one block's layer inputs, one
quantized layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn

from stabilitylab.errors import InputError
from stabilitylab.models import TextModel, Window, linear_weight
from stabilitylab.quantization.block_restart import Restart
from stabilitylab.quantization.divergence import Divergence, ReferenceOutput
from stabilitylab.quantization.ranges import ChannelRange
from stabilitylab.quantization.replacement import quantizable_layers, quantized, replaced
from stabilitylab.quantization.rounded_weights import RoundedWeights
from stabilitylab.quantization.schemes import LinearScheme

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What one scheme does to one layer. See the head of the module."""

    error: float
    harm: float
    loss: float
    bytes: int


@dataclass(frozen=True, kw_only=True)
class LayerSensitivity:
    """What the schemes do to one layer.

    Attributes:
        path: of the layer.
        shape: output and input channels.
        range: of its input channels.
        effects: scheme's name -> effect.
        also: other places of the same matrix: for an embedding, the output tied to it.
        timed: whether its time is worth telling; a lookup's is not.
    """

    path: str
    shape: tuple[int, int]
    range: ChannelRange
    effects: Mapping[str, Effect]
    also: tuple[str, ...] = ()
    timed: bool = True

    @property
    def bytes_16(self) -> int:
        """Bytes of the weights in 16 bits."""
        return 2 * self.shape[0] * self.shape[1]


@dataclass(kw_only=True)
class _Sums:
    """Running sums of one layer and scheme."""

    off: float = 0.0
    square: float = 0.0
    harm: Divergence = field(default_factory=Divergence)
    bytes: int = 0


def reached_layers(module: nn.Module, largest: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """Layers that can be quantized and that the text reached.

    Raises:
        InputError: there is none.
    """
    layers = {path: layer for path, layer in quantizable_layers(module).items() if path in largest}
    if not layers:
        raise InputError(
            "every linear layer of the model shares its weight with another or is never called: nothing to quantize"
        )
    return layers


def measure_sensitivity(
    model: TextModel,
    windows: Iterable[Window],
    schemes: Sequence[LinearScheme],
    largest: Mapping[str, Tensor],
    *,
    progress: Progress | None = None,
    rounded: RoundedWeights | None = None,
    apart: Container[str] = (),
) -> list[LayerSensitivity]:
    """Quantize every layer in every way, alone, and measure what becomes of the output.

    Args:
        model: unchanged afterwards.
        windows: all of them count.
        schemes: to try.
        largest: path -> max|x| of each input channel (``ranges.layer_inputs``); layers without are left out.
        progress: called with layers done and layers in all.
        rounded: weights that were rounded for their inputs.
        apart: paths of layers that are measured elsewhere.

    Raises:
        InputError: a layer's weights are not finite, or no layer can be quantized.
    """
    reached = reached_layers(model.module, largest)
    layers = {path: layer for path, layer in reached.items() if path not in apart}
    windows = list(windows)
    restart = Restart(model)
    by_block: dict[int, list[str]] = {}
    for path in layers:
        by_block.setdefault(restart.block_of(path), []).append(path)
    sums = {path: {scheme.name: _Sums() for scheme in schemes} for path in layers}
    done, total = 0, len(layers) * len(windows)
    for window in windows:
        yardstick = ReferenceOutput(model, window, restart.begin(window))
        for block, paths in sorted(by_block.items()):
            inputs = _inputs(restart, block, {path: layers[path] for path in paths})
            for path in paths:
                for scheme in schemes:
                    made = scheme if rounded is None else rounded.scheme(path, scheme)
                    twin = quantized(path, layers[path], made, largest[path])
                    with replaced(model.module, {path: twin}):
                        output = restart.run(block)
                    found = sums[path][scheme.name]
                    found.harm.add(yardstick.harm(output))
                    found.bytes = twin.nbytes
                    for x, y in inputs[path]:
                        found.off += float((twin(x) - y).double().square().sum())
                        found.square += float(y.double().square().sum())
                done += 1
                if progress is not None:
                    progress(done, total)
    return [
        LayerSensitivity(
            path=path,
            shape=(linear_weight(layer).shape[0], linear_weight(layer).shape[1]),
            range=ChannelRange.of(largest[path]),
            effects={name: _effect(found) for name, found in sums[path].items()},
        )
        for path, layer in layers.items()
    ]


def _effect(found: _Sums) -> Effect:
    return Effect(
        error=math.sqrt(found.off / found.square) if found.square else 0.0,
        harm=found.harm.mean,
        loss=found.harm.mean_loss,
        bytes=found.bytes,
    )


def _inputs(
    restart: Restart, block: int, layers: Mapping[str, nn.Module]
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Inputs and outputs of a block's layers in the unchanged model, one pair a call."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {path: [] for path in layers}

    def see(path: str, _module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        found[path].append((arguments[0].clone(), output.clone()))

    hooks = [layer.register_forward_hook(partial(see, path)) for path, layer in layers.items()]
    try:
        restart.run(block)
    finally:
        for hook in hooks:
            hook.remove()
    return found
