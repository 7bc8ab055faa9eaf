"""A run shown: one self-contained HTML page."""

from stabilitylab.report.page import Cell, Page, Picture, Section, Table
from stabilitylab.report.single import comparison, run_report

__all__ = ["Cell", "Page", "Picture", "Section", "Table", "comparison", "run_report"]
