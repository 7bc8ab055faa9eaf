"""The ``stabilitylab`` command: shows what a run recorded, and what a model's activations allow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from stabilitylab.command_line import run_program
from stabilitylab.command_line.whole_file import told_beside
from stabilitylab.errors import InputError

COMMANDS = {
    "demo": (
        "stabilitylab.demo",
        "watch a small model break, and see where and why: ten seconds, no download",
    ),
    "report": ("stabilitylab.cli", "write a self-contained HTML page about a run"),
    "compare": ("stabilitylab.cli", "compare several runs on one HTML page"),
    "show": ("stabilitylab.cli", "show a run's last values and its events on the terminal"),
    "spikes": ("stabilitylab.spikes.commands", "find spikes in a training log or run folder"),
    "inspect": ("stabilitylab.logs.commands", "show how a training log is read, without judging it"),
    "watch": ("stabilitylab.watching.commands", "follow a growing log or run, and report what is found"),
    "export": ("stabilitylab.sinks.export", "export a run's numbers as CSV, Parquet or TensorBoard"),
    "forecast": (
        "stabilitylab.forecast.commands",
        "predict which layer of a run leaves which number format, and when",
    ),
    "precursors": (
        "stabilitylab.spikes.commands",
        "measure how well each signal warned of the episodes in a folder of runs",
    ),
    "outliers": (
        "stabilitylab.outliers.commands",
        "find the outlier activations of a model, by every criterion in use",
    ),
    "quantize": (
        "stabilitylab.quantization.commands",
        "choose a quantization scheme for every layer by measuring, and apply it",
    ),
    "rotate": (
        "stabilitylab.quantization.rotation_command",
        "write an equivalent model whose outlier channels a rotation has spread, folded into its weights",
    ),
    "experiments": (
        "stabilitylab.laboratory",
        "run head-to-head experiments on stability, and show their verdicts",
    ),
}

RunPath = Annotated[Path, tyro.conf.Positional]
RunPaths = Annotated[tuple[Path, ...], tyro.conf.Positional]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_program("stabilitylab", COMMANDS, arguments)


def report(run: RunPath, *, out: Path | None = None) -> int:
    """Write one self-contained HTML page about a run.

    Args:
        run: run folder, or a log of any format in docs/logs.md.
        out: file to write; by default report.html in the run folder, or NAME-report.html beside the log.
    """
    from stabilitylab.report import run_report
    from stabilitylab.report.log_page import run_at

    loaded = run_at(run)
    near = loaded.folder.report if run.is_dir() else run.with_name(f"{run.stem}-report.html")
    file = _writable(out or near)
    print(run_report(loaded).write(file), file=told_beside(file))
    return 0


def compare(runs: RunPaths, *, out: Path) -> int:
    """Plot several runs over each other on one HTML page.

    Args:
        runs: run folders and logs, two runs or more; a log may hold several.
        out: file to write.
    """
    from stabilitylab.report import comparison
    from stabilitylab.report.log_page import runs_at

    loaded = [run for path in runs for run in runs_at(path)]
    if len(loaded) < 2:
        raise InputError(f"compare takes two run folders or more, got {len(loaded)}: a log may stand for one")
    print(comparison(loaded).write(_writable(out)), file=told_beside(out))
    return 0


def show(run: RunPath) -> int:
    """Print a run's last values and its events.

    Args:
        run: run folder, or a log of any format in docs/logs.md.
    """
    from stabilitylab.report.log_page import run_at
    from stabilitylab.report.terminal import show_run

    show_run(run_at(run))
    return 0


def _writable(path: Path) -> Path:
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {path.parent}")
    return path
