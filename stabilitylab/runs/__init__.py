"""Write a run folder, and read it back."""

from stabilitylab.runs.run import Run, load_run

__all__ = ["Run", "load_run"]
