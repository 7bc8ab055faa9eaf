"""The summary of one tensor after one pass: counts, power sums, the largest magnitude, channels, the tail.

All of it combines exactly over micro-batches and ranks, so this is what leaves the device; the host computes every statistic that
people read from it (``power_sums``, ``tails``, ``headroom``). Each tensor has a row of ``FIELDS``, float64:

    count      elements                          over_6     |x| >= 6: LLM.int8() (arXiv:2208.07339), section 3.1
    nonfinite  NaN or infinite                   over_6rms  |x| >= 6 RMS of its own micro-batch
    zero       equal to 0                        massive    |x| > 100 and >= 1,000 medians of |x|
    subnormal  0 < |x| < the smallest normal                (arXiv:2402.17762); median of 2,048 elements
               number of the tensor's format     s1 .. s4   sums of x^k, k = 1..4
    fp16_lost  0 < |x| <= 2^-25: 0 in fp16       absmax     largest |x|; NaN if any is NaN
    fp8_lost   0 < |x| <= 2^-10: 0 in E4M3       tail_from  the histogram is complete from this magnitude on

and, with ``full``, the largest magnitude and the sum of squares of each channel (last dimension), and a histogram of the largest
magnitudes, at least one in 700 (``tails``). ``over_6rms``, ``massive`` and the histogram come together.

Two implementations, same results up to rounding: the compiled kernel (kernel.c) for float32, bfloat16 and float16 on CPUs; torch
operations, without host synchronisation (``on_device``), for the rest. Complex tensors count as their real and imaginary parts,
sparse ones as their values and the implied zeros.
"""

from __future__ import annotations

import ctypes
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from stabilitylab.compat import is_functorch_wrapped
from stabilitylab.statistics import native, on_device
from stabilitylab.statistics.buffer import Buffer, Slots
from stabilitylab.statistics.on_device import SAMPLE
from stabilitylab.statistics.tails import TAIL_BINS, TAIL_FIRST, TAIL_SHIFT

SUMS = (
    "count",
    "nonfinite",
    "zero",
    "subnormal",
    "fp16_lost",
    "fp8_lost",
    "over_6",
    "over_6rms",
    "massive",
    "s1",
    "s2",
    "s3",
    "s4",
)
FIELDS = (*SUMS, "absmax", "tail_from")
COLUMN = {name: i for i, name in enumerate(FIELDS)}
BLOCK = 1024


def measurable(x: object) -> bool:
    """Whether ``x`` is a tensor with at least one real or complex floating-point number in memory, and no stand-in of
    ``torch.func``'s transforms."""
    return (
        isinstance(x, Tensor)
        and (torch.compiler.is_compiling() or not is_functorch_wrapped(x))
        and (x.is_floating_point() or x.is_complex())
        and x.device.type != "meta"
        and x.numel() > 0
    )


def stored(x: Tensor) -> tuple[Tensor, int]:
    """The stored real numbers of ``x``, and the number of further elements, which are zero and not stored."""
    x = x.detach()
    implied = 0
    if x.layout is not torch.strided:
        size = x.numel()
        x = (x.coalesce() if x.layout is torch.sparse_coo else x).values()
        implied = size - x.numel()
    if x.is_complex():
        x, implied = torch.view_as_real(x.resolve_conj()), 2 * implied
    return x, implied


class Summary:
    """The summary of one site, gathered over a step in the buffer's slots.

    Args:
        buffer: holds the numbers.
        region: ``rows``, or ``replicated`` for tensors alike on all ranks.
        full: with channels and tail.
    """

    __slots__ = (
        "_buffer",
        "_full",
        "_generation",
        "_pointer",
        "address",
        "bits",
        "job",
        "region",
        "row",
        "squares",
        "tail",
    )

    def __init__(self, buffer: Buffer, *, region: str = "rows", full: bool = False) -> None:
        self._buffer = buffer
        self._full = full
        self._generation = -1
        self.job = native.TensorJob(tail_from=math.nan)
        # The job's address for the kernel, which takes a list of jobs; and the address of a list with only this one.
        self.address = ctypes.addressof(self.job)
        self._pointer = ctypes.c_void_p(self.address)
        self.region = region
        self.row: Slots | None = None
        self.bits: Slots | None = None
        self.squares: Slots | None = None
        self.tail: Slots | None = None

    @property
    def seen(self) -> bool:
        """Whether a tensor was added in this step."""
        return self.row is not None and self.row.stamp == self._buffer.stamp

    @property
    def is_plain(self) -> bool:
        """Whether it has neither channels nor tail."""
        return not self._full

    def prepare(self, x: Tensor) -> bool:
        """Set up the kernel's job (``address``) for adding ``x``, which must outlive it. False: the kernel cannot take ``x``."""
        dtype = native.DTYPES.get(x.dtype)
        if (
            dtype is None
            or x.device.type != "cpu"
            or x.layout is not torch.strided
            or not x.is_contiguous()
            or native.kernel() is None
        ):
            return False
        job, buffer = self.job, self._buffer
        channels = self.reserve(x)
        if self._generation != buffer.generation:
            self._point()
        row = self.row
        assert row is not None
        job.data = x.data_ptr()
        job.rows, job.channels = x.numel() // channels, channels
        job.dtype = dtype
        job.fresh = row.stamp != buffer.stamp
        row.stamp = buffer.stamp
        return True

    def add(self, x: Tensor) -> None:
        """Add one measurable tensor's numbers to this step's."""
        if x.layout is torch.strided and not x.is_contiguous():
            x = x.detach().contiguous()
        if self.prepare(x):
            library = native.kernel()
            assert library is not None
            library.stabilitylab_summarise(ctypes.addressof(self._pointer), 1, torch.get_num_threads())
            return
        x, implied = stored(x)
        self.reserve(x)
        buffer, row = self._buffer, self.row
        assert row is not None
        fresh = row.stamp != buffer.stamp
        parts = summarise(x, implied, full=self._full)
        view = buffer.view(row)
        if fresh:
            view.copy_(parts[0])
        else:
            combine(view, parts[0])
        row.stamp = buffer.stamp
        for slots, part in zip((self.bits, self.squares, self.tail), parts[1:], strict=True):
            if slots is not None and part is not None:
                slots.stamp = -1 if fresh else buffer.stamp
                buffer.put(slots, part)

    def reserve(self, x: Tensor) -> int:
        """Make sure of slots for ``x``; returns its number of channels."""
        buffer, device = self._buffer, x.device
        channels = x.shape[-1] if x.dim() and self._full else 1
        if self.row is None or self.row.device != device:
            self.row = buffer.reserve(self.region, len(FIELDS), device)
            if self._full:
                self.bits = buffer.reserve("bits", channels, device)
                self.squares = buffer.reserve("squares", channels, device)
                self.tail = buffer.reserve("tail", TAIL_BINS, device)
            self._generation = -1
        elif self.bits is not None and self.bits.length != channels:
            # The width changed between calls, so these are no channels: give up extremes and squares.
            self.bits = self.squares = None
            self._generation = -1
        return channels

    def fresh_row(self) -> Tensor:
        """The row's slots, to be overwritten."""
        assert self.row is not None
        self.row.stamp = self._buffer.stamp
        return self._buffer.view(self.row)

    def _point(self) -> None:
        """Tell the kernel where the slots lie."""
        buffer, job = self._buffer, self.job
        for field, slots in (
            ("row", self.row),
            ("channel_max", self.bits),
            ("channel_square", self.squares),
            ("tail", self.tail),
        ):
            setattr(job, field, None if slots is None else buffer.address(slots))
        self._generation = buffer.generation


def add_all(pairs: Sequence[tuple[Summary, Tensor]]) -> None:
    """Add many tensors, each to its own summary, in one call of the kernel for those it can take."""
    for summary, x in pairs:
        summary.reserve(x)  # all first: the buffer may move when it grows
    rest = [(summary, x) for summary, x in pairs if not summary.prepare(x)]
    left = {id(summary) for summary, _ in rest}
    addresses = [summary.address for summary, _ in pairs if id(summary) not in left]
    if addresses:
        library = native.kernel()
        assert library is not None
        listed = (ctypes.c_void_p * len(addresses))(*addresses)
        library.stabilitylab_summarise(ctypes.addressof(listed), len(addresses), torch.get_num_threads())
    for summary, x in _add_alike(rest):
        summary.add(x)


def _add_alike(pairs: Sequence[tuple[Summary, Tensor]]) -> list[tuple[Summary, Tensor]]:
    """Add small, similar tensors on an accelerator together; returns the others."""
    times = Counter(id(summary) for summary, _ in pairs)
    new = [(s, x) for s, x in pairs if times[id(s)] == 1 and s.is_plain and not s.seen]
    taken: set[int] = set()
    for places in on_device.alike([x for _, x in new]):
        some = [new[place] for place in places]
        rows = on_device.summarise_alike([x.detach() for _, x in some])
        torch._foreach_copy_([summary.fresh_row() for summary, _ in some], list(rows.unbind()))
        taken |= {id(summary) for summary, _ in some}
    return [(summary, x) for summary, x in pairs if id(summary) not in taken]


def combine(row: Tensor, other: Tensor) -> None:
    """Add ``other`` to ``row`` in place, for any number of rows (..., FIELDS)."""
    n = len(SUMS)
    row[..., :n] += other[..., :n]
    torch.maximum(row[..., n:], other[..., n:], out=row[..., n:])


def summarise(
    x: Tensor, implied: int = 0, *, full: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The kernel's results in torch operations on the tensor's device, without host synchronisation.

    Args:
        x: dense real floating-point tensor of any shape.
        implied: further elements that are zero.
        full: with channels and tail, of the last dimension.

    Returns:
        The row of ``FIELDS``; the bits of each channel's largest magnitude, the sums of squares of each
        channel, and the tail histogram, or None.
    """
    own = x.dtype
    if x.numel() == 0:
        x, implied = x.new_zeros(1), implied - 1
    if x.device.type == "cpu" and own != torch.float64:
        found = _summarise_at_hand(x.float(), own, implied, full=full)
        if found is not None:
            return found
    return on_device.summarise(x, implied, full=full)


def _summarise_at_hand(
    x: Tensor, own: torch.dtype, implied: int, *, full: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None] | None:
    """The same for finite float32 numbers in the host's memory, where reading a result costs nothing, in a fifth of the time: it
    skips counts that the largest and smallest magnitude rule out, and adds without widening. None where a number is not finite."""
    flat = x.reshape(-1)
    size = flat.abs()
    low, high = (float(extreme) for extreme in torch.aminmax(size))
    if not high < math.inf:
        return None
    k = flat.numel()
    unit = (
        2.0 ** (math.frexp(high)[1] - 1) if high > 0 else 1.0
    )  # a power of two, so that dividing by it loses nothing
    y = flat * (1.0 / unit) if 2.0**-126 < unit < 2.0**126 else flat / unit
    t1 = _added(y)
    a = float(np.float32(t1 / k))
    t1 -= k * a
    y -= a
    y2 = y * y
    t2, t3 = _added(y2), _added(y.mul_(y2))
    t4 = _added(y2.mul_(y2))
    s2 = (t2 + 2 * a * t1 + k * a**2) * unit**2

    def below(limit: float) -> int:
        return 0 if low > limit else k if high <= limit else _count(size <= limit)

    zero = below(0.0)
    smallest = torch.finfo(own).smallest_normal
    subnormal = 0 if low >= smallest else _count(size < smallest) - zero
    over_6rms = massive = tail_from = 0.0
    rms = math.sqrt(max(s2, 0.0) / (k + implied))
    bits = squares = tail = None
    if full:
        picked = min(SAMPLE, k)
        at = (torch.arange(picked, dtype=torch.float64) * k / picked).long()
        sample = size[at]
        over_6rms = float(_count(size >= 6 * rms)) if 0 < 6 * rms <= high else 0.0
        if high > 100:
            massive = float(_count((size > 100) & (size >= 1000 * float(sample.median()))))
        size_RC = size.reshape(-1, x.shape[-1] if x.dim() else 1)
        bits, squares = size_RC.amax(0).view(torch.int32), size_RC.square().sum(0)
        # One in a hundred is enough where one in 700 is needed; from the beginning of a bin on.
        first = int(sample.sort().values[int(0.99 * picked)].view(torch.int32)) >> TAIL_SHIFT << TAIL_SHIFT
        magnitudes = size.view(torch.int32)
        largest = magnitudes.masked_select(magnitudes >= first)
        bins = (largest >> TAIL_SHIFT).sub_(TAIL_FIRST).clamp_(0, TAIL_BINS - 1)
        tail = torch.bincount(bins, minlength=TAIL_BINS).int()
        tail_from = float(np.int32(first).view(np.float32))
    row = [
        float(k + implied),
        0.0,
        float(zero + implied),
        float(subnormal),
        float(below(2.0**-25) - zero),
        float(below(2.0**-10) - zero),
        float(_count(size >= 6.0)) if high >= 6.0 else 0.0,
        over_6rms,
        massive,
        (t1 + k * a) * unit,
        s2,
        (t3 + 3 * a * t2 + 3 * a**2 * t1 + k * a**3) * unit**3,
        (t4 + 4 * a * t3 + 6 * a**2 * t2 + 4 * a**3 * t1 + k * a**4) * unit**4,
        high,
        tail_from,
    ]
    return torch.tensor(row, dtype=torch.float64), bits, squares, tail


def _added(flat: Tensor) -> float:
    """The sum: blocks of a thousand numbers in their own format, the blocks' sums in float64."""
    whole = flat.numel() // BLOCK * BLOCK
    sums = flat[:whole].view(-1, BLOCK).sum(1).double().sum() if whole else 0.0
    return float(sums) + float(flat[whole:].double().sum())


def _count(which: Tensor) -> int:
    return int(torch.count_nonzero(which))
