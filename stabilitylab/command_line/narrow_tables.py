"""Tables on a terminal of any width, with every name and number whole.

rich cuts what a narrow terminal has no room for (``0.…`` for .0312), though other columns could break between words. Here no column
is narrower than its longest word; where even that is too wide, the first column, of names, breaks within words, and where that is
not enough, each row becomes a line of ``column value`` that the terminal wraps.
"""

from __future__ import annotations

from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

# A column of names that is narrower than this reads worse than a line a row.
NARROWEST = 16
# Wider than any table: measures are those without a terminal.
_ANY = 100_000


def print_table(console: Console, table: Table) -> None:
    """Print the table: as it is where it fits, else with broken lines, or as lines."""
    anywhere = console.options.update(width=_ANY)
    sizes = [
        [Measurement.get(console, anywhere, cell) for cell in (column.header, *column.cells)]
        for column in table.columns
    ]
    low = [max(size.minimum for size in column) for column in sizes]
    high = [max(size.maximum for size in column) for column in sizes]
    borders = Measurement.get(console, anywhere, table).minimum - sum(low)
    low = [h if column.no_wrap else w for column, w, h in zip(table.columns, low, high, strict=True)]
    spare = console.width - borders - sum(low)
    if console.width - borders < sum(high):
        if spare < 0:
            low[0], spare = low[0] + spare, 0
            if low[0] < NARROWEST:
                _print_rows(console, table)
                return
            table.columns[0].overflow, table.columns[0].no_wrap = "fold", False
            high[0] = low[0]
        # The columns that miss least get it all; the others share the rest.
        for left, i in zip(
            range(len(low), 0, -1), sorted(range(len(low)), key=lambda i: high[i] - low[i]), strict=True
        ):
            more = min(high[i] - low[i], spare // left)
            table.columns[i].width = low[i] + more
            spare -= more
    console.print(table)


def _print_rows(console: Console, table: Table) -> None:
    said = [table.title]
    heads = [_plain(console, column.header) for column in table.columns]
    for first, *cells in zip(*(column.cells for column in table.columns), strict=True):
        values = [(head, _plain(console, cell)) for head, cell in zip(heads[1:], cells, strict=True)]
        row = ", ".join(f"{head} {value}".strip() for head, value in values if value)
        said.append(Text(f"{_plain(console, first) or heads[0]}: {row}"))
    said.append(table.caption)
    for line in said:
        if line:
            console.print(line, soft_wrap=True, highlight=False)


def _plain(console: Console, cell: RenderableType) -> str:
    text = cell if isinstance(cell, Text) else console.render_str(str(cell))
    return " ".join(text.plain.split())
