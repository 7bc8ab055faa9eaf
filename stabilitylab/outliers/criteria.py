"""What counts as an outlier: each criterion with its rule and its source. They differ by orders of magnitude.

GLM-130B's paper (arXiv:2210.02414, appendix) speaks of outliers in about 30 % of the dimensions where OPT and BLOOM have about 0.1
%, and names no threshold; the same appendix has 99.98 % of the dimensions below 6. So a share says nothing without its criterion,
and a report states all of them side by side.

Two kinds: those that mark *dimensions* (channels of a site; a quantizer treats them one by one), and those that count
*values*. An absolute threshold depends on the scale of the model's activations, which norms and weights are free to choose;
multiples of the median channel and of the standard deviation do not.

| name | marks | rule | source |
| --- | --- | --- | --- |
| llm.int8 | dimensions | abs(x) >= 6 in >= 25 % of layers, at >= 6 % of positions | Dettmers et al., arXiv:2208.07339, sec. 4.1 |
| over-6 | dimensions | abs(x) >= 6 at least once | its first part alone; GLM-130B's "99.98 % below 6" |
| 3-sigma | dimensions | channel RMS 3 standard deviations above the mean's | after Kovaleva et al., arXiv:2105.06990 |
| 3x-median | dimensions | largest magnitude >= 3 x the median channel's | ratio as in SmoothQuant, arXiv:2211.10438, figure 4 |
| 10x-median | dimensions | largest magnitude >= 10 x the median channel's | the same |
| 100x-median | dimensions | largest magnitude >= 100 x the median channel's | "about 100 x larger", SmoothQuant, section 3 |
| values-over-6 | values | abs(x) >= 6 | Dettmers et al., section 4.1 |
| values-6-sigma | values | 6 standard deviations from the tensor's mean | Bondarenko et al., arXiv:2109.12948 |
| massive | values | abs(x) > 100 and >= 1,000 x the median of abs(x) | Sun et al., arXiv:2402.17762 |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stabilitylab.errors import InputError
from stabilitylab.outliers.channels import ChannelStatistics
from stabilitylab.outliers.scan_sites import Site

SitesSeen = Sequence[tuple[Site, ChannelStatistics]]
Marks = NDArray[np.bool_]

GLM_SHARE = 0.30
OPT_SHARE = 0.001
# LLM.int8()'s shares of layers and of positions.
LAYERS, POSITIONS = 0.25, 0.06


@dataclass(frozen=True, kw_only=True)
class MarkedShare:
    """How many of how many a criterion marks. ``share`` is None where there is nothing to judge."""

    marked: int
    total: int

    @property
    def share(self) -> float | None:
        return self.marked / self.total if self.total else None


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """A named rule.

    Attributes:
        name: short, for tables and JSON.
        marks: what it marks.
        rule: in words.
        source: where it is from.
        measure: marked and total over sites.
    """

    name: str
    marks: Literal["dimensions", "values"]
    rule: str
    source: str
    measure: Callable[[SitesSeen], MarkedShare]


def three_part(seen: SitesSeen) -> MarkedShare:
    """LLM.int8()'s rule. Dimensions of one width recur from layer to layer: the residual stream's, and those of the inputs made
    from it by a norm. In every layer a dimension takes the site where it is largest.

    The share of positions is taken over all layers and positions together. Sites of another width than the most frequent narrowest
    one (the feed-forward contraction) are left out, as in the paper.
    """
    layers, mask_C = _recurring(seen)
    return (
        MarkedShare(marked=int(mask_C.sum()), total=len(mask_C)) if layers else MarkedShare(marked=0, total=0)
    )


def three_part_mask(seen: SitesSeen) -> Marks:
    """The dimensions that ``three_part`` marks; empty where no layers recur."""
    return _recurring(seen)[1]


def _recurring(seen: SitesSeen) -> tuple[int, Marks]:
    inside = [(site.layer, one) for site, one in seen if site.layer is not None and one.positions]
    if not inside:
        return 0, np.zeros(0, dtype=bool)
    # The hidden width is that of most sites: attention inputs, output projection, expansion, residual stream.
    widths, counts = np.unique([one.channels for _, one in inside], return_counts=True)
    width = int(widths[np.argmax(counts)])
    share_C: dict[int, NDArray[np.float64]] = {}
    for layer, one in inside:
        if one.channels == width:
            here = one.over_6_C / one.positions
            share_C[layer] = np.maximum(share_C[layer], here) if layer in share_C else here
    share_LC = np.stack(list(share_C.values()))
    in_layers_C = (share_LC > 0).mean(0) >= LAYERS
    return len(share_LC), np.asarray(in_layers_C & (share_LC.mean(0) >= POSITIONS))


def over_6(one: ChannelStatistics) -> Marks:
    """Channels with a value of magnitude 6 or more."""
    return np.asarray(one.largest >= 6.0)


def three_sigma(one: ChannelStatistics) -> Marks:
    """Channels whose RMS lies 3 standard deviations above the mean of all channels' RMS.

    The source judges LayerNorm weights so; the rule here judges what comes out of them.
    """
    rms_C = one.channel_rms
    return np.asarray(rms_C > rms_C.mean() + 3 * rms_C.std())


def times_median(k: float) -> Callable[[ChannelStatistics], Marks]:
    """Channels that reach k times the median channel's largest magnitude."""

    def mark(one: ChannelStatistics) -> Marks:
        return np.asarray(one.largest >= k * one.median_channel) & (one.largest > 0)

    return mark


def dimensions(mark: Callable[[ChannelStatistics], Marks]) -> Callable[[SitesSeen], MarkedShare]:
    """Marked channels of all sites, out of all their channels."""

    def measure(seen: SitesSeen) -> MarkedShare:
        marks = [mark(one) for _, one in seen if one.positions]
        return MarkedShare(marked=sum(int(m.sum()) for m in marks), total=sum(len(m) for m in marks))

    return measure


def values(count: Callable[[ChannelStatistics], NDArray[np.int64]]) -> Callable[[SitesSeen], MarkedShare]:
    """Marked values of all sites, out of all their values."""

    def measure(seen: SitesSeen) -> MarkedShare:
        return MarkedShare(
            marked=sum(int(count(one).sum()) for _, one in seen), total=sum(one.values for _, one in seen)
        )

    return measure


CRITERIA: list[Criterion] = [
    Criterion(
        name="llm.int8",
        marks="dimensions",
        rule="|x| ≥ 6 in ≥ 25 % of the layers and at ≥ 6 % of the positions",
        source="LLM.int8(), arXiv:2208.07339, section 4.1",
        measure=three_part,
    ),
    Criterion(
        name="over-6",
        marks="dimensions",
        rule="|x| ≥ 6 at least once",
        source="the first part of LLM.int8()'s rule alone",
        measure=dimensions(over_6),
    ),
    Criterion(
        name="3-sigma",
        marks="dimensions",
        rule="channel RMS more than 3 standard deviations above the mean channel's",
        source="after Kovaleva et al., arXiv:2105.06990",
        measure=dimensions(three_sigma),
    ),
    *(
        Criterion(
            name=f"{k}x-median",
            marks="dimensions",
            rule=f"channel maximum ≥ {k} × the median channel's",
            source="ratio as in SmoothQuant, arXiv:2211.10438",
            measure=dimensions(times_median(k)),
        )
        for k in (3, 10, 100)
    ),
    Criterion(
        name="values-over-6",
        marks="values",
        rule="|x| ≥ 6",
        source="LLM.int8(), arXiv:2208.07339, section 4.1",
        measure=values(lambda one: one.over_6_C),
    ),
    Criterion(
        name="values-6-sigma",
        marks="values",
        rule="6 standard deviations from the tensor's mean",
        source="Bondarenko et al., arXiv:2109.12948",
        measure=values(lambda one: one.over_6_sigma_C),
    ),
    Criterion(
        name="massive",
        marks="values",
        rule="|x| > 100 and ≥ 1,000 × the median of |x|",
        source="Sun et al., arXiv:2402.17762",
        measure=values(lambda one: one.massive_C),
    ),
]


def register_criterion(criterion: Criterion) -> None:
    """Put a criterion of your own beside these, in every table, page and JSON of a scan.

    Raises:
        InputError: there is one of that name.
    """
    if any(criterion.name == one.name for one in CRITERIA):
        raise InputError(f"there is a criterion {criterion.name!r} already: choose another name")
    CRITERIA.append(criterion)


def reading(found: MarkedShare) -> str:
    """Whose published share this share is like, within a factor of 3: GLM-130B's, OPT's and BLOOM's, or neither's."""
    share = found.share
    if share is None:
        return "–"
    if share == 0:
        return "none"
    for name, published in (("GLM-130B", GLM_SHARE), ("OPT, BLOOM", OPT_SHARE)):
        if published / 3 <= share <= published * 3:
            return name
    if share > GLM_SHARE:
        return "nearly all"
    return "between" if share > OPT_SHARE else "fewer"
