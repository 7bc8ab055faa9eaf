"""Turns a step's numbers into the TensorBoard sink's dozen overview curves and three layer x step maps.

TensorBoard's first page shows groups of cards in the order of their names, the first ones unfolded; capitals come before small
letters. So everything to look at first is a tag of the group ``Overview``, numbered in the order of looking. One page of that group
holds twelve cards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from stabilitylab.runs.places import Places
from stabilitylab.sinks.pictures import MapGrid, Sketch
from stabilitylab.spikes.episodes import Episode, episodes_of
from stabilitylab.telemetry import SCALAR, Event, Key, Samples

if TYPE_CHECKING:
    from stabilitylab.runs.run import Run

LOSS = "Overview/1 loss"
NORM = "Overview/2 gradient norm"
SCALE = "Overview/3 loss scale"
RATE = "Overview/4 learning rate"
SCORE = "Overview/5 attention maximum"
BRANCH = "Overview/6 residual stream maximum"
SHARE = "Overview/7 embedding's share of the gradient"
STORY = "Overview/8 loss with spikes"
SPIKES = "Overview/9 spikes"
MAPS = {
    "gradient": "Overview/10 gradient norm, layer x step",
    "branch": "Overview/11 residual stream maximum, layer x step",
    "score": "Overview/12 attention maximum, layer x step",
}
FORMAT = "formats/{}, largest error of an operand"

CHARTS = {
    "Loss, episodes as points": [f"{LOSS}$", "episodes/.*"],
    "Gradient norm": [f"{NORM}$"],
    "Loss scale": [f"{SCALE}$"],
    "Learning rate": [f"{RATE}$"],
    "Attention maximum": [f"{SCORE}$"],
    "Residual stream maximum": [f"{BRANCH}$"],
    "Embedding's share of the gradient": [f"{SHARE}$"],
}
LAYOUT = {"Stability": {title: ["Multiline", tags] for title, tags in CHARTS.items()}}

_DIRECT = {
    "train/-/loss": LOSS,
    "train/-/gradient_norm": NORM,
    "precision/-/loss_scale": SCALE,
    "train/-/learning_rate": RATE,
}
# The metrics behind the maps and the text.
_SOURCES = (
    ("train", "loss"),
    ("train", "gradient_norm"),
    ("gradient", "l2"),
    ("attention", "score_max"),
    ("activation", "absmax"),
)
COLUMNS = 400


class StepMap:
    """Largest value of each row (a layer) in each stretch of steps, in memory that does not grow with the run.

    It keeps at most ``columns`` stretches; when there are more, their length doubles. A NaN wins over every number.
    """

    def __init__(self, columns: int = COLUMNS) -> None:
        self._most = columns
        self._stretch = 1
        self._cells: dict[int, dict[str, float]] = {}
        self._rows: dict[str, None] = {}

    def add(self, step: int, row: str, value: float) -> None:
        """Add a value."""
        self._rows.setdefault(row)
        cell = self._cells.setdefault(step - step % self._stretch, {})
        cell[row] = float(np.maximum(cell[row], value)) if row in cell else value
        while len(self._cells) > self._most:
            self._widen()

    def rewind(self, step: int) -> None:
        """Forget steps from ``step`` on (a stretch that begins before it stays)."""
        self._cells = {start: cell for start, cell in self._cells.items() if start < step}

    def grid(self) -> MapGrid:
        """The present values, to draw. Adding to the map changes it."""
        return MapGrid(rows=list(self._rows), cells=self._cells)

    def _widen(self) -> None:
        self._stretch *= 2
        cells: dict[int, dict[str, float]] = {}
        for start, cell in sorted(self._cells.items()):
            joined = cells.setdefault(start - start % self._stretch, {})
            for row, value in cell.items():
                joined[row] = float(np.maximum(joined[row], value)) if row in joined else value
        self._cells = cells


class Overview:
    """Turns samples into the overview's curves, and keeps its maps and the loss."""

    def __init__(self, places: Places | None = None) -> None:
        self._places = places or Places()
        self.maps = {name: StepMap() for name in MAPS}
        # Loss and norm for the picture with the spikes: one row per curve.
        self.story = StepMap(columns=4 * COLUMNS)
        self._roles: _Roles | None = None

    def rewind(self, step: int) -> None:
        """Forget steps from ``step`` on."""
        for map_ in (*self.maps.values(), self.story):
            map_.rewind(step)

    def recall(self, run: Run, before: int) -> None:
        """Load what a run folder holds of steps below ``before``."""
        for family, statistic in _SOURCES:
            rows = run.rows(family, statistic)
            rows = rows[rows["step"] < before]
            keys = tuple(Key(family, str(site), statistic) for site in rows["site"].cat.categories)
            codes: NDArray[np.int32] = rows["site"].cat.codes.to_numpy().astype(np.int32)
            samples = Samples(keys, rows["step"].to_numpy(), codes, rows["value"].to_numpy())
            self.steps(samples)

    def steps(self, samples: Samples) -> list[tuple[int, dict[str, float], dict[str, NDArray[np.float64]]]]:
        """For every step: its scalars by tag, and its vectors by name (gradient norms, attention maxima)."""
        if self._roles is None or self._roles.keys is not samples.keys:
            self._roles = _Roles(samples.keys, self._places)
        found = []
        for step in np.unique(samples.step).tolist():
            at = samples.step == step
            found.append((step, *self._step(step, samples.key[at], samples.value[at], self._roles)))
        return found

    def _step(
        self, step: int, key: NDArray[np.int32], value: NDArray[np.float64], roles: _Roles
    ) -> tuple[dict[str, float], dict[str, NDArray[np.float64]]]:
        role = roles.role[key]
        scalars: dict[str, float] = {}
        vectors: dict[str, NDArray[np.float64]] = {}
        for number, one in zip(
            key[role == _Roles.SCALAR].tolist(), value[role == _Roles.SCALAR].tolist(), strict=True
        ):
            scalars[roles.tags[number]] = one
        for name, code, tag in (("branch", _Roles.BRANCH, BRANCH), ("score", _Roles.SCORE, SCORE)):
            here = role == code
            if here.any():
                scalars[tag] = float(value[here].max())  # NaN, where there is one
                for number, one in zip(key[here].tolist(), value[here].tolist(), strict=True):
                    self.maps[name].add(step, roles.rows[number], one)
        here = role == _Roles.FORMAT
        for number, one in zip(key[here].tolist(), value[here].tolist(), strict=True):
            tag = roles.tags[number]
            scalars[tag] = float(np.maximum(scalars.get(tag, -np.inf), one))  # NaN, where there is one
        here = role == _Roles.NORM
        if here.any():
            vectors["gradient"] = value[here]
            squares: dict[str, float] = {}
            for number, one in zip(key[here].tolist(), np.square(value[here]).tolist(), strict=True):
                squares[roles.rows[number]] = squares.get(roles.rows[number], 0.0) + one
            for row, square in squares.items():
                self.maps["gradient"].add(step, row, float(np.sqrt(square)))
        if (role == _Roles.SCORE).any():
            vectors["score"] = value[role == _Roles.SCORE]
        for tag in (LOSS, NORM):
            if tag in scalars:
                self.story.add(step, tag, scalars[tag])
        return scalars, vectors


class _Roles:
    """Each key's role in the dashboard; made once for a tuple of keys."""

    NONE, SCALAR, BRANCH, SCORE, NORM, FORMAT = range(6)

    def __init__(self, keys: tuple[Key, ...], places: Places) -> None:
        self.keys = keys
        self.tags: dict[int, str] = {}
        self.rows = [places.block_of(key.site) if key.family == "gradient" else key.site for key in keys]
        self.role = np.zeros(len(keys), dtype=np.int8)
        for number, key in enumerate(keys):
            role, tag = self._of(key, places)
            if tag == SHARE and SHARE in self.tags.values():  # that of the first embedding is shown
                continue
            self.role[number] = role
            if tag is not None:
                self.tags[number] = tag

    def _of(self, key: Key, places: Places) -> tuple[int, str | None]:
        """A key's role, and the tag of a number that is shown by itself."""
        match key.family, key.statistic:
            case (("train" | "precision"), _) if key.site == "-":
                place = f"/{key.index}" if key.index != SCALAR else ""
                return self.SCALAR, _DIRECT.get(key.metric, f"{key.family}/{key.statistic}{place}")
            case "gradient", "share" if places.is_embedding(key.site):
                return self.SCALAR, SHARE
            case "gradient", "l2":
                return self.NORM, None
            case "attention", "score_max":
                return self.SCORE, None
            case "format", statistic if statistic.endswith("_error"):
                return self.FORMAT, FORMAT.format(statistic.removesuffix("_error"))
            case "activation", "absmax" if places.block_number(key.site) is not None:
                return self.BRANCH, None
        return self.NONE, None


def sketch(overview: Overview, events: Sequence[Event]) -> Sketch:
    """The present content of the maps, of the loss with its spikes and of the list of spikes."""
    episodes = episodes_of(events)
    # A step may have a gradient norm and no loss.
    story = sorted(overview.story.grid().cells.items())
    losses = {step: cell[LOSS] for step, cell in story if LOSS in cell}
    rows = [episode_cells(episode) for episode in reversed(episodes[-15:])]
    title = f"Spikes: {len(episodes)}" + (f", the last {len(rows)}" if len(rows) < len(episodes) else "")
    return Sketch(
        loss=(STORY, losses) if losses else None,
        # Loss and norm often show the same episode: one mark where they begin together.
        marks=list({e.onset: (e.onset, e.end, e.kind) for e in episodes[-40:]}.values()),
        listed=(SPIKES, title, rows),
        maps={tag: (overview.maps[name].grid(), name != "score") for name, tag in MAPS.items()},
    )


def episode_cells(episode: Episode) -> list[str]:
    """An episode as a row of ``EPISODE_COLUMNS``."""
    height = "–" if episode.height is None else f"{episode.height:.3g}"
    end = "open" if episode.end is None else str(episode.end)
    return [str(episode.onset), episode.kind, str(episode.peak), end, height, episode.signal]
