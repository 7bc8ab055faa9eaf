"""Sums up in one pass what an optimizer's step did to one parameter.

It measures the change of the weights instead of computing it from a formula, so the result holds for every optimizer, with weight
decay, clipping and skipped steps: it copies weights at equal distances before the step and compares them afterwards. It samples a
parameter of at most ``SAMPLE`` elements whole, a larger one at ``SAMPLE`` or one element in ``ONE_IN``, whichever is more; the
distance shares no factor with the number of elements, so that the sample goes through all columns of a matrix instead of a few. The
standard error of an RMS of n Gaussian numbers is 1/sqrt(2n): 4 % at 256, 1.6 % at 2,048 (of a million weights); where one column
holds most of the sum, as a massive channel's does, n counts only that column's elements in the sample, a ``ONE_IN``-th of its rows.
The copies take a five-hundredth of a large model and live only during the optimizer's step, when the activations are gone: they add
nothing to the peak.

    count, sampled, sum of (w' - w)^2, sum of w^2     of the sample
    sum of g^2 / max(v, eps^2)                        of all elements, v free of its initial bias
    sum of m^2, sum of v^2                            of all elements; -1 where there is no such moment
    number of elements with v < eps^2                 v free of its initial bias

The ratio is StableAdamW's: RMS_t = sqrt(mean(g^2 / max(v, eps^2))), Wortsman et al., arXiv:2304.13013, algorithm 2.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stabilitylab.statistics import native
from stabilitylab.statistics.on_device import is_small

FIELDS = ("count", "sampled", "update2", "weight2", "ratio2", "first2", "second2", "below")
COLUMN = {name: i for i, name in enumerate(FIELDS)}
SAMPLE = 256
ONE_IN = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamMoments:
    """Adam's state for one parameter: moments m and v, 1 - beta2^t, epsilon; whether m and v were decoded for this look, and should
    not be kept for a later one."""

    first: Tensor
    second: Tensor
    correction: float | Tensor
    epsilon: float
    is_decoded: bool = False

    @property
    def is_of_gradients(self) -> bool:
        """Whether v is a mean of g^2 with a known correction. One on a device counts as known, as reading it would wait."""
        return isinstance(self.correction, Tensor) or self.correction == self.correction


class Update:
    """One parameter before and after a step.

    Args:
        weight: the parameter's tensor, strided.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self._lent: tuple[Tensor, int] | None = None
        self._counts: Tensor | None = None
        n = weight.numel()
        self.stride = max(1, n // max(SAMPLE, n // ONE_IN))
        while math.gcd(self.stride, n) > 1:
            self.stride -= 1
        self.sampled = (n + self.stride - 1) // self.stride
        self.job = native.UpdateJob(
            n=n,
            stride=self.stride,
            sampled=self.sampled,
            weight=weight.data_ptr(),
        )
        self.address = ctypes.addressof(self.job)

    def is_of(self, weight: Tensor) -> bool:
        """Whether ``weight`` is the very memory sampled."""
        mine = self.weight
        return (weight.data_ptr(), weight.dtype, weight.shape, weight.device, weight.stride()) == (
            mine.data_ptr(),
            mine.dtype,
            mine.shape,
            mine.device,
            mine.stride(),
        )

    def follow(self, weight: Tensor) -> bool:
        """Compare with ``weight`` from now on, as the optimizer may have put its result into other memory. False if it cannot be
        compared with the sample."""
        if (weight.dtype, weight.shape, weight.device) != (
            self.weight.dtype,
            self.weight.shape,
            self.weight.device,
        ):
            return False
        self.weight = weight
        return True

    @property
    def native(self) -> bool:
        """Whether the compiled kernel can take the weight as it now is."""
        return _plain(self.weight) and native.kernel() is not None

    def lend(self, memory: Tensor | None, offset: int = 0) -> None:
        """Lend memory for the sampled weights; None takes it back."""
        self._lent = None if memory is None else (memory, offset)
        self.job.before = None if memory is None else memory.data_ptr() + 4 * offset

    @property
    def before(self) -> Tensor:
        """The sampled weights as they were before the step."""
        assert self._lent is not None
        memory, offset = self._lent
        return memory.narrow(0, offset, self.sampled)

    def sample(self) -> Tensor:
        """The sampled weights as they are now."""
        return self.weight.detach().reshape(-1)[:: self.stride]

    def prepare(self, gradient: Tensor | None, moments: AdamMoments | None, out: int) -> bool:
        """Set up the kernel's job for after the step; False if the kernel cannot take one of the tensors."""
        job = self.job
        job.weight = self.weight.data_ptr()
        job.first = job.second = job.gradient = None
        if moments is not None:
            if not (
                _plain(moments.first) and _plain(moments.second) and isinstance(moments.correction, float)
            ):
                return False
            job.first, job.second = moments.first.data_ptr(), moments.second.data_ptr()
            job.correction, job.epsilon2 = moments.correction, moments.epsilon**2
            if gradient is not None:
                if not _plain(gradient):
                    return False
                job.gradient = gradient.data_ptr()
        job.out = out
        return self.native

    def after(self, gradient: Tensor | None, moments: AdamMoments | None) -> Tensor:
        """The kernel's numbers in torch operations, [FIELDS] float64, without host synchronisation."""
        norms = [_length(self.sample() - self.before), _length(self.before)]
        unknown = torch.full_like(norms[0], math.nan)
        below = unknown
        if moments is not None:
            limit = moments.epsilon**2
            unbiased = moments.second.double() / moments.correction
            below = (unbiased < limit).sum().double()
            norms.append(unknown)
            if gradient is not None:
                if gradient.layout is not torch.strided:
                    gradient = gradient.to_dense()
                norms[2] = _length(gradient.detach() / unbiased.clamp_min_(limit).sqrt_())
            norms += [_length(moments.first), _length(moments.second)]
        # Whole squares at once: on an accelerator each operation counts.
        squares = torch.stack(norms).square_()
        if moments is None:
            absent = torch.full_like(squares, -1.0)
            squares = torch.cat([squares, unknown[None], absent])
        return torch.cat([self.sizes(unknown.device), squares, below[None]])

    def sizes(self, device: torch.device) -> Tensor:
        """[2] the number of elements and of sampled ones, on ``device``; filled once."""
        if self._counts is None or self._counts.device != device:
            numbers = (self.weight.numel(), self.sampled)
            whole = [torch.full((1,), float(n), dtype=torch.float64, device=device) for n in numbers]
            self._counts = torch.cat(whole)
        return self._counts


def _length(x: Tensor) -> Tensor:
    """The norm, summed in float64 without a float64 copy."""
    length: Tensor = torch.linalg.vector_norm(x.detach(), dtype=torch.float64)
    return length


Stepped = tuple[Update, Tensor | None, AdamMoments | None]


def after_all(stepped: Sequence[Stepped]) -> list[Tensor]:
    """``Update.after`` of each, [FIELDS]; those of small parameters on an accelerator together."""
    rows: list[Tensor | None] = [None] * len(stepped)
    groups: dict[Any, list[int]] = {}
    for place, (update, gradient, moments) in enumerate(stepped):
        if (kind := _kind(update, gradient, moments)) is not None:
            groups.setdefault(kind, []).append(place)
    for places in groups.values():
        found = _after_together([stepped[place] for place in places])
        for place, row in zip(places, found.unbind(), strict=True):
            rows[place] = row
    return [
        one if (one := rows[place]) is not None else update.after(gradient, moments)
        for place, (update, gradient, moments) in enumerate(stepped)
    ]


def _kind(update: Update, gradient: Tensor | None, moments: AdamMoments | None) -> Any:
    """A key, equal for updates that can be processed together; None: by itself."""
    given = [update.weight, *([] if moments is None else [moments.first, moments.second])]
    if moments is None or gradient is None or not is_small(update.weight):
        return None
    given.append(gradient)
    device = update.weight.device
    if any(x.layout is not torch.strided or x.device != device or not x.is_floating_point() for x in given):
        return None
    # Fused optimizers count each parameter's steps on the device.
    correction = None if isinstance(moments.correction, Tensor) else moments.correction
    return device, tuple(x.dtype for x in given), moments.epsilon, correction


def _after_together(stepped: Sequence[Stepped]) -> Tensor:
    """[updates, FIELDS] of updates of one kind, in operations on lists of tensors."""
    updates = [update for update, _, _ in stepped]
    moments = [one for _, _, one in stepped if one is not None]
    gradients = [gradient.detach().double() for _, gradient, _ in stepped if gradient is not None]
    firsts, seconds = [one.first.detach() for one in moments], [one.second.detach() for one in moments]
    epsilon = moments[0].epsilon
    befores = [update.before for update in updates]
    lengths = [update.sampled for update in updates]
    moved = torch.split(torch.cat([u.sample() for u in updates]) - torch.cat(befores), lengths)
    # sqrt(max(v, eps^2)) = max(sqrt v, eps)
    sizes = [second.double() for second in seconds]
    if isinstance(correction := moments[0].correction, float):
        torch._foreach_div_(sizes, correction)
    else:
        sizes = [size / one.correction for size, one in zip(sizes, moments, strict=True)]
    torch._foreach_sqrt_(sizes)
    below = torch.stack([(size < epsilon).sum() for size in sizes]).double()
    torch._foreach_clamp_min_(sizes, epsilon)
    torch._foreach_div_(gradients, sizes)
    norms = [
        torch.stack(torch._foreach_norm(list(some), 2, torch.float64))
        for some in (moved, befores, gradients, firsts, seconds)
    ]
    counts = torch.stack([update.sizes(below.device) for update in updates])
    return torch.cat([counts, torch.stack(norms, dim=1).square_(), below[:, None]], dim=1)


def take_before(updates: list[Update]) -> None:
    """Copy the sampled weights, into memory that ``lend(None)`` gives back."""
    sizes: dict[torch.device, int] = {}
    for update in updates:
        device = update.weight.device
        sizes[device] = sizes.get(device, 0) + update.sampled
    free = {device: torch.empty(size, dtype=torch.float32, device=device) for device, size in sizes.items()}
    for update in updates:
        device = update.weight.device
        sizes[device] -= update.sampled
        update.lend(free[device], sizes[device])
    listed = [u for u in updates if u.native]
    if listed:
        library = native.kernel()
        assert library is not None
        for update in listed:
            update.job.weight = update.weight.data_ptr()
        addresses = (ctypes.c_void_p * len(listed))(*(u.address for u in listed))
        library.stabilitylab_before(ctypes.addressof(addresses), len(listed))
    for update in updates:
        if not update.native:
            update.before.copy_(update.sample())


def _plain(x: Tensor) -> bool:
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.layout is torch.strided
        and x.is_contiguous()
    )
