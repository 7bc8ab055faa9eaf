"""A run's folder, written and read back."""

from stabilitylab.runs.run import Run, load_run

__all__ = ["Run", "load_run"]
