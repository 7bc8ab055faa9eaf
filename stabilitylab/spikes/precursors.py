"""Which signal warns before the loss breaks? Each precursor's record over all episodes of a folder of runs.

An *alarm* of a precursor is an excursion of its logarithm over its own baseline (``baseline.py``, with a floor of a factor of 2),
for the loss scale two halvings without a doubling between. Where a precursor has many sites, each is measured against its own level
(``site_levels.py``: ``SITE_SIGMAS`` deviations and a factor of ``SITE_FACTOR``), since the largest of them all would hide the one
that moves; the first that leaves is the alarm, and none follows within ``QUIET`` steps.

An *episode* is a spike, a divergence or non-finite values of the loss. An alarm is

    right      when an episode begins 1 to ``horizon`` steps after the alarm did
    a result   when it begins in an episode, or within ``horizon`` steps of its end: it is left out
    wrong      otherwise

    precision = right / (right + wrong)        recall = episodes with an alarm 1 to horizon steps before / all
    lead      = steps from the first such alarm to the onset; the median over the episodes that had one

The interval of measurement bounds the lead: a signal measured every tenth step can only lead by its last measurement. Few episodes
give coarse figures: the counts are listed beside them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd

from stabilitylab.errors import InputError
from stabilitylab.runs import Run, load_run
from stabilitylab.spikes.baseline import Baseline
from stabilitylab.spikes.detector import FACTOR_OF_TWO, SpikeDetector
from stabilitylab.spikes.episodes import Episode, episodes_of
from stabilitylab.spikes.excursion import Excursions
from stabilitylab.spikes.loss_scale_collapse import ScaleWatch
from stabilitylab.spikes.offline import feed_losses
from stabilitylab.spikes.site_levels import SiteLevels
from stabilitylab.telemetry import LOSS, LOSS_SCALES

HORIZON = 64
EPISODES = ("spike", "divergence", "non-finite")
EARLY_COLLAPSE = 4.0
SITE_SIGMAS, SITE_FACTOR, QUIET = 10.0, 3.0, 16
BY_SITE = {
    "update RMS / Adam's scale": ("update", "rms_t"),
    "update RMS": ("update", "rms"),
    "attention maximum": ("attention", "score_max"),
    "gradient of one site": ("gradient", "l2"),
    "activation of one site": ("activation", "absmax"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """How one precursor did.

    Attributes:
        precursor: its name.
        runs: number of runs that recorded it.
        episodes: number of episodes in them.
        warned: episodes with an alarm before them.
        right, wrong: alarms.
        precision, recall: see the module's docstring; None where there was nothing to judge.
        median_lead: steps.
    """

    precursor: str
    runs: int
    episodes: int
    warned: int
    right: int
    wrong: int
    precision: float | None
    recall: float | None
    median_lead: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def find_runs(folder: Path) -> list[Run]:
    """``folder`` itself if it is a run, else every run below it that does not lie inside another run.

    Raises:
        InputError: there is none.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder of runs: there is no such directory")
    if (folder / "telemetry").is_dir():
        return [load_run(folder)]
    every = {path.parent for path in folder.glob("**/telemetry") if path.is_dir()}
    # Forks of an event (``glm replay``) lie inside the run that they repeat, and do not count as runs.
    found = sorted(path for path in every if not any(above in every for above in path.parents))
    if not found:
        raise InputError(f"{folder} holds no runs: give a folder with run folders in it")
    return [load_run(path) for path in found]


def judge(runs: Sequence[Run], *, horizon: int = HORIZON) -> list[Record]:
    """The record of every precursor that any run recorded, the best recall first."""
    if horizon < 1:
        raise InputError(f"--horizon counts steps, at least 1, got {horizon}")
    tallies: dict[str, _Tally] = {}
    for run in runs:
        episodes = _episodes(run)
        alarms = {name: _alarms(name, series) for name, series in precursor_series(run).items()}
        alarms |= {
            name: found for name, of in BY_SITE.items() if (found := site_alarms(run, *of)) is not None
        }
        for name, found in alarms.items():
            tallies.setdefault(name, _Tally(name)).add(found, episodes, horizon)
    records = [tally.record() for tally in tallies.values()]
    return sorted(records, key=lambda one: (-(one.recall or 0.0), -(one.precision or 0.0)))


def precursor_series(run: Run) -> Mapping[str, pd.Series[float]]:
    """Precursor name -> one value per step; without those that the run did not record."""
    candidates = {
        "gradient norm": run.series("train/-/gradient_norm"),
        "embedding gradient": _embedding_gradient(run),
    }
    for name in LOSS_SCALES:
        scale = run.series(name)
        if len(scale) and scale.max() > 1:
            candidates["loss scale"] = scale
    return {name: series for name, series in candidates.items() if len(series)}


def site_alarms(run: Run, family: str, statistic: str) -> list[int] | None:
    """Steps at which a site left its own level, in one pass over the steps; None where the run recorded nothing."""
    rows = run.rows(family, statistic).sort_values("step", kind="stable")
    if not len(rows):
        return None
    # One number per site and index.
    site = rows["site"].cat.codes.to_numpy().astype(np.int64)
    index = rows["index"].to_numpy().astype(np.int64)
    _, number = np.unique(site * (index.max() + 2) + index + 1, return_inverse=True)
    value, step = rows["value"].to_numpy(np.float64), rows["step"].to_numpy(np.int64)
    steps, starts = np.unique(step, return_index=True)
    levels = SiteLevels(int(number.max()) + 1)
    now = np.full(len(levels.level), np.nan)
    alarms: list[int] = []
    for at, first, end in zip(
        steps.tolist(), starts.tolist(), [*starts[1:].tolist(), len(step)], strict=True
    ):
        now[:] = np.nan
        now[number[first:end]] = value[first:end]
        limit = np.maximum(SITE_SIGMAS * levels.deviation, math.log(SITE_FACTOR))
        if bool((levels.rise(now) > limit).any()) and (not alarms or at - alarms[-1] > QUIET):
            alarms.append(at)
    return alarms


class _Tally:
    def __init__(self, name: str) -> None:
        self.name = name
        self.runs = self.episodes = self.warned = self.right = self.wrong = 0
        self.leads: list[int] = []

    def add(self, alarms: Sequence[int], episodes: Sequence[Episode], horizon: int) -> None:
        self.runs += 1
        self.episodes += len(episodes)
        for episode in episodes:
            before = [alarm for alarm in alarms if 1 <= episode.onset - alarm <= horizon]
            if before:
                self.warned += 1
                self.leads.append(episode.onset - min(before))
        for alarm in alarms:
            if any(1 <= episode.onset - alarm <= horizon for episode in episodes):
                self.right += 1
            elif not any(
                episode.onset <= alarm <= (math.inf if episode.end is None else episode.end + horizon)
                for episode in episodes
            ):
                self.wrong += 1

    def record(self) -> Record:
        alarms = self.right + self.wrong
        return Record(
            precursor=self.name,
            runs=self.runs,
            episodes=self.episodes,
            warned=self.warned,
            right=self.right,
            wrong=self.wrong,
            precision=self.right / alarms if alarms else None,
            recall=self.warned / self.episodes if self.episodes else None,
            median_lead=float(median(self.leads)) if self.leads else None,
        )


def _episodes(run: Run) -> list[Episode]:
    """The loss's episodes: as the run recorded them, else found in its telemetry."""
    recorded = episodes_of(run.events)
    if not recorded:
        loss = run.series(LOSS)
        detector = SpikeDetector()
        events = feed_losses(
            detector, loss.index.to_numpy().astype(np.int64), loss.to_numpy().astype(np.float64)
        )
        recorded = episodes_of([*events, *detector.finish()])
    return [one for one in recorded if one.signal == LOSS and one.kind in EPISODES]


def _alarms(name: str, series: pd.Series[float]) -> list[int]:
    """Steps at which the precursor's alarms begin."""
    if name == "loss scale":
        watch = ScaleWatch(collapse=EARLY_COLLAPSE)
        return [watch.onset for step, scale in _numbers(series) if watch.update(step, scale) == "onset"]
    excursions = Excursions(Baseline(0.0, FACTOR_OF_TWO), creep=False)
    alarms: list[int] = []
    for step, value in _numbers(series):
        if not math.isfinite(value) or value <= 0:
            excursions.pass_over(step)
            continue
        for change in excursions.update(step, math.log(value)):
            if change.phase == "onset":
                alarms.append(change.excursion.onset)
    return alarms


def _numbers(series: pd.Series[float]) -> list[tuple[int, float]]:
    return list(zip(series.index.astype(int).tolist(), series.astype(float).tolist(), strict=True))


def _embedding_gradient(run: Run) -> pd.Series[float]:
    rows = run.rows("gradient", "l2")
    own = rows[
        rows["site"].isin(
            [site for site in rows["site"].cat.categories if run.places.is_embedding(str(site))]
        )
    ]
    squares = own.assign(value=own["value"] ** 2).groupby("step")["value"].sum(min_count=1)
    norms: pd.Series[float] = squares**0.5
    return norms
