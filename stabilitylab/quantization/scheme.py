"""A scheme: which numbers of a linear layer become integers, and which of them share a scale.

    name             weights                            activations                      source
    w8a8-tensor      int8, one scale                    int8, one scale a call           LLM.int8() (2208.07339), section 2
    w8a8-channel     int8, a scale an output channel    int8, one scale a call           row-wise weights; LLM.int8(), section 2
    w8a8-token       int8, a scale an output channel    int8, a scale a token            "vector-wise", LLM.int8(), eq. 6
    mixed            as w8a8-token                      as w8a8-token; channels with     LLM.int8(), section 3.2
                                                        |x| >= 6 are not quantized
    smoothquant      as w8a8-token, of W diag(s)        as w8a8-token, of diag(1/s) x    SmoothQuant (2211.10438), eq. 4, a = .5
    int8-row         int8, a scale an output channel    as they come                     GLM-130B (2210.02414), section 5
    int4-row         int4, likewise                     as they come                     the same
    int4-g128        int4, a scale 128 columns          as they come                     grouping: GPTQ (2210.17323), section 5
    ...-asym         with zero points                   as they come                     Jacob et al. (1712.05877)
    ...-mse          scales that minimise the squared   as they come                     clipping by search: OMSE (1902.06822)
                     error of the group's weights

Where both sides are int8, s = max / 127.5 and codes stop at 127: every value, the largest too, is within half a step of its code,
and steps are 0.4 % finer than with 127 (as torchao does; error .0728 against .0730 with outliers in 3 of 2,048 channels).

A scheme is its name: ``Scheme.parse("int4-g64-asym-mse")`` and ``scheme.name`` are inverse to each other. Limits: weights are
rounded to nearest (no second-order correction as in GPTQ), activations are scaled by what they are at run time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from stabilitylab.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from stabilitylab.quantization.linear import QuantizedLinear

GROUPS = (32, 64, 128)
INT8_RANGE = 127.5  # of W8A8: see above
_WEIGHT_ONLY = re.compile(r"int(?P<bits>[48])-(?P<share>row|g\d+)(?P<asymmetric>-asym)?(?P<search>-mse)?")


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How a linear layer is quantized.

    Attributes:
        bits: of a weight, 8 or 4.
        share: which weights share a scale: "tensor" all, "row" those of an output channel, a number that many columns of a row.
        activations: what shares a scale among the activations; None leaves them as they are.
        threshold: activation channels that reach it stay as they are (LLM.int8()); None quantizes all.
        smooth: exponent with which SmoothQuant moves activation range into the weights; None moves none.
        asymmetric: weights have zero points.
        search: whether scales are searched for the least squared error instead of taken from the largest weight.
    """

    bits: Literal[8, 4] = 8
    share: Literal["tensor", "row"] | int = "row"
    activations: Literal["tensor", "token"] | None = None
    threshold: float | None = None
    smooth: float | None = None
    asymmetric: bool = False
    search: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (8, 4):
            raise InputError(f"weights of {self.bits} bits are not supported: choose 8 or 4")
        if isinstance(self.share, int) and self.share not in GROUPS:
            raise InputError(f"a group of {self.share} columns is not supported: choose 32, 64 or 128")
        if self.activations is None:
            if self.threshold is not None or self.smooth is not None or self.share == "tensor":
                raise InputError("threshold, smooth and one scale a tensor need quantized activations")
        elif self.bits != 8 or self.asymmetric or self.search or isinstance(self.share, int):
            raise InputError(
                "quantized activations need symmetric 8-bit weights with a scale a tensor or a row: they are "
                "multiplied as integers"
            )
        if self.threshold is not None and not self.threshold > 0:
            raise InputError(f"threshold {self.threshold} must be positive")
        if self.smooth is not None and not 0 <= self.smooth <= 1:
            raise InputError(f"smooth {self.smooth} must lie between 0 and 1")

    @property
    def name(self) -> str:
        """What people call it; ``parse`` reads it back."""
        if self.activations is None:
            share = self.share if self.share == "row" else f"g{self.share}"
            return (
                f"int{self.bits}-{share}{'-asym' if self.asymmetric else ''}{'-mse' if self.search else ''}"
            )
        for name, scheme in NAMED.items():
            if scheme == self:
                return name
        settings = [] if self.threshold is None else [f"mixed{self.threshold:g}"]
        settings += [] if self.smooth is None else [f"smooth{self.smooth:g}"]
        share = {"tensor": "tensor", "row": "channel"}[str(self.share)]
        return "-".join(["w8a8", share, f"by{self.activations}", *settings])

    def layer(
        self,
        weight: Tensor,
        *,
        bias: Tensor | None = None,
        largest: Tensor | None = None,
        name: str = "the layer",
    ) -> QuantizedLinear:
        """A linear layer of W [N, K] in this scheme.

        Raises:
            InputError: weights are not finite, or SmoothQuant has no ``largest``.
        """
        # The layer's module is built on this one, so the import stands where the layer is made.
        from stabilitylab.quantization.linear import QuantizedLinear

        return QuantizedLinear.from_weight(weight, self, bias=bias, largest=largest, name=name)

    @classmethod
    def parse(cls, name: str) -> Scheme:
        """The scheme of that name.

        Raises:
            InputError: there is none.
        """
        if name in NAMED:
            return NAMED[name]
        if match := _WEIGHT_ONLY.fullmatch(name):
            share = match["share"]
            return cls(
                bits=8 if match["bits"] == "8" else 4,
                share="row" if share == "row" else int(share[1:]),
                asymmetric=match["asymmetric"] is not None,
                search=match["search"] is not None,
            )
        if match := _WRITTEN_OUT.fullmatch(name):
            return cls(
                share="row" if match["share"] == "channel" else "tensor",
                activations="token" if match["activations"] == "token" else "tensor",
                threshold=float(match["threshold"]) if match["threshold"] else None,
                smooth=float(match["smooth"]) if match["smooth"] else None,
            )
        raise InputError(
            f"there is no scheme {name!r}: choose one of {', '.join(NAMED)}, or intB-row, intB-gG with B 8 or 4 and G 32, "
            "64 or 128, and with -asym, -mse or both"
        )


_WRITTEN_OUT = re.compile(
    r"w8a8-(?P<share>tensor|channel)-by(?P<activations>tensor|token)"
    r"(-mixed(?P<threshold>[\d.e+-]*\d))?(-smooth(?P<smooth>[\d.e+-]*\d))?"
)

NAMED = {
    "w8a8-tensor": Scheme(share="tensor", activations="tensor"),
    "w8a8-channel": Scheme(activations="tensor"),
    "w8a8-token": Scheme(activations="token"),
    "mixed": Scheme(activations="token", threshold=6.0),
    "smoothquant": Scheme(activations="token", smooth=0.5),
}
