"""Every scheme by its name, those of other packages included.

    NAME            integers: see scheme.py                    w8a8-token, mixed, int4-g64-asym-mse
    FORMAT          floating-point: see format_scheme.py       nvfp4, fp8-e4m3-row/fp8-e4m3-row
    ...-gptq, -awq  rounded for its inputs: see calibrated.py  int4-g64-asym-mse-gptq, nvfp4-awq
    ...-had         any after a rotation: see rotated_linear.py       w8a8-token-had, nvfp4/nvfp4-gptq-had

A scheme of your own is whatever has a ``name`` and makes a layer:

    class Halved:
        name = "halved"
        def layer(self, weight, *, bias=None, largest=None, name="the layer"):   # W [N, K], max|x| of each channel or None
            return HalvedLinear(weight, bias)                                    # a module with ``nbytes``

``register_scheme(Halved())`` makes it known to ``stabilitylab quantize --schemes halved``, plans and reports. ``--apply`` can write
only the schemes of this package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from stabilitylab.errors import InputError
from stabilitylab.quantization.calibrated import METHODS, CalibratedScheme
from stabilitylab.quantization.format_scheme import FormatScheme
from stabilitylab.quantization.input_moments import Moments
from stabilitylab.quantization.rotated_linear import RotatedLinear, rotated_weight, signs_for
from stabilitylab.quantization.scheme import NAMED, Scheme

ROTATED = "-had"


class LinearScheme(Protocol):
    """How a linear layer is quantized."""

    @property
    def name(self) -> str:
        """What people call it."""

    def layer(
        self,
        weight: Tensor,
        *,
        bias: Tensor | None = None,
        largest: Tensor | None = None,
        name: str = "the layer",
    ) -> Any:
        """A module in the place of a linear layer, with ``nbytes``, the bytes of its weights."""


@dataclass(frozen=True, kw_only=True)
class RotatedScheme:
    """Any scheme after a rotation.

    Attributes:
        inner: the scheme of the rotated weights and activations.
    """

    inner: LinearScheme

    @property
    def name(self) -> str:
        return f"{self.inner.name}{ROTATED}"

    def layer(
        self,
        weight: Tensor,
        *,
        bias: Tensor | None = None,
        largest: Tensor | None = None,
        name: str = "the layer",
        moments: Moments | None = None,
    ) -> RotatedLinear:
        """Raises InputError: K is odd, or the inner scheme needs the ranges of unrotated activations, or moments."""
        if isinstance(self.inner, Scheme) and self.inner.smooth is not None:
            raise InputError("SmoothQuant's ranges are those of unrotated activations: choose one of the two")
        turned = rotated_weight(weight, name)
        if isinstance(self.inner, CalibratedScheme):
            of_turned = None if moments is None else moments.rotated(signs_for(weight.shape[1], name))
            return RotatedLinear(self.inner.layer(turned, bias=bias, name=name, moments=of_turned), self)
        return RotatedLinear(self.inner.layer(turned, bias=bias, name=name), self)


_REGISTERED: dict[str, LinearScheme] = {}


def register_scheme(scheme: LinearScheme) -> None:
    """Make a scheme known by its name.

    Raises:
        InputError: the name is taken, or cannot be read back.
    """
    if not scheme.name or scheme.name in _REGISTERED or _known(scheme.name) is not None:
        raise InputError(f"there is a scheme {scheme.name!r} already: choose another name")
    _REGISTERED[scheme.name] = scheme


def scheme_of(name: str) -> LinearScheme:
    """The scheme of that name.

    Raises:
        InputError: there is none.
    """
    found = _known(name)
    if found is None:
        raise InputError(
            f"there is no scheme {name!r}: choose one of {', '.join([*NAMED, *_REGISTERED])}; intB-row, intB-gG with B 8 or 4 and "
            "G 32, 64 or 128, and with -asym, -mse or both; a number format (fp8-e4m3-row, mxfp4, nvfp4, ...) or two of them "
            "(WEIGHTS/ACTIVATIONS), with -mse where scales are searched; each with -gptq, -gptqo or -awq where weights are "
            "rounded for their inputs, and with -had for a Hadamard rotation"
        )
    return found


def nearest(scheme: LinearScheme) -> LinearScheme:
    """The scheme with weights rounded to nearest instead of for their inputs."""
    if isinstance(scheme, CalibratedScheme):
        return scheme.inner
    if isinstance(scheme, RotatedScheme):
        return RotatedScheme(inner=nearest(scheme.inner))
    return scheme


def _known(name: str) -> LinearScheme | None:
    if name in _REGISTERED:
        return _REGISTERED[name]
    if name.endswith(ROTATED):
        inner = _known(name.removesuffix(ROTATED))
        return None if inner is None or isinstance(inner, RotatedScheme) else RotatedScheme(inner=inner)
    for method in METHODS:
        if name.endswith(f"-{method}"):
            rounded = _known(name.removesuffix(f"-{method}"))
            if isinstance(rounded, (Scheme, FormatScheme)):
                return CalibratedScheme(inner=rounded, method=method)
            return None
    readers: tuple[Callable[[str], LinearScheme], ...] = (Scheme.parse, FormatScheme.parse)
    for read in readers:
        try:
            return read(name)
        except InputError:
            continue
    return None
