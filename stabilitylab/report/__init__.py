"""A run shown: one self-contained HTML page."""

from stabilitylab.report.page import Cell, Page, Part, Picture, Said, Section, Statements, Table
from stabilitylab.report.single import comparison, run_report

__all__ = [
    "Cell",
    "Page",
    "Part",
    "Picture",
    "Said",
    "Section",
    "Statements",
    "Table",
    "comparison",
    "run_report",
]
