"""A model's weights: whether they are finite, a fingerprint that tells one model from another, and their shortest exact form."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from stabilitylab.models.freed_memory import let_go_of_pages

_SAMPLE = 64
_AT_ONCE = 1 << 24


def first_nonfinite(module: nn.Module) -> str | None:
    """The name of a parameter or buffer with a NaN or an infinity in it; None where there is none.

    Infinite buffers are usual (masks), so in those only NaN counts.
    """
    for name, parameter in module.named_parameters():
        if not is_finite(parameter):
            return name
    for name, buffer in module.named_buffers():
        if buffer.is_floating_point() and bool(torch.isnan(buffer).any()):
            return name
    return None


def is_finite(tensor: Tensor) -> bool:
    """Whether no number of a tensor is NaN or an infinity; makes no copy, and lets its pages go on the way."""
    for part in _parts(tensor.detach()):
        # Both ends in one pass and no temporary: a NaN anywhere makes both NaN.
        if part.numel() and not bool(torch.isfinite(torch.stack(part.aminmax())).all()):
            return False
        let_go_of_pages([part])
    return True


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """Rows to look at together."""
    if tensor.dim() < 2 or tensor.numel() <= _AT_ONCE:
        return (tensor,)
    return torch.split(tensor, max(1, _AT_ONCE * len(tensor) // tensor.numel()))


def fingerprint(module: nn.Module) -> str:
    """The fingerprint of a model's parameters: see ``fingerprint_of``."""
    return fingerprint_of(sorted(module.named_parameters()))


def fingerprint_of(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """16 hexadecimal digits over parameter names, shapes, and 64 evenly spaced values of each parameter, in order of names.

    Values count in bfloat16, so that the same model opened in float32 and in bfloat16 is the same model. (Opened in float16 it may
    differ: values are then rounded twice.) Two fine-tunings of one model differ, unless every sampled value agrees to 8 bits.
    Parameters may come one by one, so a model need not fit into memory.
    """
    digest = hashlib.sha256()
    for name, parameter in parameters:
        flat = parameter.detach().reshape(-1)
        at = torch.linspace(0, max(0, flat.numel() - 1), min(_SAMPLE, flat.numel()), dtype=torch.float64)
        values = flat[at.round().long()].to("cpu", torch.bfloat16).view(torch.int16)
        digest.update(f"{name} {tuple(parameter.shape)} ".encode())
        digest.update(values.numpy().tobytes())
        let_go_of_pages([parameter])
    return digest.hexdigest()[:16]


def narrowest(tensor: Tensor) -> Tensor:
    """The same numbers in 16 bits, where no bit is lost."""
    if tensor.dtype == torch.float32:
        for dtype in (torch.bfloat16, torch.float16):
            narrow = tensor.to(dtype)
            if torch.equal(narrow.float(), tensor):
                return narrow
    return tensor
