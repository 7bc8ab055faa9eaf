"""The page about a scan, for somebody who never saw the tool: what outliers are, where this model has them, by which measure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stabilitylab.outliers import words
from stabilitylab.outliers.criteria import CRITERIA, reading, three_part_mask
from stabilitylab.outliers.figures import channel_map, depth_figures, recurring_roles
from stabilitylab.outliers.scan import OutlierScan
from stabilitylab.report.page import Page, Picture, Section, Table, TableCell

MOST_MAPS = 8
MOST_LISTED = 32
# Beyond this a channel stands out whatever its ratio; without an end, one channel would darken all maps.
BRIGHTEST = 100.0


def outlier_page(scan: OutlierScan, *, decided: str = "", decision: Sequence[Section] = ()) -> Page:
    """The report of a scan.

    Args:
        decided: which formats the model bears, in a sentence that opens the page.
        decision: sections on what to do about it, put first.
    """
    worst = scan.worst(1)[0]
    lead = (
        f"{decided}{' ' if decided else ''}"
        "To run a model in 8-bit arithmetic, every activation is divided by a scale and rounded to one of 255 steps. The largest "
        "value sets the scale: where one channel is tens of times larger than the rest, the rest lose their digits. Such channels "
        f"are outliers. {scan.model} has its most prominent one in {words.place(worst.site)}: channel {worst.channel} reaches "
        f"{words.short(worst.largest)}, {words.short(worst.times_median)} × what the median channel there does. This page shows "
        "where outliers lie, how many there are by every definition in use, and how they grow with depth."
    )
    page = Page(title=f"Activation outliers of {scan.model}", lead=lead, facts=_facts(scan))
    page.sections += [
        *decision,
        criteria_section(scan),
        worst_section(scan),
        map_section(scan),
        depth_section(scan),
    ]
    return page


def _facts(scan: OutlierScan) -> dict[str, str]:
    return {
        "model": f"{scan.model}, fingerprint {scan.fingerprint}",
        "text": scan.text,
        "tokens": f"{scan.tokens:,} in {scan.windows:,} window{'s'[: scan.windows != 1]} of up to {scan.length}",
        "sites": f"{len(scan.inputs)} linear inputs, {len(scan.residual_stream)} blocks",
    }


def criteria_section(scan: OutlierScan) -> Section:
    """Every criterion side by side, and which of them give the published shares."""
    rows: list[Sequence[TableCell | str]] = []
    for criterion in CRITERIA:
        found, branch = criterion.measure(scan.inputs), criterion.measure(scan.residual_stream)
        rows.append(
            [
                TableCell(text=criterion.name, detail=f"{criterion.rule}; {criterion.source}"),
                criterion.marks,
                words.share(found),
                words.share(branch),
                reading(found),
            ]
        )
    text = (
        "GLM-130B's authors report outliers in about 30 % of the dimensions where OPT and BLOOM have about 0.1 %, and therefore "
        "keep activations in 16 bits; they give no threshold. Definitions differ by orders of magnitude, so a share means "
        "something only beside its criterion.",
        *words.answer(scan),
    )
    note = (
        "Linear inputs: what enters the linear layers. Residual stream: the blocks' outputs. The last column reads the "
        "linear inputs: within a factor of 3 of what is published, between, above or below. An absolute "
        "threshold depends on the scale of the model's activations; multiples of "
        "the median channel and of the standard deviation do not."
    )
    columns = ["criterion", "marks", "linear inputs", "residual stream", "reads like"]
    return Section(title="How many outliers", text=text, parts=[Table(columns=columns, rows=rows, note=note)])


def worst_section(scan: OutlierScan, count: int = 20) -> Section:
    """The most prominent channels, and those of the residual stream that LLM.int8()'s rule marks."""
    rows = [
        [
            words.place(one.site),
            str(one.channel),
            words.short(one.largest),
            f"{words.short(one.times_median)} ×",
            words.short(one.elsewhere),
            words.fraction(one.over_6),
        ]
        for one in scan.worst(count)
    ]
    columns = ["where", "channel", "largest |x|", "over the median channel", "elsewhere", "positions ≥ 6"]
    note = "Elsewhere: the channel's largest magnitude without the first position of every window."
    text = [
        "A channel that is large at few positions sits on special tokens, most often the first of a window, on which attention "
        "rests; per-token scales confine its harm to those. One that is large at many positions harms every token, and asks for "
        "mixed precision or for moving its size into the weights.",
        words.first_positions(scan),
        *words.notes(scan),
    ]
    for name, seen in (("linear inputs", scan.inputs), ("residual stream", scan.residual_stream)):
        marked = np.flatnonzero(three_part_mask(seen))
        if len(marked) > MOST_LISTED:
            text.append(
                f"LLM.int8()'s rule marks {len(marked):,} dimensions of the {name}: it does not select there."
            )
        elif len(marked):
            listed = ", ".join(map(str, marked))
            text.append(
                f"LLM.int8()'s rule marks of the {name} dimension{'s' if len(marked) > 1 else ''} {listed}."
            )
    return Section(
        title="The worst channels", text=text, parts=[Table(columns=columns, rows=rows, note=note)]
    )


def map_section(scan: OutlierScan) -> Section:
    """Layers by channels, for every place in the block."""
    roles = recurring_roles(scan)[:MOST_MAPS]
    seen = [one for role in roles for _, one in scan.roles()[role]]
    largest = max((float(np.nanmax(one.times_median, initial=1.0)) for one in seen), default=1.0)
    highest = min(largest, BRIGHTEST)
    parts = [Picture(figure=channel_map(scan, role, highest=highest)) for role in roles]
    text = (
        "One row a layer, one column a channel, of which the most prominent are shown; bright is large. All maps share one "
        "colour scale, which ends at 100. A vertical line is a channel that stands out in layer after layer; a single bright "
        "cell is one layer's own.",
    )
    if not parts:
        text = ("This model has no stack of blocks, so there is nothing to lay out by depth.",)
    return Section(title="Where they are", text=text, parts=parts)


def depth_section(scan: OutlierScan) -> Section:
    """Growth over depth."""
    drawn = depth_figures(scan)
    said = words.depth(scan)
    parts = [Picture(figure=figure, caption=caption) for figure, caption in drawn]
    return Section(title="Growth over depth", text=(said,) if said else (), parts=parts)
