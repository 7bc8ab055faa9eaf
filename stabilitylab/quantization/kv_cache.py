"""Keys and values of past tokens in few bits: what that costs in loss, and what it takes at a context length.

    name                    keys                                   values                                 source
    fp8-e4m3                as they are, to E4M3                   the same                               vLLM's kv_cache_dtype fp8
    int8-token              symmetric, a scale a token and head    the same                               LLM.int8()'s vector-wise
    int4-token              zero points, 32 channels of a token    the same                               FlexGen (2303.06865)
    int8-, int4-, int2-kivi zero points, 32 tokens of a channel    zero points, 32 channels of a token    KIVI (2402.02750)

    code = round((x - low) / s),   s = (high - low) / (2^b - 1),   x^ = low + s code;     symmetric: s = max|x| / (2^(b-1) - 1)

Keys have channels that are large at every token, values have none, hence KIVI's two directions. A group of tokens can be rounded
only when all are there, and stays as it is until then (at most 32 tokens, KIVI's residual). So the model reads the text in pieces
of 32 tokens, each of which sees itself unrounded and what came before rounded. The other formats round tokens as they enter. s and
low are kept in fp16.

Shapes: B rows, H heads of keys and values, T tokens, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from stabilitylab.errors import InputError
from stabilitylab.formats import E4M3, round_to
from stabilitylab.models import TextModel, Window
from stabilitylab.models.text_model import loss_of, output_of

_GROUP = 32
_PIECES = 4  # groups in a window from which on most tokens see a rounded past
_HALF = torch.float16


@dataclass(frozen=True, kw_only=True)
class CacheFormat:
    """How keys and values are kept.

    Attributes:
        name: see the table.
        bits: of a number.
        keys: what shares a key's scale: "none", a "head" of a token, a "token"'s channels in groups, a "channel"'s tokens.
    """

    name: str
    bits: int
    keys: Literal["none", "head", "token", "channel"]

    @property
    def piece(self) -> int | None:
        """Tokens that are read, and rounded, at once; None: each is rounded as it enters."""
        return _GROUP if self.keys == "channel" else None

    def rounded_keys(self, keys_BHTD: Tensor) -> Tensor:
        """Keys, rounded and back."""
        if self.keys == "channel":
            return affine(keys_BHTD.transpose(-1, -2), self.bits).transpose(-1, -2)
        return self.rounded_values(keys_BHTD)

    def rounded_values(self, values_BHTD: Tensor) -> Tensor:
        """Values, rounded and back."""
        if self.keys == "none":
            return round_to(values_BHTD, E4M3).to(values_BHTD.dtype)
        return symmetric(values_BHTD, self.bits) if self.keys == "head" else affine(values_BHTD, self.bits)

    def nbytes(self, tokens: int, heads: int, channels: int, of_values: int | None = None) -> int:
        """Bytes of keys and values of one layer, scales included, at a context of this many tokens.

        Args:
            tokens, heads: how many.
            channels: of a head's keys.
            of_values: channels of a head's values, where they differ (DeepSeek).
        """
        width = channels if of_values is None else of_values
        if self.keys == "none":
            return tokens * heads * (channels + width)
        if self.keys == "head":
            return (
                self._codes(tokens * heads * channels)
                + self._codes(tokens * heads * width)
                + 4 * tokens * heads
            )
        # The last group of tokens is full at most once in 32: till then it stays in 16 bits.
        whole = tokens if self.keys == "token" else tokens // _GROUP * _GROUP
        scales = whole * -(-width // _GROUP)
        scales += whole * -(-channels // _GROUP) if self.keys == "token" else whole // _GROUP * channels
        codes = self._codes(whole * heads * channels) + self._codes(whole * heads * width)
        return codes + 4 * heads * scales + 2 * (tokens - whole) * heads * (channels + width)

    def _codes(self, numbers: int) -> int:
        return -(-numbers * self.bits // 8)


CACHE_FORMATS = {
    one.name: one
    for one in (
        CacheFormat(name="fp8-e4m3", bits=8, keys="none"),
        CacheFormat(name="int8-token", bits=8, keys="head"),
        CacheFormat(name="int4-token", bits=4, keys="token"),
        *(CacheFormat(name=f"int{bits}-kivi", bits=bits, keys="channel") for bits in (8, 4, 2)),
    )
}


@dataclass(frozen=True, kw_only=True)
class CacheCost:
    """What a format does to a model.

    Attributes:
        loss: increase in nats per target.
        bytes: of all layers' keys and values at the context asked for.
        error: standard error of ``loss`` over windows; None with a single window.
        windows: how many.
    """

    loss: float
    bytes: int
    error: float | None = None
    windows: int = 1


@dataclass(frozen=True, kw_only=True)
class CacheBudget:
    """What keys and values may take.

    Attributes:
        context: tokens.
        share: of the bytes in 16 bits; None: whatever they need.
    """

    context: int
    share: float | None = None

    def __post_init__(self) -> None:
        if self.context < 1:
            raise InputError(f"a context of {self.context} tokens must be at least 1")
        if self.share is not None and not self.share > 0:
            raise InputError(f"a share of {self.share} of the keys' and values' bytes must be positive")


def cache_plan(
    model: TextModel, windows: Sequence[Window], third: Sequence[Window], budget: CacheBudget
) -> dict[str, Any]:
    """What every format costs on one text, and the chosen one on another, as a plan keeps it.

    Args:
        model: not quantized.
        windows: to choose a format on.
        third: to report the chosen format's loss on; if empty, ``windows``.
        budget: where no format fits, none is chosen.

    Returns:
        ``context``, ``bytes_16``, ``share``, ``formats`` (name -> loss and bytes), ``chosen``, its ``loss`` on the third text.
    """
    length = max(window.tokens for window in windows)
    formats = [one for one in CACHE_FORMATS.values() if one.piece is None or length >= _PIECES * one.piece]
    whole, found = measure_cache_formats(model, windows, formats, budget.context)
    chosen = None if budget.share is None else cheapest_harm(found, budget.share * whole)
    told = found.get(chosen or "")
    if chosen is not None and third:
        told = measure_cache_formats(model, third, [CACHE_FORMATS[chosen]], budget.context)[1][chosen]
    return {
        "context": budget.context,
        "bytes_16": whole,
        "share": budget.share,
        "left_out": [name for name in CACHE_FORMATS if name not in found],
        "window": length,
        "formats": {name: asdict(cost) for name, cost in found.items()},
        "chosen": chosen,
        "loss": None if told is None else told.loss,
        "error": None if told is None else told.error,
    }


def cache_lines(cache: Mapping[str, Any]) -> list[str]:
    """What ``cache_plan`` found, for a terminal."""
    whole = cache["bytes_16"]
    several = any(cost.get("error") is not None for cost in cache["formats"].values())
    lines = [
        f"keys and values of {cache['context']:,} tokens: {whole / 1e6:,.1f} MB in 16 bits"
        + ("; in brackets the loss's standard error over windows" if several else "")
    ]
    lines += [
        f"  {name}: {cost['bytes'] / 1e6:,.1f} MB, {cost['bytes'] / whole:.3f}, {cost['loss']:+.4f}{_spread(cost)} nats"
        for name, cost in sorted(cache["formats"].items(), key=lambda item: -item[1]["bytes"])
    ]
    if cache.get("left_out"):
        lines.append(
            f"  {', '.join(cache['left_out'])}: not measured, for windows of {cache['window']} tokens are hardly longer than the "
            f"{_GROUP} that stay unrounded: give a --length of {_PIECES * _GROUP} or more"
        )
    if cache["chosen"] is not None:
        lines.append(
            f"  within {cache['share']:g}: {cache['chosen']}, {cache['loss']:+.4f}{_spread(cache)} nats on the third text"
        )
    elif cache["share"] is not None:
        lines.append(f"  within {cache['share']:g}: no format fits")
    return lines


def _spread(cost: Mapping[str, Any]) -> str:
    """A standard error in brackets, where there is one."""
    return "" if cost.get("error") is None else f" ({cost['error']:.4f})"


def affine(x: Tensor, bits: int) -> Tensor:
    """x [..., K] to codes with a scale and a lowest number for each 32 of the last dimension, and back."""
    size = x.shape[-1]
    spare = -size % _GROUP
    # Padded with the last number, which widens no group's range.
    wide = F.pad(x.float().flatten(0, -2), (0, spare), mode="replicate").view(*x.shape[:-1], -1, _GROUP)
    low, high = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
    low = low.to(_HALF).float()
    scale = _usable((high - low) / (2**bits - 1))
    codes = ((wide - low) / scale).round().clamp(0, 2**bits - 1)
    return (low + codes * scale).flatten(-2)[..., :size].to(x.dtype)


def symmetric(x: Tensor, bits: int) -> Tensor:
    """x [..., K] to codes with one scale for the last dimension, and back."""
    top = 2 ** (bits - 1) - 1
    wide = x.float()
    scale = _usable(wide.abs().amax(-1, keepdim=True) / top)
    return ((wide / scale).round().clamp(-top, top) * scale).to(x.dtype)


def _usable(exact: Tensor) -> Tensor:
    """A scale as it is kept; 1 where everything is alike."""
    scale = exact.to(_HALF).float()
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def measure_cache_formats(
    model: TextModel, windows: Sequence[Window], formats: Sequence[CacheFormat], context: int
) -> tuple[int, dict[str, CacheCost]]:
    """Bytes of the cache in 16 bits, and what each format costs.

    Args:
        model: of transformers, predicting tokens.
        windows: the text.
        formats: to measure.
        context: tokens whose bytes are counted.

    Raises:
        InputError: the model has no cache of keys and values of past tokens.
    """
    require_cache(model)
    whole = 0
    own: list[float] = []
    found: dict[str, CacheCost] = {}
    for one in (None, *formats):
        losses, counts, shapes = [], [], []
        for window in windows:
            logits, cache = _read(model, window, one)
            assert window.targets_BT is not None
            loss, targets = loss_of(logits, window.targets_BT)
            losses.append(loss)
            counts.append(targets)
            # Heads, and channels of a head's keys and values.
            shapes = [(*layer.keys.shape[1::2], layer.values.shape[3]) for layer in cache.layers]
        if one is None:
            own = losses
            whole = sum(2 * context * heads * (keys + values) for heads, keys, values in shapes)
            continue
        size = sum(one.nbytes(context, *shape) for shape in shapes)
        mean, error = mean_over_windows([a - b for a, b in zip(losses, own, strict=True)], counts)
        found[one.name] = CacheCost(loss=mean, bytes=size, error=error, windows=len(counts))
    return whole, found


def mean_over_windows(increases: Sequence[float], counts: Sequence[int]) -> tuple[float, float | None]:
    """Mean increase a target, and its standard error with windows as the sampling units.

    A ratio of sums, m = sum d / sum n: se^2 = k / (k - 1) sum (d_i - m n_i)^2 / (sum n)^2 for k windows (Cochran, Sampling
    Techniques, 1977, section 6.3).

    Args:
        increases: sums over a window's targets.
        counts: its targets.
    """
    whole = max(1, sum(counts))
    mean = sum(increases) / whole
    windows = len(counts)
    if windows < 2:
        return mean, None
    square = sum((d - mean * n) ** 2 for d, n in zip(increases, counts, strict=True))
    return mean, (windows / (windows - 1) * square) ** 0.5 / whole


def cheapest_harm(costs: dict[str, CacheCost], limit: float) -> str | None:
    """The format of least loss within this many bytes, the smaller of equals; None where none fits."""
    within = {name: cost for name, cost in costs.items() if cost.bytes <= limit}
    return min(within, key=lambda name: (within[name].loss, within[name].bytes), default=None)


def require_cache(model: TextModel) -> None:
    """Raises InputError where a model has no cache of keys and values that could be quantized here."""
    config: Any = getattr(model.module, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    windows = getattr(text, "use_sliding_window", True) and getattr(text, "sliding_window", None)
    # Where a model names no kinds of layers, all have a window if one has (Mistral): transformers' own cache takes it so.
    one_kind = ["sliding_attention" if windows else "full_attention"]
    kinds = set(getattr(text, "layer_types", None) or one_kind)
    if not model.predicts or text is None or getattr(text, "is_encoder_decoder", False):
        raise InputError(
            f"{model.name} keeps no keys and values of past tokens that could be quantized: leave out --kv-context"
        )
    if kinds != {"full_attention"}:
        raise InputError(
            f"{model.name} has layers of {', '.join(sorted(kinds - {'full_attention'}))}, whose cache is of another kind: "
            "leave out --kv-context"
        )


@torch.inference_mode()
def _read(model: TextModel, window: Window, format: CacheFormat | None) -> tuple[Tensor, Any]:
    """Logits of a window read with a cache, and the cache."""
    from transformers.cache_utils import Cache, DynamicLayer

    class RoundedLayer(DynamicLayer):  # type: ignore[misc]
        """A layer of the cache that keeps rounded numbers."""

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if format is None:
                return super().update(key_states, value_states, *args, **kwargs)
            if format.piece is None:
                return super().update(
                    format.rounded_keys(key_states), format.rounded_values(value_states), *args, **kwargs
                )
            seen = super().update(key_states, value_states, *args, **kwargs)
            count = key_states.shape[-2]
            if count == format.piece:  # the last group of a window is not full: nobody reads it again
                self.keys, self.values = seen[0].clone(), seen[1].clone()
                self.keys[..., -count:, :] = format.rounded_keys(key_states)
                self.values[..., -count:, :] = format.rounded_values(value_states)
            return seen

    cache = Cache(layer_class_to_replicate=RoundedLayer)
    tokens_BT = window.inputs["input_ids"]
    size = tokens_BT.shape[1] if format is None or format.piece is None else format.piece
    parts = []
    for start in range(0, tokens_BT.shape[1], size):
        output = model.module(
            input_ids=tokens_BT[:, start : start + size], past_key_values=cache, use_cache=True
        )
        parts.append(output_of(output))
    return torch.cat(parts, 1), cache
