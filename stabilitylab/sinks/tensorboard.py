"""TensorBoard files that show a run's stability without configuring anything.

| tab | what is there |
| --- | --- |
| Custom scalars | one chart for each thing to watch; episodes are points on the loss |
| Scalars | the step's own values, and for every family its largest value over sites |
| Images | layer x step maps: main branch, attention maximum, gradient norm |
| Histograms | gradient norms over parameters (log10), attention maxima over heads |
| Text | the episodes, as they come |
| HParams | the run's configuration, from the ``config.json`` beside the folder, with its last loss and largest gradient norm |

Per-parameter scalars are left to the Parquet files and the report: thousands of charts help nobody. A ``rewind`` purges what
was written for later steps. Works without tensorflow.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from stabilitylab.telemetry import Event, Key, Samples

SECONDS_BETWEEN_MAPS = 60.0
EPISODES = frozenset({"hard-batch", "spike", "divergence", "non-finite", "loss-scale-collapse"})

LAYOUT = {
    "Stability": {
        "Loss": ["Multiline", ["train/loss$", "episodes/.*"]],
        "Gradient norm": ["Multiline", ["train/gradient_norm$"]],
        "Loss scale": ["Multiline", ["precision/loss_scale$"]],
        "Learning rate": ["Multiline", ["train/learning_rate$"]],
        "Attention maximum": ["Multiline", ["largest/attention score$"]],
        "Main branch maximum": ["Multiline", ["largest/main branch$"]],
        "Embedding's share of the gradient": ["Multiline", ["gradient/embedding share$"]],
    }
}

_BLOCK = re.compile(r"^(?:.*\.)?(\d+)$")
_INSIDE = re.compile(r"^(.*?\.\d+)\.")
_EMBEDDING = re.compile(r"embed|wte")


class TensorBoardSink:
    """Writes event files into a folder.

    Args:
        folder: made if it does not exist; TensorBoard's ``--logdir`` is this folder or any above it.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)
        self._writer: SummaryWriter | None = None
        # title -> site -> step -> value, for the maps.
        self._maps: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
        self._drawn = time.monotonic()
        self._loss = math.nan
        self._largest_norm = 0.0

    def write(self, samples: Samples, events: Sequence[Event]) -> None:
        """Write one flush."""
        for event in events:
            if event.kind == "rewind":
                self._rewind(event.step)
        writer = self._open()
        by_step: dict[int, list[tuple[Key, float]]] = defaultdict(list)
        for step, key, value in samples:
            by_step[step].append((key, value))
        for step, rows in by_step.items():
            self._write_step(writer, step, rows)
        for event in events:
            self._write_event(writer, event)
        if time.monotonic() - self._drawn > SECONDS_BETWEEN_MAPS:
            self._draw(writer)
        writer.flush()

    def close(self) -> None:
        """Draw the last maps, write the arm's hyperparameters, close the file."""
        writer = self._open()
        self._draw(writer)
        if (config := self._configuration()) and math.isfinite(self._loss):
            metrics = {"train/loss": self._loss, "train/largest_gradient_norm": self._largest_norm}
            for summary in hparams(config, metrics):  # type: ignore[no-untyped-call]
                writer._get_file_writer().add_summary(summary)  # type: ignore[no-untyped-call]
        writer.close()
        self._writer = None

    # --------------------------------------------------------------------------------------------------- inside

    def _open(self, purge_step: int | None = None) -> SummaryWriter:
        if self._writer is None:
            self._writer = SummaryWriter(str(self._folder), purge_step=purge_step)
            self._writer.add_custom_scalars(LAYOUT)
        return self._writer

    def _rewind(self, step: int) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        for sites in self._maps.values():
            for values in sites.values():
                for later in [s for s in values if s >= step]:
                    del values[later]
        self._open(purge_step=step)

    def _write_step(self, writer: SummaryWriter, step: int, rows: Sequence[tuple[Key, float]]) -> None:
        norms: list[float] = []
        heads: list[float] = []
        branch: list[float] = []
        squares: dict[str, float] = defaultdict(float)
        layers: dict[str, float] = {}
        for key, value in rows:
            if key.family in ("train", "precision"):
                writer.add_scalar(f"{key.family}/{key.statistic}", value, step)
                if key.metric == "train/-/loss":
                    self._loss = value
                elif key.metric == "train/-/gradient_norm" and math.isfinite(value):
                    self._largest_norm = max(self._largest_norm, value)
            elif key.family == "gradient" and key.statistic == "l2":
                norms.append(value)
                inside = _INSIDE.match(key.site)
                squares[inside[1] if inside else key.site] += value * value
            elif key.family == "gradient" and key.statistic == "share" and _EMBEDDING.search(key.site):
                if "norm" not in key.site and "pos" not in key.site:
                    writer.add_scalar("gradient/embedding share", value, step)
            elif key.family == "attention" and key.statistic == "score_max":
                heads.append(value)
                layers[key.site] = _larger(layers.get(key.site, -math.inf), value)
            elif key.family == "activation" and key.statistic == "absmax" and _BLOCK.match(key.site):
                branch.append(value)
                self._maps["main branch, largest |value|"][key.site][step] = value
        for site, square in squares.items():
            self._maps["gradient norm"][site][step] = math.sqrt(square) if square >= 0 else square
        for site, value in layers.items():
            self._maps["attention, largest score"][site][step] = value
        for name, values in (("largest/attention score", heads), ("largest/main branch", branch)):
            if values:
                writer.add_scalar(name, float(np.max(values)), step)
        _histogram(
            writer,
            "gradient/log10 l2 over parameters",
            [math.log10(v) for v in norms if 0 < v < math.inf],
            step,
        )
        _histogram(writer, "attention/largest score over heads", [v for v in heads if math.isfinite(v)], step)

    def _write_event(self, writer: SummaryWriter, event: Event) -> None:
        if event.kind in EPISODES and event.data.get("phase") == "onset":
            # A point in the loss chart, at the height of the loss; where that is not finite there is no place for it.
            loss = self._loss if math.isfinite(self._loss) else 0.0
            writer.add_scalar(f"episodes/{event.kind}", loss, int(event.data.get("onset", event.step)))
        if event.kind not in ("checkpoint",):
            what = "\n".join(f"| {name} | {value} |" for name, value in event.data.items())
            text = (
                f"**{event.kind}** at step {event.step}\n\n| | |\n|---|---|\n{what}"
                if what
                else f"**{event.kind}** at step {event.step}"
            )
            writer.add_text("spikes" if event.kind in EPISODES else "events", text, event.step)

    def _draw(self, writer: SummaryWriter) -> None:
        from stabilitylab.report.maps import heat_map

        self._drawn = time.monotonic()
        for title, sites in self._maps.items():
            matrix = pd.DataFrame.from_dict(sites, orient="index").sort_index(axis=1)
            if matrix.size:
                figure = heat_map(matrix, title=title, log=title != "attention, largest score")
                writer.add_image(f"maps/{title}", _pixels(figure), int(matrix.columns[-1]), dataformats="HWC")

    def _configuration(self) -> dict[str, Any]:
        file = self._folder.parent / "config.json"
        try:
            return dict(_flat(json.loads(file.read_text(encoding="utf-8"))))
        except (OSError, ValueError):
            return {}


def _larger(a: float, b: float) -> float:
    return float(np.maximum(a, b))


def _histogram(writer: SummaryWriter, name: str, values: Sequence[float], step: int) -> None:
    if values:
        writer.add_histogram(name, np.asarray(values), step)


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [pair for name, inner in value.items() for pair in _flat(inner, f"{prefix}{name}.")]
    return [(prefix[:-1], value)] if isinstance(value, (bool, int, float, str)) else []


def _pixels(figure: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    # TensorBoard shows images on small cards: a small figure keeps its text readable there.
    figure.set_facecolor("white")
    figure.set_size_inches(4.8, 0.6 * figure.get_size_inches()[1] + 1.0)
    figure.set_dpi(130)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]
