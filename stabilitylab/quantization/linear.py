"""``QuantizedLinear``, the replacement of an ``nn.Linear``.

    weight-only      y = x W_q' + b
    W8A8             y = s_x (q W_q') + b,         q = round(x / s_x),  s_x = max|x| / 127.5 over the tensor or the token
    mixed            y = s_x (q W_q') + x_O W_q,O' + b,     O: channels with |x| >= threshold anywhere in the call (LLM.int8())
    SmoothQuant      as W8A8 of x / s with weights W diag(s)
    AWQ              any of these of x / s with weights W diag(s), s from awq.py

For inference only. The output has the input's format; inside, W8A8 is float32 and integers. Channels of O are multiplied with their
dequantized weights where they are few. Where they are more than twice the tokens, x_O goes through the integer product as two
digits, 127 * 508 steps to its largest value (finer than fp16, in which LLM.int8() keeps it).

The weights are buffers in the canonical form (stored_weight.py). The first call on a device hands them to a kernel in its own
layout; ``state_dict``, a move to another device, and copying take them back first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stabilitylab.errors import InputError
from stabilitylab.models.freed_memory import let_go_of_pages
from stabilitylab.quantization.kernels import IntegerKernel, WeightKernel, integer_kernel, weight_kernel
from stabilitylab.quantization.scheme import INT8_RANGE, Scheme
from stabilitylab.quantization.stored_weight import StoredWeight, quantize_weight
from stabilitylab.quantization.weight_on_paper import HasWeightOnPaper


class QuantizedLinear(HasWeightOnPaper, nn.Module):
    """A linear layer with quantized weights, made by ``from_linear`` or from a stored weight.

    Args:
        stored: the weights.
        scheme: the weights'.
        bias: [N], or None.
        smooth: [K], factors already in the weights' columns, or None.
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: Tensor | None
    smooth: Tensor | None

    def __init__(
        self,
        stored: StoredWeight,
        scheme: Scheme,
        *,
        bias: Tensor | None = None,
        smooth: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = stored.shape
        self.scheme = scheme
        self.group = stored.group
        self.fingerprint = stored.fingerprint
        self.register_buffer("values", stored.values)
        self.register_buffer("scales", stored.scales)
        self.register_buffer("zeros", stored.zeros)
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.register_buffer("smooth", None if smooth is None else smooth.detach().float())
        self.register_buffer("computes", torch.empty(0, device=stored.scales.device), persistent=False)
        self._kernel: WeightKernel | IntegerKernel | None = None
        self.eval()

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, scheme: Scheme, *, largest: Tensor | None = None, name: str = "the layer"
    ) -> QuantizedLinear:
        """Quantize a layer.

        Args:
            linear: left as it is.
            scheme: to quantize by.
            largest: [K], max|x| of each input channel over some text: needed by SmoothQuant.
            name: how errors call it.

        Raises:
            InputError: weights are not finite, or SmoothQuant has no ``largest``.
        """
        return cls.from_weight(linear.weight, scheme, bias=linear.bias, largest=largest, name=name)

    @classmethod
    def from_weight(
        cls,
        weight: Tensor,
        scheme: Scheme,
        *,
        bias: Tensor | None = None,
        largest: Tensor | None = None,
        name: str = "the layer",
    ) -> QuantizedLinear:
        """As ``from_linear``, from W [N, K] and a bias [N]."""
        smooth = None
        if scheme.smooth is not None:
            if largest is None:
                raise InputError(
                    f"{name}: SmoothQuant needs the activations' largest values: give a text to measure on"
                )
            smooth = smoothing(largest, weight, scheme.smooth)
        stored = quantize_weight(weight, scheme, smooth=smooth, name=name)
        return cls(stored, scheme, bias=bias, smooth=smooth)

    @property
    def stored(self) -> StoredWeight:
        """The weights in the canonical form."""
        self.release()
        return StoredWeight(
            values=self.values,
            scales=self.scales,
            zeros=self.zeros,
            bits=self.scheme.bits,
            shape=(self.out_features, self.in_features),
            group=self.group,
            fingerprint=self.fingerprint,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the stored weights, without the bias."""
        extra = 0 if self.smooth is None else self.smooth.numel() * self.smooth.element_size()
        count = -(-self.out_features * self.in_features * self.scheme.bits // 8)
        if self.scheme.bits == 4:
            count = self.out_features * (-(-self.in_features // 2))
        scales = self.scales.numel() * self.scales.element_size()
        return count + scales + (0 if self.zeros is None else self.zeros.numel()) + extra

    def prepare(self) -> None:
        """Hand the weights to the kernel of their device now instead of in the first call."""
        if self._kernel is None:
            stored = self.stored
            self._kernel = (
                weight_kernel(stored) if self.scheme.activations is None else integer_kernel(stored)
            )
            # The kernel holds the codes from here on; release() brings them back.
            let_go_of_pages([self.values])
            self.values = self.values.new_empty(0)

    def release(self) -> None:
        """Take the weights back from the kernel."""
        if self._kernel is not None:
            self.values = self._kernel.values()
            self._kernel = None

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output.

        Args:
            x: [..., K], floating.

        Raises:
            RuntimeError: the input asks for a gradient, which rounding does not have.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("a quantized layer has no gradient: call the model under torch.no_grad()")
        if x.shape[-1] != self.in_features:
            raise RuntimeError(f"the layer takes {self.in_features} columns, got {tuple(x.shape)}")
        x_MK = x.reshape(-1, self.in_features)
        if x_MK.shape[0] == 0:
            return x.new_zeros(*x.shape[:-1], self.out_features)
        if self._kernel is None:
            self.prepare()
        y_MN = self._weight_only(x_MK) if self.scheme.activations is None else self._with_integers(x_MK)
        if self.bias is not None:
            # Out of place: x and bias may have a wider format than the kernel's.
            y_MN = y_MN.to(torch.promote_types(y_MN.dtype, x.dtype)) + self.bias
        return y_MN.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _weight_only(self, x_MK: Tensor) -> Tensor:
        kernel: Any = self._kernel
        if self.smooth is not None:
            x_MK = (x_MK / self.smooth).to(x_MK.dtype)
        y_MN: Tensor = kernel(x_MK)
        return y_MN

    def _with_integers(self, x_MK: Tensor) -> Tensor:
        kernel: Any = self._kernel
        x_MK = x_MK.float() if self.smooth is None else x_MK.float() / self.smooth
        outliers: Tensor | None = None
        if self.scheme.threshold is not None:
            outliers = (x_MK.abs().amax(0) >= self.scheme.threshold).nonzero().view(-1)
        if outliers is None or len(outliers) == 0:
            scale, codes_MK = self._round(x_MK)
            y_MN: Tensor = kernel(codes_MK, len(codes_MK))
            return y_MN.mul_(scale)
        return self._mixed(x_MK, outliers)

    def _mixed(self, x_MK: Tensor, outliers: Tensor) -> Tensor:
        """LLM.int8(): outlier channels apart from the rest, both in one pass over the weights."""
        kernel: Any = self._kernel
        count = len(x_MK)
        scale, codes_MK = self._round(x_MK.index_fill(1, outliers, 0.0))
        x_MO = x_MK[:, outliers]
        if len(outliers) <= 2 * count:
            one_OK = x_MK.new_zeros(len(outliers), self.in_features)
            one_OK[torch.arange(len(outliers), device=x_MK.device), outliers] = 1.0
            y_RN: Tensor = kernel(torch.cat([codes_MK, one_OK]), count)
            return y_RN[:count].mul_(scale).addmm_(x_MO, y_RN[count:])
        step_M1 = _scale(x_MO.abs().amax(1, keepdim=True), 127)
        high_MO = (x_MO / step_M1).round()
        low_MO = ((x_MO / step_M1 - high_MO) * 254).round()
        digits = x_MK.new_zeros(2, count, self.in_features)
        digits[:, :, outliers] = torch.stack([high_MO, low_MO])
        y_3MN: Tensor = kernel(torch.cat([codes_MK, *digits]), 3 * count).view(3, count, -1)
        y_MN = y_3MN[0].mul_(scale).addcmul_(y_3MN[1], step_M1)
        return y_MN.addcmul_(y_3MN[2], step_M1, value=1 / 254)

    def _round(self, x_MK: Tensor) -> tuple[Tensor, Tensor]:
        """Scales ([M, 1], or one) and integer codes of activations."""
        size = x_MK.abs()
        largest = size.amax(1, keepdim=True) if self.scheme.activations == "token" else size.amax()
        scale = _scale(largest, INT8_RANGE)
        return scale, x_MK.div(scale).round_().clamp_(-127, 127)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scheme={self.scheme.name}"

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.release()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.release()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLinear:
        # A move takes everything along; a change of format is for the bias alone (integers and scales keep theirs).
        self.release()
        kept = {"scales": self.scales, "smooth": self.smooth}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            if before is not None:
                setattr(self, name, before.to(self.values.device))
        return self

    def __getstate__(self) -> dict[str, Any]:
        self.release()
        return self.__dict__


def smoothing(largest: Tensor, weight: Tensor, exponent: float) -> Tensor:
    """SmoothQuant, eq. 4: s_k = max|x_k|^a / max|w_k|^(1 - a), [K]; 1 for channels that are zero on either side."""
    activation = largest.float().to(weight.device)
    columns = weight.detach().abs().amax(0).float()
    factor = activation**exponent / columns ** (1 - exponent)
    usable = (activation > 0) & (columns > 0) & factor.isfinite() & (factor > 0)
    return torch.where(usable, factor, torch.ones_like(factor))


def _scale(largest: Tensor, codes: float) -> Tensor:
    """largest / codes, and 1 where everything is zero. NaN stays NaN, so that it reaches the output."""
    scale = largest / codes
    return torch.where(scale == 0, torch.ones_like(scale), scale)
