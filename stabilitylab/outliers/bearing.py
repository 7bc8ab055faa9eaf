"""Which low-bit formats each linear layer tolerates, what breaks it where it does not, and what a remedy would change.

A layer bears a format if rounding its input, and its weight, errs less than ``FACTOR`` times as much as on normal numbers: no bit
is lost to outliers. Every token, and every output channel, counts alike: e = sqrt(mean_t |x^_t - x_t|^2 / |x_t|^2), since over the
whole matrix one massive token would hide what its scale does to all others. To find what breaks it, we leave suspects out and round
again: the first of these whose absence lets the rest be borne, else the one that more than halves the error:

    first token    the window's first position, on which attention rests (a sink, 2309.17453)
    channels       those whose median magnitude over tokens is ``STEADY`` times the median channel's, without the first token
    tokens         rows whose largest is ``STEADY`` times the median row's
    spread         none of these alone: large values lie in many places

Remedies, by the same error: a rotation of the input and the weight by a Hadamard matrix with random signs (QuaRot, 2404.00456), and
SmoothQuant's scaling of channels with exponent .5 (2211.10438). We look at the first ``ROWS`` positions of one window of the input,
and at a sample of the weight's rows under the scale of all. An expert is a layer of its own, named by its path.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from stabilitylab.formats import gaussian_error, rotate, rotation_signs, what_if_format, what_if_sums
from stabilitylab.models import TextModel, Window, linear_layers, linear_weight
from stabilitylab.outliers import words

FORMATS = ("int8-tensor", "int8-row", "fp8-e4m3-tensor", "mxfp8-e4m3", "mxfp4", "nvfp4")
FACTOR, STEADY, ROWS = 2.0, 10.0, 256
WIDEST_ROTATION = 256
Cause = Literal["first token", "channels", "tokens", "spread", "weight"]


@dataclass(frozen=True, kw_only=True)
class Broken:
    """Why a layer does not bear a format.

    Attributes:
        cause: see the head of the module; "weight" where the weight breaks.
        detail: channels, positions or sizes, in words.
    """

    cause: Cause
    detail: str


@dataclass(frozen=True, kw_only=True)
class LayerBearing:
    """One layer; errors are over what normal numbers have, so 1 is usual and ``FACTOR`` the limit.

    Attributes:
        path: of the layer.
        plain, rotated, smoothed: format -> the larger of the input's and the weight's error: as it is, and after a remedy.
        broken: format -> why the layer does not bear it; no entry where it does.
    """

    path: str
    plain: Mapping[str, float]
    rotated: Mapping[str, float]
    smoothed: Mapping[str, float]
    broken: Mapping[str, Broken]

    def bears(self, format: str) -> bool:
        """Whether the layer bears the format as it is."""
        return format not in self.broken


@dataclass(frozen=True, kw_only=True)
class Bearing:
    """A model's layers, in its order."""

    layers: Sequence[LayerBearing]

    def sentence(self, format: str) -> str:
        """One format's standing in a sentence."""
        several = len(self.layers)
        broken = [layer for layer in self.layers if not layer.bears(format)]
        if not broken:
            return f"All {several} layers tolerate it as they are."
        causes = [layer.broken[format].cause for layer in broken]
        told = ", ".join(f"{causes.count(cause)} by {_WORDS[cause]}" for cause in _WORDS if cause in causes)
        helped = {
            name: sum(getattr(layer, name)[format] < FACTOR for layer in broken)
            for name in ("rotated", "smoothed")
        }
        return (
            f"{several - len(broken)} of {several} layers tolerate it; {len(broken)} do not: {told}. A rotation would fix "
            f"{helped['rotated']} of them, smoothing {helped['smoothed']}."
        )


_WORDS: Mapping[Cause, str] = {
    "first token": "the first token's values",
    "channels": "a few steady channels",
    "tokens": "single tokens",
    "spread": "large values in many places",
    "weight": "their weights",
}


def measure_bearing(model: TextModel, window: Window) -> Bearing:
    """Read one window through the model and round every linear layer's operands.

    Args:
        model: unchanged afterwards.
        window: of the text.
    """
    found: dict[str, LayerBearing] = {}
    # Models name their inputs each in their own way; tokens stand in the matrix.
    length = next(x_BT.shape[1] for x_BT in window.inputs.values() if x_BT.dim() == 2)
    handles = []

    def hook(path: str) -> Callable[..., None]:
        def seen(module: Any, given: tuple[Any, ...], output: Any) -> None:
            x = given[0] if given and isinstance(given[0], Tensor) else None
            if x is None or path in found or not x.is_floating_point() or not x.numel():
                return
            # Experts get the tokens that chose them, and of those tokens' places nothing is known.
            is_text = x.dim() == 3 and x.shape[1] == length
            rows = x[0] if is_text else x.reshape(-1, x.shape[-1])
            found[path] = _layer(
                path, rows[:ROWS].detach().float(), linear_weight(module).detach().float(), is_text
            )

        return seen

    try:
        for path, module in linear_layers(model.module).items():
            handles.append(module.register_forward_hook(hook(path)))
        model.run(window)
    finally:
        for handle in handles:
            handle.remove()
    return Bearing(layers=[found[path] for path in linear_layers(model.module) if path in found])


@torch.no_grad()
def _layer(path: str, x_TK: Tensor, weight_NK: Tensor, is_text: bool) -> LayerBearing:
    largest_K = x_TK.abs().amax(0)
    width = weight_NK.abs().amax(0).float()
    smooth_K = (largest_K.clamp_min(1e-5) / width.clamp_min(1e-5)).sqrt()
    # [64, K] under the scale of all rows.
    sample = weight_NK[:: max(1, len(weight_NK) // 64)][:64].float()
    size = _rotation(x_TK.shape[1])
    signs = rotation_signs(size, 0) if size > 1 else None
    plain: dict[str, float] = {}
    rotated: dict[str, float] = {}
    smoothed: dict[str, float] = {}
    broken: dict[str, Broken] = {}
    turned = (
        (rotate(x_TK, signs), rotate(sample, signs), rotate(weight_NK.float(), signs).abs().amax())
        if signs is not None
        else (x_TK, sample, width.amax())
    )
    scaled = (x_TK / smooth_K, sample * smooth_K, (width * smooth_K).amax())
    for name in FORMATS:
        of_input, of_weight = _error(x_TK, name), _error(sample, name, width.amax())
        plain[name] = max(of_input, of_weight)
        for kept, (x, w, whole) in ((rotated, turned), (smoothed, scaled)):
            kept[name] = max(_error(x, name), _error(w, name, whole))
        if of_input >= FACTOR:
            broken[name] = _why(x_TK, name, is_text)
        elif of_weight >= FACTOR:
            row = int(weight_NK.abs().amax(1).argmax())
            broken[name] = Broken(
                cause="weight",
                detail=f"output channel {row} reaches {float(width.amax()):.3g}, the weight's RMS is "
                f"{float(weight_NK.float().square().mean().sqrt()):.2g}",
            )
    return LayerBearing(path=path, plain=plain, rotated=rotated, smoothed=smoothed, broken=broken)


def _why(x_TK: Tensor, name: str, is_text: bool) -> Broken:
    """Finds what, left out, lets the rest be borne."""
    whole = _error(x_TK, name)
    rest = x_TK[1:] if is_text and len(x_TK) > 1 else x_TK
    found: list[tuple[float, Broken]] = []
    if rest is not x_TK:
        first, other = float(x_TK[0].abs().amax()), float(rest.abs().amax())
        channel = int(x_TK[0].abs().argmax())
        told = f"|x| reaches {words.short(first)} at the first position (channel {channel}), {words.short(other)} at all others"
        found.append((_error(rest, name), Broken(cause="first token", detail=told)))
    usual_K = rest.abs().median(0).values
    median = usual_K.median()
    steady_K = usual_K >= STEADY * median if median > 0 else usual_K > 0
    if steady_K.any() and not steady_K.all():
        order = [int(k) for k in usual_K.argsort(descending=True)[: int(steady_K.sum())]]
        listed = ", ".join(map(str, order[:4])) + (f" and {len(order) - 4} more" if len(order) > 4 else "")
        ratio = float(usual_K.max() / median) if median > 0 else float("inf")
        told = (
            f"channel{'s' if len(order) > 1 else ''} {listed}: {ratio:.0f}x the median channel in most tokens"
        )
        found.append((_error(rest[:, ~steady_K], name), Broken(cause="channels", detail=told)))
    largest_T = rest.abs().amax(1)
    loud_T = largest_T >= STEADY * largest_T.median()
    if loud_T.any() and not loud_T.all():
        told = f"{int(loud_T.sum())} of {len(rest)} tokens reach {words.short(float(largest_T.max()))}"
        found.append((_error(rest[~loud_T], name), Broken(cause="tokens", detail=told)))
    enough = [why for error, why in found if error < FACTOR]
    if enough:
        return enough[0]
    if found and (best := min(found, key=lambda one: one[0]))[0] < whole / 2:
        return best[1]
    size, rms = float(rest.abs().amax()), float(rest.square().mean().sqrt())
    return Broken(cause="spread", detail=f"|x| reaches {words.short(size)}, its RMS is {words.short(rms)}")


def _error(rows: Tensor, name: str, whole: Tensor | None = None) -> float:
    """Relative error, every row alike, over that of normal numbers; ``whole``: the largest magnitude that scales know of."""
    largest = rows.abs().amax() if whole is None else whole
    sums = what_if_sums(rows[:, None], what_if_format(name), largest.expand(len(rows)))
    squares = rows.double().square().sum(1)
    used = squares > 0
    return float((sums[used, 0] / squares[used]).mean().sqrt()) / _usual(name) if used.any() else 0.0


@cache
def _usual(name: str) -> float:
    return gaussian_error(what_if_format(name))


def _rotation(width: int) -> int:
    """The largest power of two that divides a width, up to ``WIDEST_ROTATION``."""
    return min(width & -width, WIDEST_ROTATION)
