"""Show a run as one self-contained HTML page."""

from stabilitylab.report.page import Content, Page, Picture, Said, Section, Statements, Table, TableCell
from stabilitylab.report.single import comparison, run_report

__all__ = [
    "Content",
    "Page",
    "Picture",
    "Said",
    "Section",
    "Statements",
    "Table",
    "TableCell",
    "comparison",
    "run_report",
]
