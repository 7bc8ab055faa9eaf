"""The ``stabilitylab`` command: what a run recorded, and what a model's activations allow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from stabilitylab.command_line import run_program
from stabilitylab.errors import InputError

COMMANDS = {
    "demo": (
        "stabilitylab.demo",
        "a small model breaks, is found, named and shown: ten seconds, no download",
    ),
    "report": ("stabilitylab.cli", "one self-contained HTML page about a run"),
    "compare": ("stabilitylab.cli", "several runs over each other, as HTML"),
    "show": ("stabilitylab.cli", "a run's last values and its events, on the terminal"),
    "spikes": ("stabilitylab.spikes.commands", "find spikes in a training log or run folder"),
    "inspect": ("stabilitylab.logs.commands", "what a training log holds, without judging it"),
    "watch": ("stabilitylab.watching.commands", "follow a growing log or run, and say what is found"),
    "export": ("stabilitylab.sinks.export", "a run's numbers as CSV, Parquet or TensorBoard"),
    "forecast": ("stabilitylab.forecast.commands", "which layer leaves which number format when, of a run"),
    "precursors": (
        "stabilitylab.spikes.commands",
        "how well each signal warned of a folder of runs' episodes",
    ),
    "outliers": (
        "stabilitylab.outliers.commands",
        "which activations of a model stand out, by every criterion",
    ),
    "quantize": (
        "stabilitylab.quantization.commands",
        "a quantization scheme for every layer of a model, measured, and applied",
    ),
    "experiments": ("stabilitylab.laboratory", "head-to-head experiments on stability, and their verdicts"),
}

RunPath = Annotated[Path, tyro.conf.Positional]
RunPaths = Annotated[tuple[Path, ...], tyro.conf.Positional]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_program("stabilitylab", COMMANDS, arguments)


def report(run: RunPath, *, out: Path | None = None) -> int:
    """Write one self-contained HTML page about a run.

    Args:
        run: run folder.
        out: file to write; by default report.html in the run folder.
    """
    from stabilitylab.report import run_report
    from stabilitylab.runs import load_run

    loaded = load_run(run)
    print(run_report(loaded).write(_writable(out or loaded.folder.report)))
    return 0


def compare(runs: RunPaths, *, out: Path) -> int:
    """Write several runs over each other as one HTML page.

    Args:
        runs: run folders, two or more.
        out: file to write.
    """
    from stabilitylab.report import comparison
    from stabilitylab.runs import load_run

    if len(runs) < 2:
        raise InputError(f"compare takes two run folders or more, got {len(runs)}")
    print(comparison([load_run(run) for run in runs]).write(_writable(out)))
    return 0


def show(run: RunPath) -> int:
    """Print a run's last values and its events.

    Args:
        run: run folder.
    """
    from stabilitylab.report.terminal import show_run
    from stabilitylab.runs import load_run

    show_run(load_run(run))
    return 0


def _writable(path: Path) -> Path:
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {path.parent}")
    return path
