"""Emulates low-precision products: rounds every operand to a format before it is multiplied, on any machine.

A linear layer makes three products. Q rounds both operands of each, with their scales along the summed dimension:

    forward       y = Q(x) Q(W)'           over the inputs
    grad-input    dx = Q(g) Q(W')'         over the outputs
    grad-weight   dW = Q(g') Q(x')'        over the tokens; with ``hadamard`` both rotated along them first

Products accumulate in fp32, as on the machines; biases, norms, attention's own products and the output projection stay as they are.
Recipes (``stabilitylab.formats`` has the formats and their sources):

    | recipe | activations | weights | gradients | |
    | --- | --- | --- | --- | --- |
    | fp8 | fp8-e4m3-tensor | fp8-e4m3-tensor | fp8-e5m2-tensor | 2209.05433 |
    | fp8-blocks | fp8-e4m3-tile128 | fp8-e4m3-block128 | fp8-e4m3-tile128 | DeepSeek-V3, 2412.19437 |
    | mxfp8 | mxfp8-e4m3 | mxfp8-e4m3 | mxfp8-e4m3 | 2506.08027 |
    | mxfp4 | mxfp4 | mxfp4 | mxfp4, stochastic | 2502.20586 |
    | nvfp4 | nvfp4 | nvfp4-2d | nvfp4, stochastic, Hadamard | NVIDIA, 2509.25149 |

Only gradients are rounded stochastically. The draws are a function of (seed, update, row, layer, product), so a resumed run draws
what the first would have drawn.

Scales and draws belong to a micro-batch: replicas with the micro-batch size of one process (``batch.micro-rows``) round as it does.

Limits: one process or data parallel, without torch.compile; linear layers only, so neither experts nor attention's scores.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from glm.errors import InputError
from glm.model.dropout import row_keys
from glm.model.layers import Linear
from glm.precision import linear, wide_product, wide_product_of_rows
from stabilitylab.errors import InputError as FormatError
from stabilitylab.formats import fake_quantize, rotate, rotation_signs, scaled_format

EmulationRecipe = Literal["none", "fp8", "fp8-blocks", "mxfp8", "mxfp4", "nvfp4"]
PRODUCTS = ("forward", "grad-input", "grad-weight")
# Formats of activations, weights, gradients; whether to round gradients stochastically, and to rotate them.
RECIPES: dict[str, tuple[str, str, str, bool, bool]] = {
    "none": ("", "", "", False, False),
    "fp8": ("fp8-e4m3-tensor", "fp8-e4m3-tensor", "fp8-e5m2-tensor", False, False),
    "fp8-blocks": ("fp8-e4m3-tile128", "fp8-e4m3-block128", "fp8-e4m3-tile128", False, False),
    "mxfp8": ("mxfp8-e4m3", "mxfp8-e4m3", "mxfp8-e4m3", False, False),
    "mxfp4": ("mxfp4", "mxfp4", "mxfp4", True, False),
    "nvfp4": ("nvfp4", "nvfp4-2d", "nvfp4", True, True),
}
ROTATED = 16


@dataclass(frozen=True, kw_only=True)
class EmulationConfig:
    """Formats of linear layers' products.

    Attributes:
        recipe: formats that go together; the flags below replace single ones.
        activations: format of the activations; empty: the recipe's; "none": do not round them.
        weights: format of the weights, likewise.
        gradients: format of the gradients, likewise.
        products: which products to round, separated by commas.
        sites: glob of the linear layers.
        spared: glob of those among them to leave alone.
        stochastic: round gradients stochastically; None: as the recipe does.
        hadamard: rotate the operands of the weight gradient; None: as the recipe does.
    """

    recipe: EmulationRecipe = "none"
    activations: str = ""
    weights: str = ""
    gradients: str = ""
    products: str = "forward,grad-input,grad-weight"
    sites: str = "layers.*"
    spared: str = ""
    stochastic: bool | None = None
    hadamard: bool | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.chosen if name not in PRODUCTS]
        if unknown or not self.chosen:
            raise InputError(
                f"emulate.products are some of {', '.join(PRODUCTS)}, got {', '.join(unknown) or 'none'}"
            )
        if not self.is_on and (self.stochastic or self.hadamard or self.sites != "layers.*" or self.spared):
            raise InputError(
                "emulate.* rounds nothing without a format: choose emulate.recipe, or one of emulate.activations, weights and "
                "gradients"
            )
        for format in self.formats:
            try:
                scaled_format(format or "bf16")
            except FormatError as error:
                raise InputError(f"emulate: {error}") from None

    @property
    def chosen(self) -> tuple[str, ...]:
        """The products to round."""
        return tuple(name.strip() for name in self.products.split(",") if name.strip())

    @property
    def formats(self) -> tuple[str, str, str]:
        """Formats of activations, weights and gradients; empty: not rounded."""
        own = (self.activations, self.weights, self.gradients)
        pairs = zip(own, RECIPES[self.recipe][:3], strict=True)
        first, second, third = ("" if one == "none" else one or given for one, given in pairs)
        return first, second, third

    @property
    def is_on(self) -> bool:
        return any(self.formats)

    @property
    def rounds_stochastically(self) -> bool:
        return RECIPES[self.recipe][3] if self.stochastic is None else self.stochastic

    @property
    def rotates(self) -> bool:
        return RECIPES[self.recipe][4] if self.hadamard is None else self.hadamard


class Emulation:
    """The rounding of a model's linear layers.

    Args:
        model: the layers that the configuration names get other products.
        config: which layers, and how to round.
        seed: of the run.

    Raises:
        InputError: no layer matches the configuration.
    """

    def __init__(self, model: nn.Module, config: EmulationConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        self.signs = rotation_signs(ROTATED, seed)
        self._key = 0
        self.sites: list[str] = []
        for name, module in model.named_modules():
            spared = bool(config.spared) and fnmatch.fnmatch(name, config.spared)
            if isinstance(module, Linear) and fnmatch.fnmatch(name, config.sites) and not spared:
                module.product = self._product_of(len(self.sites))
                self.sites.append(name)
        if not self.sites:
            raise InputError(
                f"emulate.sites {config.sites!r} names no linear layer: layers.* names all of blocks"
            )

    def begin(self, update: int, row: int) -> None:
        """Begin a micro-batch: its update's number, and that of its first row."""
        self._key = int(row_keys(self.seed, update, [row])[0])

    def _product_of(self, site: int) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
        def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            result: Tensor = _Product.apply(x, weight, bias, self, self._key + 2 * site)  # type: ignore[no-untyped-call]
            return result

        return product

    def operands(
        self, product: str, left: Tensor, right: Tensor, formats: tuple[str, str], *, key: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Round both operands [rows, summed over] of a product to their formats; with a ``key`` the left one stochastically."""
        if product not in self.config.chosen:
            return left, right
        if product == "grad-weight" and self.config.rotates and left.shape[-1] % ROTATED == 0:
            left, right = (rotate(one.float(), self.signs) for one in (left, right))
        generator = None
        if key is not None and self.config.rounds_stochastically:
            generator = torch.Generator(device=left.device).manual_seed(key)
        return _rounded(left, formats[0], generator), _rounded(right, formats[1], None)


def _rounded(x: Tensor, format: str, generator: torch.Generator | None) -> Tensor:
    if not format:
        return x
    rounding: Literal["nearest", "stochastic"] = "nearest" if generator is None else "stochastic"
    return fake_quantize(x, format, rounding=rounding, generator=generator).to(x.dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, emulation: Emulation, key: int
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.emulation, ctx.key, ctx.has_bias = emulation, key, bias is not None
        activations, weights, _ = emulation.config.formats
        own = emulation.operands("forward", x, weight, (activations, weights))
        return linear(*own, bias)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        emulation: Emulation = ctx.emulation
        activations, weights, gradients = emulation.config.formats
        grad_NO = grad_y.reshape(-1, weight.shape[0])
        x_NI = x.reshape(-1, weight.shape[1])
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            g, w = emulation.operands("grad-input", grad_NO, weight.t(), (gradients, weights), key=ctx.key)
            grad_x = wide_product(g, w.t()).to(x.dtype).view(x.shape)
        if ctx.needs_input_grad[1]:
            g, xs = emulation.operands(
                "grad-weight", grad_NO.t(), x_NI.t(), (gradients, activations), key=ctx.key + 1
            )
            grad_weight = wide_product_of_rows(g.t(), xs.t()).to(weight.dtype)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = grad_NO.float().sum(0).to(weight.dtype)
        return grad_x, grad_weight, grad_bias, None, None
