"""MLflow: metrics, pictures, and the last episode as tags of the run.

The sink uses only the client, which is safe in a thread, and never the fluent interface's global run. One batch holds at most 1,000
metrics. Source: mlflow 3.17, ``tracking/client.py``.
"""

from __future__ import annotations

import io
import time
from collections.abc import Mapping
from typing import Any

from stabilitylab.sinks.tracker import TrackerSink

BATCH = 1000


class MlflowSink(TrackerSink):
    """Sends to a run of MLflow.

    Args:
        run_id: of the run.
        client: an ``MlflowClient``; by default one for the present tracking URI.
        owned: end the run when the monitor closes.
        seconds: between two sendings.
        pictures: whether to send pictures.
    """

    def __init__(
        self,
        run_id: str,
        *,
        client: Any = None,
        owned: bool = False,
        seconds: float = 5.0,
        pictures: bool = True,
    ) -> None:
        super().__init__(seconds=seconds, pictures=pictures)
        if client is None:
            from mlflow import MlflowClient

            client = MlflowClient()
        self._client, self._run_id, self._owned = client, run_id, owned

    def send(self, rows: Mapping[int, Mapping[str, float]]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(key, value, now, step) for step, row in rows.items() for key, value in row.items()]
        for i in range(0, len(metrics), BATCH):
            self._client.log_batch(self._run_id, metrics=metrics[i : i + BATCH])

    def show(self, step: int, pictures: Mapping[str, bytes]) -> None:
        from PIL import Image

        for key, png in pictures.items():
            # Each picture shows the run until now. MLflow's page opens at step 0 and there shows the last one logged.
            self._client.log_image(self._run_id, Image.open(io.BytesIO(png)), key=key, step=0)

    def alert(self, step: int, title: str, text: str, *, critical: bool) -> None:
        self._client.set_tag(self._run_id, "stability.last_episode", f"{title}: {text}"[:5000])

    def end(self, episodes: int) -> None:
        self._client.set_tag(self._run_id, "stability.episodes", str(episodes))
        if self._owned:
            self._client.set_terminated(self._run_id)
