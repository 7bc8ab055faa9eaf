"""trackio: metrics, pictures and alerts of a run. Source: trackio 0.43, ``run.py``."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from stabilitylab.sinks.tracker import TrackerSink


class TrackioSink(TrackerSink):
    """Sends to a run of trackio.

    Args:
        run: the result of ``trackio.init``.
        owned: finish it when the monitor closes.
        seconds: between two sendings.
        pictures: whether to send pictures.
    """

    def __init__(self, run: Any, *, owned: bool = False, seconds: float = 5.0, pictures: bool = True) -> None:
        super().__init__(seconds=seconds, pictures=pictures)
        self._run, self._owned = run, owned

    def send(self, rows: Mapping[int, Mapping[str, float]]) -> None:
        for step, row in rows.items():
            self._run.log(dict(row), step=step)

    def show(self, step: int, pictures: Mapping[str, bytes]) -> None:
        import trackio
        from PIL import Image

        shown = {key: trackio.Image(Image.open(io.BytesIO(png))) for key, png in pictures.items()}
        self._run.log(shown, step=step)

    def alert(self, step: int, title: str, text: str, *, critical: bool) -> None:
        import trackio

        level = trackio.AlertLevel.ERROR if critical else trackio.AlertLevel.WARN
        self._run.alert(f"{title} at step {step}", text, level=level)

    def end(self, episodes: int) -> None:
        if self._owned:
            self._run.finish()
