"""Weights & Biases: numbers in the run's history, pictures, alerts.

Numbers have their own axis (``stability/step``), so they mix with nothing. W&B counts one step per committed row, and drops values
logged for a lower step. So in somebody else's run the sink adds its rows to those that the owner commits, one of ours to one of
theirs, and commits by itself only where the owner has logged nothing for ``OWNER_SECONDS``.

Source: wandb 0.31, ``sdk/wandb_run.py`` (``Run.log``, ``define_metric``, ``alert``).
"""

from __future__ import annotations

import io
import time
from collections.abc import Mapping
from typing import Any

from stabilitylab.sinks.tracker import EPISODE, TrackerSink

STEP = "stability/step"
OWNER_SECONDS = 30.0


class WandbSink(TrackerSink):
    """Sends to a run of wandb.

    Args:
        run: the result of ``wandb.init``.
        owned: nobody else logs into it; finish it when the monitor closes.
        seconds: between two sendings.
        pictures: whether to send pictures.
    """

    def __init__(self, run: Any, *, owned: bool = False, seconds: float = 5.0, pictures: bool = True) -> None:
        super().__init__(seconds=seconds, pictures=pictures)
        self._run, self._owned = run, owned
        self._owners_step, self._since = -1, 0.0
        run.define_metric(STEP, hidden=True)
        run.define_metric("stability/*", step_metric=STEP)

    def send(self, rows: Mapping[int, Mapping[str, float]]) -> None:
        if not self._owned and not self._may_commit():
            # One row with the owner's: the one in which an episode began, else the last.
            step = max(rows, key=lambda step: (EPISODE in rows[step], step))
            self._run.log({**rows[step], STEP: step}, commit=False)
            return
        for step, row in rows.items():
            self._run.log({**row, STEP: step})

    def show(self, step: int, pictures: Mapping[str, bytes]) -> None:
        import wandb
        from PIL import Image

        shown = {key: wandb.Image(Image.open(io.BytesIO(png))) for key, png in pictures.items()}
        self._run.log({**shown, STEP: step}, commit=self._owned)

    def alert(self, step: int, title: str, text: str, *, critical: bool) -> None:
        import wandb

        level = wandb.AlertLevel.ERROR if critical else wandb.AlertLevel.WARN
        self._run.alert(title=f"{title} at step {step}", text=text, level=level)

    def end(self, episodes: int) -> None:
        self._run.summary["stability/episodes"] = episodes
        if self._owned:
            self._run.finish()

    def _may_commit(self) -> bool:
        """Whether the run's owner has been silent for so long that a row of ours disturbs no count."""
        now, step = time.monotonic(), int(getattr(self._run, "step", 0) or 0)
        if step != self._owners_step:
            self._owners_step, self._since = step, now
        if now - self._since > OWNER_SECONDS:
            self._owners_step = step + 1
            self._since = now
            return True
        return False
