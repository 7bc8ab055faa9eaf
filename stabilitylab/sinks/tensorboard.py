"""Writes TensorBoard files that show a run's stability without any configuration.

| tab | what is there |
| --- | --- |
| Time series (the first page) | group Overview: loss, gradient norm, loss scale, learning rate, maxima, the loss with its spikes, the spikes as a list, layer x step maps |
| Custom scalars | charts: loss with its episodes as points, gradient norm, loss scale, learning rate, maxima |
| Scalars, Images | the same by kind, and the step's other values |
| Histograms | gradient norms over parameters (log10), attention maxima over heads |
| Text | the spikes, and what else happened, each as one table that grows |
| HParams | the run's configuration, what differs between runs first, beside its last loss, norm, and the Scalars' other last values |

The Parquet files and the report have per-parameter scalars: thousands of charts help nobody. A ``rewind`` drops what the sink wrote
for later steps. The sink draws pictures at the end, and during the run as often as takes a hundredth of the time. It works without
tensorflow.
"""  # noqa: E501 - the table's rows

from __future__ import annotations

import html
import json
import logging
import math
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stabilitylab.errors import InputError
from stabilitylab.runs.config import flat
from stabilitylab.runs.folder import RunFolder
from stabilitylab.runs.places import Places
from stabilitylab.sinks import event_file as made
from stabilitylab.sinks.dashboard import LAYOUT, LOSS, NORM, Overview, episode_cells, sketch
from stabilitylab.sinks.event_file import EventFile
from stabilitylab.sinks.pictures import EPISODE_COLUMNS, Artist
from stabilitylab.spikes.episodes import KINDS, Episode, episodes_of
from stabilitylab.telemetry import Event, Samples

FIRST_PICTURES = 120.0  # seconds; drawing takes one or two, and a process its start
SHARE_OF_TIME = 0.01
MARKERS = 100
LISTED = 100
LARGEST_NORM = "summary/largest gradient norm"
EPISODES = "summary/episodes"
_log = logging.getLogger("stabilitylab")


class TensorBoardSink:
    """Writes event files into a folder.

    Args:
        folder: made if it does not exist; TensorBoard's ``--logdir`` is this folder or any above it.
        config: content of the run's HParams page; by default the ``config.json`` beside the folder.
        places: places of sites in the model; by default from their paths.

    Raises:
        OSError: from ``write`` and ``close``, when the disk does not take a record. The sink continues with later records.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        config: Mapping[str, Any] | None = None,
        places: Places | None = None,
    ) -> None:
        self._folder = Path(folder)
        self._config = config
        self._file: EventFile | None = None
        self._overview = Overview(places)
        self._events: list[Event] = []
        self._losses: dict[int, float] = {}
        self._largest_norm = -math.inf
        self._marked: set[int] = set()
        self._session_end: list[Any] | None = None
        self._artist = Artist()
        self._next_pictures = time.monotonic() + FIRST_PICTURES
        self._drawn_at = self._step = 0

    def write(self, samples: Samples, events: Sequence[Event]) -> None:
        """Write one flush. Its rewinds take effect before its samples."""
        resumed = self._file is None
        file = self._open()
        for event in events:
            if event.kind == "rewind":
                self._rewind(file, event.step, resumed)
        for step, scalars, vectors in self._overview.steps(samples):
            self._step = step
            if LOSS in scalars:
                self._remember(step, scalars[LOSS])
            if math.isfinite(norm := scalars.get(NORM, math.nan)):
                self._largest_norm = max(self._largest_norm, norm)
            values = [made.scalar(tag, value) for tag, value in scalars.items()]
            file.add(step, [*values, *_histograms(vectors)])
        self._tell(file, [event for event in events if event.kind != "checkpoint"])
        self._show(file)

    def close(self) -> None:
        """Draw the last pictures, end the run's HParams session, close the file."""
        file = self._open()
        try:
            self._draw(file)
            summary = [made.scalar(EPISODES, len(episodes_of(self._events)))]
            if math.isfinite(self._largest_norm):
                summary.append(made.scalar(LARGEST_NORM, self._largest_norm))
            file.add(self._step, summary)
            if self._session_end is None:
                self._start_session(file)  # the configuration came after the first flush
            file.add(self._step, self._session_end or [])
        finally:
            file.close()

    def _open(self) -> EventFile:
        if self._file is None:
            self._file = EventFile(self._folder)
            self._file.add(0, made.layout(LAYOUT))
            self._start_session(self._file)
        return self._file

    def _start_session(self, file: EventFile) -> None:
        if config := self._configuration():
            start, self._session_end = made.hyperparameters(flat(config))
            file.add(0, start)

    def _configuration(self) -> Mapping[str, Any]:
        if self._config is not None:
            return self._config
        try:
            config = json.loads((self._folder.parent / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return config if isinstance(config, dict) else {}

    def _rewind(self, file: EventFile, step: int, resumed: bool) -> None:
        file.restart(step)
        self._artist.stop()
        if resumed:
            self._recall(step)
        self._overview.rewind(step)
        self._events = [event for event in self._events if event.step < step]
        self._losses = {s: loss for s, loss in self._losses.items() if s < step}
        self._marked = {onset for onset in self._marked if onset < step}

    def _recall(self, before: int) -> None:
        """Read what an earlier process wrote: a resumed run's maps and list begin where the run began."""
        from stabilitylab.runs.run import Run

        run = Run(RunFolder(self._folder.parent))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # files that the kill left half written
                self._overview.recall(run, before)
                self._events = [event for event in run.events if event.step < before]
        except InputError:
            return  # its readers report damaged telemetry; new values still show

    def _remember(self, step: int, loss: float) -> None:
        if math.isfinite(loss):
            self._losses[step] = loss
            if len(self._losses) > 4096:
                del self._losses[next(iter(self._losses))]

    def _tell(self, file: EventFile, events: Sequence[Event]) -> None:
        """Write text and markers of events. The newest text of a tag holds all of them: TensorBoard keeps only a few texts."""
        self._events += events
        found = [event for event in events if event.kind in KINDS]
        if found:
            file.add(found[-1].step, made.text("spikes", _episode_table(episodes_of(self._events))))
        for event in found:
            onset = event.data.get("onset")
            if (
                isinstance(onset, int)
                and onset not in self._marked
                and len(self._marked) < MARKERS
                and self._losses
            ):
                self._marked.add(onset)
                # A tag for each: TensorBoard would join points of one tag by a line, and smooth it.
                nearest = min(self._losses, key=lambda step: (abs(step - onset), step))
                file.add(onset, [made.scalar(f"episodes/step {onset}", self._losses[nearest])])
        if len(found) < len(events):
            others = [event for event in self._events if event.kind not in KINDS]
            file.add(events[-1].step, made.text("events", _event_table(others)))

    def _show(self, file: EventFile) -> None:
        """Fetch finished pictures, and start the next ones when it is time."""
        if self._artist.busy:
            if (done := self._artist.finished()) is not None:
                drawn, took = done
                file.add(self._drawn_at, [made.picture(tag, png) for tag, png in drawn.items()])
                self._next_pictures = time.monotonic() + took / SHARE_OF_TIME
        elif time.monotonic() >= self._next_pictures:
            wanted, self._drawn_at = sketch(self._overview, self._events), self._step
            if not wanted.shows_something:
                return
            try:
                self._artist.begin(wanted)
            except OSError as error:  # the numbers are written; the last pictures will show them
                self._next_pictures = math.inf
                _log.warning("no pictures until the end: %s", error)

    def _draw(self, file: EventFile) -> None:
        """Draw the last pictures, when training is over."""
        self._artist.stop()
        file.add(
            self._step,
            [made.picture(tag, png) for tag, png in sketch(self._overview, self._events).draw().items()],
        )


def _episode_table(episodes: Sequence[Episode]) -> str:
    rows = [episode_cells(episode) for episode in reversed(episodes[-LISTED:])]
    return _markdown(EPISODE_COLUMNS, rows)


def _event_table(events: Sequence[Event]) -> str:
    rows = [
        [str(event.step), event.kind, ", ".join(f"{name} {value}" for name, value in event.data.items())]
        for event in reversed(events[-LISTED:])
    ]
    return _markdown(("step", "event", "what"), rows)


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = [" | ".join(columns), " | ".join("---" for _ in columns)]
    return "\n".join(f"| {line} |" for line in [*head, *(" | ".join(map(_cell, row)) for row in rows)])


def _cell(value: str) -> str:
    plain = html.escape(" ".join(value.split()))
    # Escape Markdown's signs: __class__ would be bold, and lose its lines.
    return "".join(f"&#{ord(c)};" if c in "|_*`[]~\\" else c for c in plain)


def _histograms(vectors: Mapping[str, np.ndarray]) -> list[Any]:
    found: list[Any] = []
    norms, scores = vectors.get("gradient", np.empty(0)), vectors.get("score", np.empty(0))
    norms = norms[np.isfinite(norms) & (norms > 0)]
    scores = scores[np.isfinite(scores)]
    if len(norms):
        found += made.histogram("gradient/log10 l2 over parameters", np.log10(norms))
    if len(scores):
        found += made.histogram("attention/largest score over heads", scores)
    return found
