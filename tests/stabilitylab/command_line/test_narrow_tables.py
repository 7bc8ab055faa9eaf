"""Tables on terminals of any width: no name and no number is cut, nothing is lost."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stabilitylab.command_line.narrow_tables import print_table

NAMES = ("precision/-/nonfinite_activation_gradients", "train/-/[loss]")
NUMBERS = ("1,234.5", "0.00012345", "none", "")


def printed(width: int, *, no_wrap: bool = False) -> list[str]:
    table = Table(title="the run", caption="of 3 steps")
    table.add_column("metric", no_wrap=no_wrap)
    for name in ("first", "largest", "of\nthem", "not finite"):
        table.add_column(name, justify="right")
    for name in NAMES:
        table.add_row(Text(name), *NUMBERS)
    said = io.StringIO()
    print_table(Console(file=said, width=width), table)
    return said.getvalue().splitlines()


@pytest.mark.parametrize("no_wrap", [False, True])
@pytest.mark.parametrize("width", range(8, 130, 7))
def test_no_name_and_no_number_is_cut(width: int, no_wrap: bool) -> None:
    lines = printed(width, no_wrap=no_wrap)
    text = "\n".join(lines)
    assert "…" not in text
    assert text.count("1,234.5") == text.count("0.00012345") == 2
    # A folded name goes on in the first column of the next line.
    column = "".join(line.split("│")[1].strip() for line in lines if line.count("│") > 2)
    assert all(name in text or name in column for name in NAMES)
    assert "the run" in text
    assert "of 3 steps" in text
    if "│" in text:
        assert all(len(line) <= width for line in lines)


def test_a_table_that_fits_is_as_rich_prints_it() -> None:
    assert printed(120)[1].startswith("┏")
    assert any(f"│ {NAMES[0]} │" in line for line in printed(120))


def test_a_row_is_a_line_where_names_alone_cannot_give_way() -> None:
    assert printed(40) == [
        "the run",
        f"{NAMES[0]}: first 1,234.5, largest 0.00012345, of them none",
        f"{NAMES[1]}: first 1,234.5, largest 0.00012345, of them none",
        "of 3 steps",
    ]
