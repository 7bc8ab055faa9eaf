"""What a scan found in words: numbers as people read them, and the sentences that terminal and page share."""

from __future__ import annotations

from stabilitylab.figures.numbers import plain
from stabilitylab.outliers.criteria import CRITERIA, GLM_SHARE, OPT_SHARE, MarkedShare
from stabilitylab.outliers.scan import OutlierScan
from stabilitylab.outliers.scan_sites import Site


def share(found: MarkedShare) -> str:
    """``2.6 %``, ``1 in 12,000``, ``none``, or a dash where the criterion does not apply."""
    return "–" if found.share is None else fraction(found.share)


def fraction(value: float) -> str:
    """A share in percent, and one below 0.01 % as one in N."""
    if value == 0:
        return "none"
    if value == 1:
        return "all"
    if value < 1e-4:
        return f"1 in {float(f'{1 / value:.3g}'):,.0f}"
    # Two digits, but nearly all must not read as all.
    return f"{100 * value:.2g} %" if value < 0.0995 else f"{min(99.9, 100 * value):.3g} %"


def short(value: float) -> str:
    """Three digits: 0.12, 18.7, 9,460."""
    return plain(float(f"{value:.3g}"))


def place(site: Site) -> str:
    """``layer 14, mlp.down_proj input``."""
    if site.is_residual_stream:
        return f"{site.role} after layer {site.layer}"
    where = site.role if site.is_input else site.path
    return f"{where} input" if site.layer is None else f"layer {site.layer}, {where} input"


def answer(scan: OutlierScan) -> list[str]:
    """Which criterion gives about 30 %, and which about 0.1 %, on this model."""
    sentences = []
    for published, whose in ((GLM_SHARE, "GLM-130B's ~30 %"), (OPT_SHARE, "OPT's and BLOOM's ~0.1 %")):
        near = []
        for where, seen in (("linear inputs", scan.inputs), ("residual stream", scan.residual_stream)):
            for criterion in CRITERIA:
                found = criterion.measure(seen)
                if found.share is not None and published / 3 <= found.share <= 3 * published:
                    near.append(f"{criterion.name} on the {where} ({share(found)} of {criterion.marks})")
        said = ", ".join(near) if near else "no criterion here"
        sentences.append(f"Within a factor of 3 of {whose}: {said}.")
    magnitude, times = scan.thresholds()["magnitude"], scan.thresholds()["times_median"]
    sentences.append(
        f"30 % of the linear inputs' dimensions reach {short(magnitude[0])} ({short(times[0])} × the median channel), "
        f"0.1 % reach {short(magnitude[1])} ({short(times[1])} ×)."
    )
    return sentences


def depth(scan: OutlierScan) -> str:
    """How the residual stream grows, in one sentence; empty for a model without blocks."""
    branch = scan.residual_stream
    if not branch:
        return ""
    peak = max(branch, key=lambda pair: pair[1].absmax)
    first = branch[0][1].absmax
    return (
        f"The residual stream's largest value is {short(first)} after layer {branch[0][0].layer}, "
        f"{short(peak[1].absmax)} at its highest (layer {peak[0].layer}) and {short(branch[-1][1].absmax)} after the last."
    )


def first_positions(scan: OutlierScan, worst: int = 20) -> str:
    """How many of the worst channels owe it to the first position of the windows, where attention sinks lie."""
    channels = scan.worst(worst)
    owing = sum(one.elsewhere <= one.largest / 3 for one in channels)
    return (
        f"Of the {len(channels)} worst channels, {owing} owe it to the first position of the windows: elsewhere they reach a "
        "third or less."
    )


def notes(scan: OutlierScan) -> list[str]:
    """What a reader should know about the scan."""
    said = [f"{note[0].upper()}{note[1:]}." for note in scan.notes]
    together = {others for several in scan.shared.values() for others in several}
    if together:
        said.append(
            f"{len(together)} linear layers read the same tensor as another and are measured with it "
            "(query, key and value do, for example)."
        )
    if scan.skipped:
        said.append(
            f"{len(scan.skipped)} linear layers were never reached by this text, among them {scan.skipped[0]}."
        )
    return said
