"""A run read back and shown: pandas, figures, one-file HTML."""

from stabilitylab.report.page import Cell, Page, Picture, Section, Table
from stabilitylab.report.run import Run, load_run
from stabilitylab.report.single import comparison, run_report

__all__ = ["Cell", "Page", "Picture", "Run", "Section", "Table", "comparison", "load_run", "run_report"]
