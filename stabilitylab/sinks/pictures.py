"""Draws the dashboard's pictures: the loss with its spikes, the spikes as a list, and layer x step maps, as PNG files.

Drawing takes a second of pure Python. In the training process any drawing thread takes that second from the training thread, since
one interpreter runs one thread at a time. So a separate process of the lowest priority, with matplotlib and without torch, draws
the pictures of a running run: ``Artist.begin`` gives it the numbers, ``Artist.finished`` checks whether it is done. Numbers and
pictures pass through unnamed temporary files; neither side waits for the other. Anything else that the process prints (a
``sitecustomize`` on the path, a library's greeting) goes the same way: the pictures begin after a marker.
"""

from __future__ import annotations

import io
import logging
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import IO, TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

ValuesByStep = Mapping[int, Mapping[str, float]]
CARD = 4.9  # inches
_MARKER = b"\0stabilitylab pictures\0"
_log = logging.getLogger("stabilitylab")
EPISODE_COLUMNS = ("onset", "kind", "peak", "end", "height", "signal")


@dataclass(frozen=True, kw_only=True)
class MapGrid:
    """The recorded values by row (a layer) and step.

    Attributes:
        rows: from the model's input to its output.
        cells: first step of a stretch -> row -> value.
    """

    rows: Sequence[str]
    cells: ValuesByStep

    def frames(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Values, and where there are any: rows as given, columns the first step of each stretch."""
        import pandas as pd

        starts = sorted(self.cells)
        held = [[cell.get(row) for row in self.rows] for cell in (self.cells[start] for start in starts)]
        known = np.array([[value is not None for value in cell] for cell in held], dtype=bool)
        values = np.array(held, dtype=float)  # None becomes NaN
        shape = (len(starts), len(self.rows))
        rows = list(self.rows)
        return (
            pd.DataFrame(values.reshape(shape).T, index=rows, columns=starts),
            pd.DataFrame(known.reshape(shape).T, index=rows, columns=starts),
        )


@dataclass(frozen=True, kw_only=True)
class Sketch:
    """The pictures' content.

    Attributes:
        loss: (tag, step -> loss), or None without a recorded loss.
        marks: onset, end (None: open) and kind of the episodes to mark.
        listed: tag, title and rows of the list of episodes.
        maps: tag -> (grid, logarithmic colours).
    """

    loss: tuple[str, Mapping[int, float]] | None = None
    marks: Sequence[tuple[int, int | None, str]] = ()
    listed: tuple[str, str, Sequence[Sequence[str]]] = ("", "", ())
    maps: Mapping[str, tuple[MapGrid, bool]] = field(default_factory=dict)

    def draw(self) -> dict[str, bytes]:
        """Tag -> PNG, in the order of looking."""
        if not self.shows_something:
            return {}
        from stabilitylab.figures.style import tidy

        with tidy():
            return self._drawn()

    def _drawn(self) -> dict[str, bytes]:
        import pandas as pd

        from stabilitylab.figures.cards import map_card
        from stabilitylab.figures.curves import curves
        from stabilitylab.figures.lines import Mark
        from stabilitylab.figures.style import ON_WHITE

        drawn = {}
        if self.loss is not None:
            tag, losses = self.loss
            marks = {"loss": [Mark(*mark) for mark in self.marks]}
            series = pd.Series(dict(losses), dtype=float)
            title = "Loss, spikes marked"
            figure = curves({"loss": [series]}, title=title, log="auto", marks=marks, style=ON_WHITE)
            drawn[tag] = _png(figure)
            tag, title, rows = self.listed
            drawn[tag] = _table(title, tuple(map(tuple, rows)))
        for tag, (grid, log) in self.maps.items():
            values, known = grid.frames()
            if values.size:
                title = tag.partition(" ")[2].capitalize()
                drawn[tag] = _png(map_card(values, title=title, log=log, recorded=known))
        return drawn

    @property
    def shows_something(self) -> bool:
        """A curve or a map needs a second step, a list a first episode."""
        losses = {} if self.loss is None else self.loss[1]
        seen = len(losses) > 1 or any(len(grid.cells) > 1 for grid, _ in self.maps.values())
        return seen or bool(self.marks or self.listed[2])


class Artist:
    """Draws in a separate process, one sketch at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._drawn: IO[bytes] | None = None
        self._began = 0.0

    def begin(self, sketch: Sketch) -> None:
        """Start drawing. Raises OSError where no process can start."""
        self.stop()
        self._began = time.monotonic()
        self._drawn = tempfile.TemporaryFile()  # noqa: SIM115 - the child writes it, ``finished`` reads it
        with tempfile.TemporaryFile() as numbers:
            pickle.dump(sketch, numbers)
            numbers.seek(0)
            self._process = subprocess.Popen(
                # Give way to training before the imports, which take longer than the drawing.
                [
                    sys.executable,
                    "-c",
                    f"import os; getattr(os, 'nice', int)(19); from {__name__} import main; main()",
                ],
                stdin=numbers,
                stdout=self._drawn,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
                # A keyboard interrupt is for the training; drawing just ends.
                start_new_session=True,
            )

    @property
    def busy(self) -> bool:
        """Whether pictures are in work, or wait to be fetched."""
        return self._process is not None

    def finished(self) -> tuple[dict[str, bytes], float] | None:
        """Tag -> PNG and the seconds that drawing took; None while drawing is under way.

        Returns no pictures where drawing failed: the next ones, or the last, which the training process draws, show the same.
        """
        if self._process is None or self._drawn is None or self._process.poll() is None:
            return None
        took = time.monotonic() - self._began
        drawn: dict[str, bytes] = {}
        try:
            self._drawn.seek(0)
            _, marker, content = self._drawn.read().partition(_MARKER)
            if marker and self._process.returncode == 0:
                drawn = pickle.loads(content)
        except Exception as error:
            _log.warning("pictures of this moment are left out (%s: %s)", type(error).__name__, error)
        finally:
            self.stop()
        return drawn, took

    def stop(self) -> None:
        """Abandon the drawing in work."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._drawn is not None:
            self._drawn.close()
        self._process = self._drawn = None


def main() -> None:
    """The artist's process: a sketch on standard input, its pictures on what was standard output."""
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "wb") as pictures:
        os.dup2(2, 1)  # what is printed from here on is no picture
        sketch = pickle.load(sys.stdin.buffer)
        pictures.write(_MARKER + pickle.dumps(sketch.draw()))


@lru_cache(maxsize=4)
def _table(title: str, rows: tuple[tuple[str, ...], ...]) -> bytes:
    """The list of spikes; the same picture for all runs without spikes."""
    from stabilitylab.figures.maps import table_figure
    from stabilitylab.figures.style import ON_WHITE

    return _png(table_figure(EPISODE_COLUMNS, rows, title=title, style=ON_WHITE))


def _png(figure: Figure, *, dpi: int = 90) -> bytes:
    """A figure on white, in the size of TensorBoard's small cards, which show it pixel by pixel."""
    from stabilitylab.figures.style import save_pixels

    width, height = figure.get_size_inches()
    if width > CARD:
        figure.set_size_inches(CARD, height * CARD / width + 0.5)
    content = io.BytesIO()
    save_pixels(figure, content, dpi=dpi, ground="white")
    return content.getvalue()
