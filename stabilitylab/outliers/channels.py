"""What is kept of one activation site: a few numbers a channel and a few in all, however long the text.

The activation is a matrix of positions R by channels C. Added up window by window, these numbers stay of it:

    low, high        each channel's least and largest value
    elsewhere        each channel's largest magnitude at all positions but the first of every window
    s1, s2, s3, s4   sums of (x - c) to the first, second, third, fourth power over everything; c is the first window's mean
    over_6           each channel's positions with |x| >= 6
    over_6_sigma     each channel's positions at least 6 standard deviations from the mean of its window's tensor
    massive          each channel's positions with |x| > 100 and |x| >= 1,000 medians of |x| in its window's tensor

Maxima and counts are exact, sums are float32 within a window and float64 across, shifted by c so that a mean far from zero does not
drown the spread. The kurtosis is m4 / m2^2 of all values (Gaussian: 3). The three counts look only at channels whose extremes can
reach the threshold, which are few; the median, needed where something exceeds 100, comes from at most 65,536 values at even
distances.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stabilitylab.statistics import power_sums

Array = NDArray[np.float64]

THRESHOLD = 6.0
SIGMAS = 6.0
MASSIVE = 100.0
MASSIVE_MEDIANS = 1000.0
_SAMPLE = 1 << 16
# Beyond these, fourth powers of float32 values leave its range.
_LARGE, _SMALL = 1e8, 1e-8


class ChannelStatistics:
    """The statistics of one site. ``add`` takes what passes there; everything else reads.

    Args:
        channels: width of the last dimension.
    """

    def __init__(self, channels: int) -> None:
        self.positions = 0
        self.low_C: Array = np.full(channels, np.inf)
        self.high_C: Array = np.full(channels, -np.inf)
        self.elsewhere_C: Array = np.zeros(channels)
        self.over_6_C = np.zeros(channels, dtype=np.int64)
        self.over_6_sigma_C = np.zeros(channels, dtype=np.int64)
        self.massive_C = np.zeros(channels, dtype=np.int64)
        self._centre: float | None = None
        self._squares_C: Array = np.zeros(channels)
        self._s1 = self._s2 = self._s3 = self._s4 = 0.0

    @property
    def channels(self) -> int:
        return len(self.low_C)

    @property
    def values(self) -> int:
        """How many values were seen."""
        return self.positions * self.channels

    def add(self, x: Tensor) -> bool:
        """Add an activation, any shape with channels last. Returns False, and adds nothing, where it holds NaN or infinity."""
        x_RC = x.detach().reshape(-1, x.shape[-1])
        rows = len(x_RC)
        if not rows:
            return True
        if x_RC.dtype in (torch.float16, torch.bfloat16):
            x_RC = x_RC.float()
        # In one row of positions the first, where attention sinks lie, is kept apart from the rest.
        first = 1 if x.dim() == 3 and x.shape[0] == 1 < rows else 0
        low_C, high_C = x_RC[first:].amin(0), x_RC[first:].amax(0)
        elsewhere_C = torch.maximum(low_C.neg(), high_C)
        if first:
            low_C, high_C = torch.minimum(low_C, x_RC[0]), torch.maximum(high_C, x_RC[0])
        size_C = torch.maximum(low_C.neg(), high_C)
        largest = float(size_C.max())  # amin and amax pass NaN on
        if not np.isfinite(largest):
            return False
        mean, sigma = self._add_sums(x_RC, largest)
        self.positions += rows
        np.minimum(self.low_C, _numpy(low_C), out=self.low_C)
        np.maximum(self.high_C, _numpy(high_C), out=self.high_C)
        np.maximum(self.elsewhere_C, _numpy(elsewhere_C), out=self.elsewhere_C)
        if largest >= THRESHOLD:
            at = torch.nonzero(size_C >= THRESHOLD).flatten()
            self.over_6_C[at.cpu().numpy()] += _count(x_RC[:, at].abs() >= THRESHOLD)
        if sigma > 0:
            far_C = torch.maximum(high_C - mean, mean - low_C)
            at = torch.nonzero(far_C >= SIGMAS * sigma).flatten()
            if len(at):
                self.over_6_sigma_C[at.cpu().numpy()] += _count((x_RC[:, at] - mean).abs() >= SIGMAS * sigma)
        if largest > MASSIVE:
            floor = MASSIVE_MEDIANS * median_magnitude(x_RC)
            at = torch.nonzero((size_C > MASSIVE) & (size_C >= floor)).flatten()
            if len(at):
                size_RA = x_RC[:, at].abs()
                self.massive_C[at.cpu().numpy()] += _count((size_RA > MASSIVE) & (size_RA >= floor))
        return True

    def _add_sums(self, x_RC: Tensor, largest: float) -> tuple[float, float]:
        """Add the power sums; returns mean and standard deviation of this activation alone."""
        if self._centre is None:
            self._centre = float(x_RC.double().mean() if largest > _LARGE else x_RC.mean())
        y_RC = x_RC - self._centre
        if largest > _LARGE or (0 < largest < _SMALL):
            y_RC = x_RC.double() - self._centre
        y2_RC = y_RC * y_RC
        # By channel, then all: a float32 sum over all of them would lose what lies in one channel.
        s1, s2 = float(_numpy(y_RC.sum(0)).sum()), float(_numpy(y2_RC.sum(0)).sum())
        self._s1 += s1
        self._s2 += s2
        # Of x itself: (x - c) + c would lose a channel far smaller than c, which outliers make large.
        self._squares_C += _numpy(torch.linalg.vector_norm(x_RC, dim=0, dtype=y_RC.dtype).double().square_())
        self._s3 += float(y_RC.mul_(y2_RC).sum())
        self._s4 += float(y2_RC.square_().sum())
        count = x_RC.numel()
        shift = s1 / count
        return self._centre + shift, math.sqrt(max(0.0, s2 / count - shift**2))

    @property
    def largest(self) -> Array:
        """Each channel's largest magnitude."""
        return np.maximum(-self.low_C, self.high_C)

    @property
    def absmax(self) -> float:
        return float(self.largest.max())

    @property
    def median_channel(self) -> float:
        """The median over channels of their largest magnitudes."""
        return float(np.median(self.largest))

    @property
    def times_median(self) -> Array:
        """Each channel's largest magnitude over that median; infinite or NaN where the median is zero."""
        return _over_median(self.largest)

    @property
    def elsewhere_over_median(self) -> Array:
        """The same, for positions other than the first of a window."""
        return _over_median(self.elsewhere_C)

    @property
    def mean(self) -> float:
        return (self._centre or 0.0) + self._s1 / self.values

    @property
    def channel_rms(self) -> Array:
        """Each channel's root mean square."""
        return np.asarray(np.sqrt(self._squares_C / self.positions))

    @property
    def kurtosis(self) -> float:
        """m4 / m2^2 of all values (Gaussian: 3); NaN where they are all equal."""
        sums = (self._s1, self._s2, self._s3, self._s4)
        return float(power_sums.kurtosis(np.asarray(float(self.values)), *map(np.asarray, sums)))

    @property
    def nbytes(self) -> int:
        """Memory of the arrays held."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, np.ndarray))


def _over_median(size_C: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(size_C / np.median(size_C))


def median_magnitude(x: Tensor) -> float:
    """The median of |x|, from at most 65,536 values at even distances."""
    flat = x.reshape(-1)
    stride = -(-flat.numel() // _SAMPLE)
    # A stride that shares a factor with the width would see some channels only.
    while stride > 1 and np.gcd(stride, x.shape[-1]) > 1:
        stride += 1
    return float(flat[::stride].abs().median())


def _numpy(x: Tensor) -> Array:
    return x.double().cpu().numpy()


def _count(mask_RA: Tensor) -> NDArray[np.int64]:
    return mask_RA.sum(0).cpu().numpy()
