"""The range of every channel that enters a linear layer, over a text: SmoothQuant scales by it, and outlier channels show in it.

Each layer keeps one vector of K maxima, and the first layer of each shape a few rows of input, for timing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from stabilitylab.models import TextModel, Window, linear_weight
from stabilitylab.models.logit_chunks import Pieces

# A channel counts as an outlier if it reaches this many times the layer's median channel.
OUTLIER_RATIO = 10.0


@dataclass(frozen=True, kw_only=True)
class ChannelRange:
    """What the channels of a layer's input reach.

    Attributes:
        channels: how many there are.
        outliers: how many reach ``OUTLIER_RATIO`` times the median.
        ratio: the largest over the median.
        largest: the largest value.
    """

    channels: int
    outliers: int
    ratio: float
    largest: float

    @classmethod
    def of(cls, largest_K: Tensor) -> ChannelRange:
        """From max|x| of each channel."""
        values = largest_K.double()
        median = float(values.median())
        top = float(values.max())
        return cls(
            channels=len(values),
            outliers=int((values >= OUTLIER_RATIO * median).sum()) if median > 0 else 0,
            ratio=top / median if median > 0 else 1.0,
            largest=top,
        )


@dataclass(kw_only=True)
class Inputs:
    """What entered the layers.

    Attributes:
        largest: path -> max|x| of each channel, [K]; layers that the text never reaches are missing.
        samples: (N, K) -> path of the first layer of that shape and some rows of its input, [at most 256, K].
    """

    largest: dict[str, Tensor] = field(default_factory=dict)
    samples: dict[tuple[int, int], tuple[str, Tensor]] = field(default_factory=dict)


def layer_inputs(
    model: TextModel, windows: Iterable[Window], layers: Mapping[str, nn.Module], *, rows: int = 256
) -> Inputs:
    """Run the model over windows and watch what enters the layers."""
    found = Inputs()

    def see(path: str, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        x_MK = arguments[0].detach().reshape(-1, arguments[0].shape[-1])
        if not len(x_MK):
            return
        largest = x_MK.abs().amax(0).float()
        before = found.largest.get(path)
        found.largest[path] = largest if before is None else torch.maximum(before, largest)
        size, columns = linear_weight(module).shape
        shape = size, columns
        if shape not in found.samples:
            found.samples[shape] = path, x_MK[:rows].clone()

    windows, pieces = list(windows), Pieces(model)
    if windows:
        pieces.parts(windows[0])  # tried before anything is seen
    hooks = [layer.register_forward_pre_hook(partial(see, path)) for path, layer in layers.items()]
    try:
        for window in windows:
            for _ in pieces.outputs(window):
                pass
    finally:
        for hook in hooks:
            hook.remove()
    return found
