"""A scan on the terminal: criteria, the answer, the worst channels."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stabilitylab.command_line.narrow_tables import print_table
from stabilitylab.outliers import words
from stabilitylab.outliers.criteria import CRITERIA, reading
from stabilitylab.outliers.scan import OutlierScan

CHANNELS = (
    "x median: largest over the median channel's; elsewhere: largest without the windows' first position; "
    "at >= 6: share of positions"
)


def show_scan(scan: OutlierScan, console: Console, *, worst: int = 8) -> None:
    """Print what a person looks at first."""
    # Names come from outside: none of them is markup.
    table = Table(
        title=Text(f"{scan.model}: {scan.tokens:,} tokens in {scan.windows:,} windows"),
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    for column, justify in (
        ("criterion", "left"),
        ("of", "left"),
        ("linear inputs", "right"),
        ("residual stream", "right"),
        ("reads like", "left"),
    ):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for criterion in CRITERIA:
        found, branch = criterion.measure(scan.inputs), criterion.measure(scan.residual_stream)
        table.add_row(
            criterion.name, criterion.marks, words.share(found), words.share(branch), reading(found)
        )
    print_table(console, table)
    for sentence in (*words.answer(scan), words.depth(scan), words.first_positions(scan), *words.notes(scan)):
        if sentence:
            console.print(Text(sentence))
    channels = Table(
        "where",
        title="Worst channels of linear inputs",
        title_justify="left",
        caption=CHANNELS,
        caption_justify="left",
        box=SIMPLE_HEAD,
    )
    for column in ("channel", "largest", "x median", "elsewhere", "at >= 6"):
        channels.add_column(column, justify="right")
    for one in scan.worst(worst):
        channels.add_row(
            Text(words.place(one.site).removesuffix(" input")),
            str(one.channel),
            words.short(one.largest),
            words.short(one.times_median),
            words.short(one.elsewhere),
            words.fraction(one.over_6),
        )
    print_table(console, channels)
