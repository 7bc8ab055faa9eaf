"""What every command does alike: reading its words, writing its tables and its files, leaving when told to."""

from typing import TYPE_CHECKING

from stabilitylab.lazy_names import lazy_names

if TYPE_CHECKING:
    from stabilitylab.command_line.programs import (
        imports_uncollected,
        leave_at_interrupt,
        needs_extra,
        parse,
        run_program,
        sleep_while_waiting,
    )

__all__ = [
    "imports_uncollected",
    "leave_at_interrupt",
    "needs_extra",
    "parse",
    "run_program",
    "sleep_while_waiting",
]

# Tables and files are written without the parser of command lines.
__getattr__, __dir__ = lazy_names(
    __name__, __all__, dict.fromkeys(__all__, "stabilitylab.command_line.programs")
)
