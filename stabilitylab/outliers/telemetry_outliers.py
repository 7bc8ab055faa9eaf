"""Outliers over a training run, from its telemetry alone: no model, no text.

Telemetry holds each site's statistics over steps, not its channels, so the criteria that mark dimensions do not apply (for those,
read a text through one of the run's checkpoints). What it holds:

| statistic | over sites |
| --- | --- |
| outlier_fraction | share of values with abs(x) >= 6, mean over sites |
| outlier_6rms_fraction | share of values with abs(x) >= 6 RMS, mean over sites |
| massive_fraction | share with abs(x) > 100 and >= 1,000 medians, mean over sites |
| channel_max_over_median | largest channel over the median channel, largest over sites |
| kurtosis | of all values, largest over sites |
| channel_kurtosis | of the channels' RMS (He et al., arXiv:2405.19279), largest over sites |
| absmax | largest magnitude, largest over sites |

Sites are the inputs of linear layers and the blocks' outputs, of equal weight whatever their width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from stabilitylab.command_line.narrow_tables import print_table
from stabilitylab.errors import InputError
from stabilitylab.figures.curves import by_depth, curves
from stabilitylab.figures.maps import heat_map
from stabilitylab.outliers import words
from stabilitylab.outliers.record import number
from stabilitylab.report.page import Page, Picture, Section, Table, TableCell
from stabilitylab.runs.places import Places
from stabilitylab.runs.run import Run

SHARES = {
    "outlier_fraction": "share of values with |x| ≥ 6",
    "outlier_6rms_fraction": "share of values with |x| ≥ 6 RMS",
    "massive_fraction": "share of massive values (|x| > 100 and ≥ 1,000 medians)",
}
PEAKS = {
    "channel_max_over_median": "largest channel over the median channel",
    "kurtosis": "kurtosis of all values",
    "channel_kurtosis": "kurtosis of the channels' RMS",
    "absmax": "largest magnitude",
}


@dataclass(frozen=True, kw_only=True)
class RunOutliers:
    """What a run's telemetry says of outliers.

    Attributes:
        name: of the run.
        path: its folder.
        matrices: statistic -> rows the sites in the model's order, columns the steps.
        places: where the sites lie in the model.
    """

    name: str
    path: str
    matrices: dict[str, pd.DataFrame]
    places: Places = field(default_factory=Places)

    @property
    def steps(self) -> list[int]:
        return [int(step) for step in next(iter(self.matrices.values())).columns]

    def series(self, statistic: str) -> pd.Series[float]:
        """The statistic over the steps: mean over sites of a share, largest over sites of anything else."""
        matrix = self.matrices[statistic]
        return matrix.mean(axis=0) if statistic in SHARES else matrix.max(axis=0)

    def peak(self, statistic: str) -> tuple[float, int, str]:
        """The largest value at any site and step, and where that was; NaN, -1 and nowhere where no value is finite."""
        matrix = self.matrices[statistic]
        values = np.where(np.isfinite(matrix), matrix, -np.inf)
        row, column = divmod(int(np.argmax(values)), values.shape[1])
        if not np.isfinite(values[row, column]):
            return float("nan"), -1, "-"
        return float(values[row, column]), int(matrix.columns[column]), str(matrix.index[row])


def run_outliers(run: Run) -> RunOutliers:
    """Read the statistics of a run.

    Raises:
        InputError: the run recorded no activations.
    """
    matrices = {}
    for statistic in (*SHARES, *PEAKS):
        matrix = run.matrix("activation", statistic)
        matrix = matrix[[_wanted(str(site), run.places) for site in matrix.index]]
        if matrix.size:
            matrices[statistic] = matrix
    if not matrices:
        raise InputError(
            f"{run.path} recorded no activations: train with activations monitored, or give a model and --text"
        )
    return RunOutliers(name=run.name, path=str(run.path), matrices=matrices, places=run.places)


def _wanted(site: str, places: Places) -> bool:
    """Inputs of linear layers, and blocks. Telemetry has inputs of norms too, which are the residual stream again."""
    module, _, end = site.rpartition(":")
    if end != "input" or not module:
        return places.block_number(site) is not None
    name = module.rsplit(".", 1)[-1].lower()
    return not ("norm" in name or re.match(r"ln(_|\d|$)", name))


def _rows(found: RunOutliers) -> list[tuple[str, str, str, str, str, str]]:
    """Statistic, what it is, at the first step, at the last, the largest anywhere, where that was."""
    rows = []
    for statistic in found.matrices:
        series = found.series(statistic)
        value, step, site = found.peak(statistic)
        rows.append(
            (
                statistic,
                {**SHARES, **PEAKS}[statistic],
                words.short(float(series.iloc[0])),
                words.short(float(series.iloc[-1])),
                words.short(value),
                f"{site}, step {step}" if value else "–",
            )
        )
    return rows


def show_run(found: RunOutliers, console: Console) -> None:
    """Print the statistics at the first and last step, and their peaks."""
    steps = found.steps
    title = Text(f"{found.name}: {len(steps)} measured steps, {steps[0]} to {steps[-1]}")
    table = RichTable("statistic", title=title, title_justify="left")
    for column in ("first", "last", "largest"):
        table.add_column(column, justify="right")
    table.add_column("at")
    for statistic, _, first, last, largest, where in _rows(found):
        table.add_row(statistic, first, last, largest, Text(where))
    print_table(console, table)
    console.print(
        "Shares are means over sites, the rest the largest of any site. Telemetry keeps no channels: for the criteria that mark "
        "dimensions, read a text through a checkpoint (--text FILE)."
    )


def run_record(found: RunOutliers) -> dict[str, Any]:
    """As JSON: series over steps, and peaks."""
    record: dict[str, Any] = {"run": found.name, "path": found.path, "steps": found.steps, "statistics": {}}
    for statistic in found.matrices:
        value, step, site = found.peak(statistic)
        record["statistics"][statistic] = {
            "over_sites": "mean" if statistic in SHARES else "max",
            "series": [number(float(v)) for v in found.series(statistic)],
            "peak": {"value": number(value), "step": step, "site": site},
        }
    return record


def run_page(found: RunOutliers) -> Page:
    """The page about a run."""
    steps = found.steps
    lead = (
        "To run a model in 8-bit arithmetic, every activation is divided by a scale and rounded to one of 255 steps; where one "
        "channel is tens of times larger than the rest, the rest lose their digits. This page shows how such outliers came about "
        f"while {found.name} was trained, from what its monitor recorded at {len(steps)} steps."
    )
    rows: list[Sequence[TableCell | str]] = [
        [TableCell(text=statistic, detail=meaning), first, last, largest, where]
        for statistic, meaning, first, last, largest, where in _rows(found)
    ]
    table = Table(
        columns=["statistic", f"step {steps[0]}", f"step {steps[-1]}", "largest", "where"],
        rows=rows,
        note="Shares are means over sites, the rest the largest of any site.",
    )
    note = (
        "Telemetry keeps no channels, so criteria that mark dimensions are not among these: `stabilitylab outliers` with --text "
        "reads a text through a checkpoint and applies them.",
    )
    page = Page(
        title=f"Activation outliers of {found.name} in training",
        lead=lead,
        facts={"folder": found.path, "steps": f"{len(steps)} measured, {steps[0]} to {steps[-1]}"},
    )
    page.sections += [
        Section(title="How many outliers", text=note, parts=[table]),
        Section(title="Growth over training", parts=_growth(found)),
        Section(title="Where they are", parts=_maps(found)),
        Section(title="Growth over depth", parts=_depth(found)),
    ]
    return page


def _growth(found: RunOutliers) -> list[Picture]:
    short = dict(zip(SHARES, ("|x| ≥ 6", "|x| ≥ 6 RMS", "massive"), strict=True))
    shares = {short[name]: [found.series(name)] for name in SHARES if name in found.matrices}
    pictures = (
        [Picture(figure=curves(shares, title="Outlying values, mean over sites", unit="share", log="auto"))]
        if shares
        else []
    )
    for name in ("channel_max_over_median", "kurtosis"):
        if name in found.matrices:
            series = found.series(name)
            title = f"{PEAKS[name].capitalize()}, largest of any site"
            pictures.append(Picture(figure=curves({name: [series]}, title=title, log="auto")))
    return pictures


def _maps(found: RunOutliers) -> list[Picture]:
    return [
        Picture(figure=heat_map(found.matrices[name], title=f"{PEAKS[name].capitalize()}, site by step"))
        for name in ("channel_max_over_median", "kurtosis", "absmax")
        if name in found.matrices
    ]


def _depth(found: RunOutliers) -> list[Picture]:
    pictures = []
    for name in ("channel_max_over_median", "kurtosis", "absmax"):
        if name not in found.matrices:
            continue
        matrix = found.matrices[name]
        blocks = [site for site in matrix.index if found.places.block_number(str(site)) is not None]
        steps = sorted({matrix.columns[0], matrix.columns[len(matrix.columns) // 2], matrix.columns[-1]})
        lines = {f"step {step}": [matrix.loc[blocks, step]] for step in steps}
        if blocks:
            title = f"{PEAKS[name].capitalize()} of the residual stream"
            pictures.append(Picture(figure=by_depth(lines, title=title)))
    return pictures
