"""What each scheme does to a model, one layer at a time, from the curvature of its output: one backward pass, no run for each.

To second order, a layer's output that is off by D_t at token t moves the model's distributions p apart by

    divergence    1/2 E[(sum_t g_t . D_t)^2],    g_t = d log p(y) / d y_t    for tokens y drawn from p itself       (Fisher)

and an encoder's output by E[(sum_t g_t . D_t)^2] for g_t = d (v . output) / d y_t with random signs v (Gauss and Newton). D_t is
the layer's own error on its real input, so every scheme costs a rounding of the weight and a product, and no run of the model.

    harm_rows     E[sum_t (g_t . D_t)^2]        errors of different tokens taken as unrelated
    harm_whole    E[(sum_t g_t . D_t)^2]        as it stands

The second is right, and noisy: one squared number for each window and draw. The first is steady, and misses what errors have in
common: W is off by the same at every token (the first is half of the truth for value projections, and more than the truth for
keys). So

    harm    (n whole + m f rows) / (n + m),    f = sum whole / sum rows over layers of one kind,    n = windows x draws,    m = 16

where layers are of one kind if their paths differ in numbers only. Each draw costs a pass backward and the roundings stay the same,
so there are many draws. Measured on SmolLM2-135M this ranks best (experiments/RESULTS.md).

Source: Fisher as curvature of the divergence: Martens, arXiv:1412.1193, section 5; for choosing bits: HAWQ-V2 (1911.03852) takes
traces of the Hessian, ModelOpt's auto_quantize a gradient score. Limits: small disturbances; what saturates is overestimated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stabilitylab.models import TextModel, Window, linear_weight
from stabilitylab.models.freed_memory import give_back_memory
from stabilitylab.models.text_model import rows_at_once
from stabilitylab.quantization.backward import Backward, LayerCall
from stabilitylab.quantization.calibrated import needs_moments
from stabilitylab.quantization.input_moments import Moments
from stabilitylab.quantization.ranges import ChannelRange
from stabilitylab.quantization.replacement import quantized
from stabilitylab.quantization.schemes import LinearScheme
from stabilitylab.quantization.sensitivity import Effect, LayerSensitivity

DRAWS = 16
_STEADY_DRAWS = 4  # a sum over this many tokens needs no more
_STEADY = 16  # squares that the steady sum is worth


@dataclass(kw_only=True)
class Estimated:
    """One layer and scheme: sums over draws, windows and tokens, not yet divided."""

    off: float = 0.0
    square: float = 0.0
    rows: float = 0.0
    whole: float = 0.0
    bytes: int = 0


@dataclass(kw_only=True)
class EstimatedLayer:
    """One layer."""

    path: str
    shape: tuple[int, int]
    range: ChannelRange
    schemes: dict[str, Estimated] = field(default_factory=dict)


# Called with a layer's path, a scheme and the twin made by it, before the twin is let go.
Keep = Callable[[str, LinearScheme, Any], None]
Done = Callable[[EstimatedLayer], None]


def estimate_sensitivity(
    model: TextModel,
    windows: Sequence[Window],
    schemes: Sequence[LinearScheme],
    largest: dict[str, Tensor],
    layers: dict[str, nn.Module],
    *,
    draws: int = DRAWS,
    known: Sequence[EstimatedLayer] = (),
    keep: Keep | None = None,
    done: Done | None = None,
) -> list[LayerSensitivity]:
    """As ``sensitivity.measure_sensitivity``, to second order, in a fraction of its time.

    Args:
        model: unchanged afterwards.
        windows: all of them count.
        schemes: to try.
        largest: path -> max|x| of each input channel.
        layers: path -> layer that the text reaches.
        draws: of the function whose gradients are taken.
        known: layers of an earlier, unfinished pass over the same text.
        keep: called with every twin.
        done: called with every layer.
    """
    function = partial(_drawn_loss, draws) if model.predicts else _drawn_projection
    backward = Backward(model, windows, layers, function, draws)
    found = {layer.path: layer for layer in known}
    whole = model.predicts and all(path in found for path in layers)  # else the pass tells outputs_square
    for stage in () if whole else backward:
        moments: dict[tuple[int, ...], Moments] = {}
        for path, calls in stage.calls.items():
            if path in found:
                continue
            own = None
            if any(needs_moments(scheme) for scheme in schemes):
                key = tuple(id(call.x) for call in calls)
                if key not in moments:
                    moments[key] = Moments(calls[0].x.shape[-1])
                    for call in calls:
                        moments[key].add(call.x)
                own = moments[key]
            found[path] = _layer(path, layers[path], calls, schemes, largest[path], own, keep)
            if done is not None:
                done(found[path])
        stage.calls.clear()
        moments.clear()
        give_back_memory()  # twins of every shape came and went
    count = float(draws) * (2 * _targets(windows) if model.predicts else backward.outputs_square)
    return assembled(
        [found[path] for path in layers if path in found],
        count,
        freedom=draws * len(windows),
        predicts=model.predicts,
    )


def assembled(
    layers: Sequence[EstimatedLayer], count: float, *, freedom: int, predicts: bool
) -> list[LayerSensitivity]:
    """Sensitivities from sums: the steady sum, scaled to the right one over the layers of a kind, and some of the layer's own.

    Args:
        layers: their sums.
        count: what sums are divided by.
        freedom: windows x draws, the squares in each ``whole``.
        predicts: whether harm is a divergence.
    """
    kinds: dict[str, list[EstimatedLayer]] = {}
    for layer in layers:
        kinds.setdefault(_kind(layer.path), []).append(layer)
    made = []
    for layer in layers:
        effects = {}
        for name, one in layer.schemes.items():
            alike = [other.schemes[name] for other in kinds[_kind(layer.path)]]
            rows, whole = sum(other.rows for other in alike), sum(other.whole for other in alike)
            steady = one.rows * (whole / rows if rows > 0 and math.isfinite(whole / rows) else 1.0)
            harm = (freedom * one.whole + _STEADY * steady) / (freedom + _STEADY) / count if count else 0.0
            effects[name] = Effect(
                error=math.sqrt(one.off / one.square) if one.square else 0.0,
                harm=harm,
                loss=harm if predicts else 0.0,
                bytes=one.bytes,
            )
        made.append(LayerSensitivity(path=layer.path, shape=layer.shape, range=layer.range, effects=effects))
    return made


def _kind(path: str) -> str:
    return re.sub(r"\d+", "", path)


@torch.inference_mode()
def _layer(
    path: str,
    layer: nn.Module,
    calls: Sequence[LayerCall],
    schemes: Sequence[LinearScheme],
    largest: Tensor,
    moments: Moments | None,
    keep: Keep | None,
) -> EstimatedLayer:
    rows, columns = linear_weight(layer).shape
    found = EstimatedLayer(path=path, shape=(rows, columns), range=ChannelRange.of(largest))
    outputs = [layer(call.x) for call in calls]
    offs: list[list[Tensor]] = [[] for _ in calls]  # of each call, for each scheme
    for scheme in schemes:
        twin = quantized(path, layer, scheme, largest, moments)
        sums = found.schemes[scheme.name] = Estimated(bytes=twin.nbytes)
        for call, y, off_of in zip(calls, outputs, offs, strict=True):
            off = (twin(call.x) - y).float()
            sums.off += float(off.double().square().sum())
            sums.square += float(y.double().square().sum())
            drawn = call.gradients[:_STEADY_DRAWS].float()
            dots = (drawn * off).sum(-1).double()
            sums.rows += float(dots.square().sum()) * len(call.gradients) / len(drawn)
            off_of.append(off.flatten())
        if keep is not None:
            keep(path, scheme, twin)
        del twin
    # One product for all schemes: the gradients of many draws are the larger part, and it reads them once.
    whole: dict[int, Tensor] = {}
    for call, off_of in zip(calls, offs, strict=True):
        dots_SD = (torch.stack(off_of) @ call.gradients.float().flatten(1).T).double()
        whole[call.window] = whole[call.window] + dots_SD if call.window in whole else dots_SD
    for place, scheme in enumerate(schemes):
        found.schemes[scheme.name].whole = float(sum(d[place].square().sum() for d in whole.values()))
    return found


def _targets(windows: Sequence[Window]) -> int:
    return sum(int((w.targets_BT >= 0).sum()) for w in windows if w.targets_BT is not None)


def _drawn_loss(
    draws: int, window: Window, output_BTV: Tensor, start: int
) -> tuple[Tensor, Callable[[int], Tensor]]:
    """-log p of tokens y drawn from the model's own distributions, summed over the positions that have a target:

    sum_t log sum_v exp(z_t[v])  -  sum_t z_t[y_t],    of which the first is the same for all draws.
    """
    assert window.targets_BT is not None
    place_N2 = (window.targets_BT >= 0).nonzero()
    logits_NV = output_BTV[place_N2[:, 0], place_N2[:, 1]].float()
    drawn_SN = torch.empty(draws, len(place_N2), dtype=torch.int64)
    for part in rows_at_once(len(place_N2), output_BTV.shape[-1]):
        below_nV = torch.softmax(logits_NV[part].detach(), -1).double().cumsum_(-1)
        seeded = torch.Generator().manual_seed(7919 * start + part.start)
        chance_nS = torch.rand(len(below_nV), draws, generator=seeded, dtype=torch.float64)
        chosen_nS = torch.searchsorted(below_nV, chance_nS.to(below_nV) * below_nV[:, -1:], right=True)
        drawn_SN[:, part] = chosen_nS.T.clamp(max=output_BTV.shape[-1] - 1).cpu()
    shared = torch.logsumexp(logits_NV, -1).sum()

    def of_draw(draw: int) -> Tensor:
        return -logits_NV.gather(-1, drawn_SN[draw].to(logits_NV.device)[:, None]).sum()

    return shared, of_draw


def _drawn_projection(
    _window: Window, output: Tensor, _start: int
) -> tuple[Tensor | None, Callable[[int], Tensor]]:
    """The output times random signs."""

    def of_draw(draw: int) -> Tensor:
        seeded = torch.Generator().manual_seed(7919 * draw)
        signs = torch.randint(0, 2, output.shape, generator=seeded).to(output) * 2 - 1
        return (output * signs).sum()

    return None, of_draw
