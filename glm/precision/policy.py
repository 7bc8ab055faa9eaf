"""Which number format holds which tensors, by the name of a precision.

| | weights, activations, gradients | masters, moments | gradient accumulation | loss scale |
| --- | --- | --- | --- | --- |
| fp32 | fp32 | the weights themselves, fp32 | fp32 | none |
| fp16 | fp16 | fp32 | fp16 | dynamic |
| bf16 | bf16 | fp32 | fp32 | none |

Source: mixed precision training (Micikevicius et al., 1710.03740) as GLM-130B ran it (2210.02414, section 3). bf16 accumulates in
fp32 because eight significant bits lose what a micro-batch adds. Between micro-batches it takes 18 bytes a parameter where fp16
takes 16, 12.5 % more; at the end of a backward pass, with the half gradient there too, 25 %. The paper says about 15 %, without a
calculation (``python -m experiments.benchmarks memory``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import nn

from glm.errors import InputError

Precision = Literal["fp32", "bf16", "fp16"]

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class PrecisionPolicy:
    """The number formats of a run, derived from the precision's name."""

    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        if self.precision not in DTYPES:
            raise InputError(f"precision {self.precision!r} is unknown: choose one of {', '.join(DTYPES)}")

    @property
    def compute_dtype(self) -> torch.dtype:
        """Format of weights, activations and gradients."""
        return DTYPES[self.precision]

    @property
    def has_masters(self) -> bool:
        """Whether the optimizer keeps fp32 copies of the weights."""
        return self.precision != "fp32"

    @property
    def accumulates_in_fp32(self) -> bool:
        """Whether an fp32 buffer beside the half gradient accumulates the gradients of micro-batches."""
        return self.precision == "bf16"

    @property
    def scales_loss(self) -> bool:
        """Whether a dynamic scale multiplies the loss before backward."""
        return self.precision == "fp16"

    def cast(self, model: ModuleT) -> ModuleT:
        """Bring the model's parameters into the compute format, in place."""
        return cast_parameters(model, self.compute_dtype)


def cast_parameters(model: ModuleT, dtype: torch.dtype) -> ModuleT:
    """Bring a model's floating-point parameters into a format, in place.

    Its buffers stay as they are: a router's bias moves by a thousandth per update, which bf16 rounds off from .5 on.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model
