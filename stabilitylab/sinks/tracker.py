"""Sends a few of a run's numbers to an experiment tracker, seldom, from a thread of its own.

| key | what |
| --- | --- |
| `stability/loss`, `stability/gradient_norm` | the step's own |
| `stability/loss_scale`, `stability/learning_rate` | where there is one |
| `stability/attention_max` | the largest attention score over all heads |
| `stability/residual_max` | the largest number of the residual stream |
| `stability/embedding_share` | the embedding's share of the squared gradient norm |
| `stability/episode` | the loss at the step at which an episode began |
| `stability/loss_with_spikes`, `stability/spikes` | pictures: the loss with its episodes, and their list |
| `stability/map_gradient`, `stability/map_residual`, `stability/map_attention` | pictures: layer x step |

That is all: at most ``len(KEYS)`` keys, at most ``ROWS`` steps per sending, at most one sending in ``seconds``. Where there are
more steps, the sink sends of each stretch the step with the largest loss (or one that is not finite), and the last step. Pictures
come at the end and as often as drawing takes a hundredth of the time, at most one set in ``PICTURE_SECONDS``. The sink sends an
alert when an episode begins and when it turns into another kind, at most one in ``ALERT_SECONDS``; hard batches send none.

``write`` keeps numbers in memory and returns. The tracker's library may wait for a network, raise or hang in this thread: the sink
reports a failure once, keeps numbers (thinned) for the next try, and at the end abandons a hanging library after
``CLOSE_SECONDS``. The monitor reports that as ``telemetry-lost``; training continues.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from stabilitylab.sinks.dashboard import (
    BRANCH,
    LOSS,
    MAPS,
    NORM,
    RATE,
    SCALE,
    SCORE,
    SHARE,
    SPIKES,
    STORY,
    Overview,
    sketch,
)
from stabilitylab.sinks.pictures import Artist
from stabilitylab.spikes.episodes import KINDS, episodes_of
from stabilitylab.telemetry import ALARMS, Event, Samples

SCALARS = {
    LOSS: "stability/loss",
    NORM: "stability/gradient_norm",
    SCALE: "stability/loss_scale",
    RATE: "stability/learning_rate",
    SCORE: "stability/attention_max",
    BRANCH: "stability/residual_max",
    SHARE: "stability/embedding_share",
}
EPISODE = "stability/episode"
PICTURES = {
    STORY: "stability/loss_with_spikes",
    SPIKES: "stability/spikes",
    MAPS["gradient"]: "stability/map_gradient",
    MAPS["branch"]: "stability/map_residual",
    MAPS["score"]: "stability/map_attention",
}
KEYS = (*SCALARS.values(), EPISODE, *PICTURES.values())
ROWS = 60
KEPT_ROWS = 4000
PICTURE_SECONDS = 60.0
ALERT_SECONDS = 30.0
CLOSE_SECONDS = 30.0
LISTED = 15
_log = logging.getLogger("stabilitylab")


class TrackerSink:
    """Sends to a tracker; a tracker's subclass defines ``send``, ``show``, ``alert`` and ``end``.

    Args:
        seconds: between two sendings.
        pictures: whether to send pictures.
    """

    def __init__(self, *, seconds: float = 5.0, pictures: bool = True) -> None:
        self._seconds, self._pictures = seconds, pictures
        self._lock = threading.Lock()
        self._overview = Overview()
        self._rows: dict[int, dict[str, float]] = {}
        self._events: list[Event] = []
        self._told: dict[Any, str] = {}
        self._alerts: list[tuple[int, str, str, bool]] = []
        self._problem: str | None = None
        self._failures = 0
        self._step = 0
        self._artist = Artist()
        self._next_pictures = time.monotonic() + 15.0
        self._next_alert = 0.0
        self._drawn_at = 0
        self._closing = threading.Event()
        self._abandoned = False
        self._thread: threading.Thread | None = None

    # A subclass defines these; the sink's thread calls them.

    def send(self, rows: Mapping[int, Mapping[str, float]]) -> None:
        """Log numbers: step -> key -> value, steps ascending."""
        raise NotImplementedError

    def show(self, step: int, pictures: Mapping[str, bytes]) -> None:
        """Log pictures: key -> PNG."""
        raise NotImplementedError

    def alert(self, step: int, title: str, text: str, *, critical: bool) -> None:
        """Tell of an episode."""
        raise NotImplementedError

    def end(self, episodes: int) -> None:
        """End the run, after everything was sent."""

    # The monitor calls these.

    def write(self, samples: Samples, events: Sequence[Event]) -> None:
        """Keep numbers to send. Raises RuntimeError once when the tracker has failed, for the monitor to report."""
        with self._lock:
            for event in events:
                if event.kind == "rewind":
                    self._rewind(event.step)
            for step, scalars, _ in self._overview.steps(samples):
                row = {SCALARS[tag]: value for tag, value in scalars.items() if tag in SCALARS}
                if row:
                    self._rows.setdefault(step, {}).update(row)
                self._step = max(self._step, step)
            self._events += [event for event in events if event.kind in KINDS]
            for event in events:
                self._hear(event)
            if len(self._rows) > 2 * KEPT_ROWS:
                self._rows = thinned(self._rows, KEPT_ROWS)
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._serve, name=f"stabilitylab-{type(self).__name__}", daemon=True
            )
            self._thread.start()
        if self._problem is not None:
            problem, self._problem = self._problem, None
            raise RuntimeError(problem)

    def close(self) -> None:
        """Send the rest. Abandons a hanging tracker."""
        self._closing.set()
        if self._thread is None:
            return
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._abandoned = True
            raise RuntimeError(
                f"no answer within {CLOSE_SECONDS:g} s: what was not sent by then is in the run folder only"
            )
        if self._problem is not None:
            raise RuntimeError(self._problem)

    def _rewind(self, step: int) -> None:
        self._overview.rewind(step)
        self._rows = {s: row for s, row in self._rows.items() if s < step}
        self._events = [event for event in self._events if event.step < step]

    def _hear(self, event: Event) -> None:
        data = event.data
        key = data.get("episode"), data.get("signal")
        if data.get("phase") == "end":
            self._told.pop(key, None)
        elif event.kind in ALARMS and self._told.get(key) != event.kind:
            self._told[key] = event.kind
            title, text = told(event)
            self._alerts.append((event.step, title, text, event.kind in ("divergence", "non-finite", "dead")))
            onset = data.get("onset")
            near = self._overview.story.grid().cells
            if isinstance(onset, int) and near:
                step = min(near, key=lambda s: abs(s - onset))
                loss = near[step].get(LOSS, math.nan)
                self._rows.setdefault(onset, {})[EPISODE] = loss

    # The thread.

    def _serve(self) -> None:
        while not self._closing.wait(self._seconds * min(2**self._failures, 16)):
            self._turn()
        self._failures = 0
        self._turn(last=True)
        self._guard(lambda: self.end(len(episodes_of(self._events))))

    def _turn(self, *, last: bool = False) -> None:
        with self._lock:
            rows, self._rows = self._rows, {}
            alerts = self._due_alerts(last=last)
        if rows and not self._guard(lambda: self.send(thinned(rows, ROWS))):
            with self._lock:  # for the next time; newer values win over it
                self._rows = thinned({**rows, **self._rows}, KEPT_ROWS)
        for step, title, text, critical in alerts:
            if self._guard(lambda s=step, t=title, x=text, c=critical: self.alert(s, t, x, critical=c)):
                self._next_alert = time.monotonic() + ALERT_SECONDS
            else:  # of all sendings this one must arrive
                with self._lock:
                    self._alerts.insert(0, (step, title, text, critical))
        if self._pictures:
            self._draw(last=last)

    def _due_alerts(self, *, last: bool) -> list[tuple[int, str, str, bool]]:
        if not self._alerts or (time.monotonic() < self._next_alert and not last):
            return []
        alerts, self._alerts = self._alerts, []
        if len(alerts) == 1:
            return alerts
        step, title, text, _ = alerts[0]
        more = "; ".join(f"{t} ({x})" for _, t, x, _ in alerts[1:6])
        return [(step, title, f"{text}; and {len(alerts) - 1} more: {more}", any(a[3] for a in alerts))]

    def _draw(self, *, last: bool) -> None:
        if last:
            self._artist.stop()
            self._begin_drawing()
            until = time.monotonic() + CLOSE_SECONDS / 2
            while self._artist.busy and time.monotonic() < until:
                self._fetch()
                time.sleep(0.02)
            self._artist.stop()
        elif self._artist.busy:
            self._fetch()
        elif time.monotonic() >= self._next_pictures:
            self._begin_drawing()

    def _begin_drawing(self) -> None:
        with self._lock:
            sketched, self._drawn_at = sketch(self._overview, self._events), self._step
        if not sketched.shows_something:
            return
        try:
            self._artist.begin(sketched)
        except OSError as error:
            self._next_pictures = math.inf
            _log.warning("no pictures for %s: %s", type(self).__name__, error)

    def _fetch(self) -> None:
        if (done := self._artist.finished()) is not None:
            drawn, took = done
            self._next_pictures = time.monotonic() + max(PICTURE_SECONDS, 100 * took)
            named = {PICTURES[tag]: png for tag, png in drawn.items() if tag in PICTURES}
            if named:
                self._guard(lambda: self.show(self._drawn_at, named))

    def _guard(self, work: Any) -> bool:
        if self._abandoned:
            return False
        try:
            work()
        except Exception as error:
            self._failures += 1
            if self._failures == 1 or self._closing.is_set():
                # Addresses may hold keys: tell the kind of failure, and the first line of its text, cut short.
                said = (str(error).splitlines() or [""])[0][:160]
                self._problem = f"{type(error).__name__}: {said}"
            return False
        self._failures = 0
        return True


def thinned(rows: Mapping[int, Mapping[str, float]], most: int) -> dict[int, dict[str, float]]:
    """About ``most`` steps at most: of each stretch the one with the largest loss (NaN first); all with an episode; the last."""
    steps = sorted(rows)
    if len(steps) <= most:
        return {step: dict(rows[step]) for step in steps}
    kept = {steps[-1], *[step for step in steps if EPISODE in rows[step]][-most:]}
    size = math.ceil(len(steps) / most)
    for i in range(0, len(steps), size):
        kept.add(max(steps[i : i + size], key=lambda step: _weight(rows[step].get(SCALARS[LOSS]))))
    return {step: dict(rows[step]) for step in sorted(kept)}


def _weight(loss: float | None) -> float:
    if loss is None:
        return -math.inf
    return loss if math.isfinite(loss) else math.inf


# Verbs for a signal in episodes without a height.
_STATES = {"dead": " is exactly 0", "frozen": " repeats itself"}


def told(event: Event) -> tuple[str, str]:
    """Title and sentence of an episode."""
    data = event.data
    signal = str(data.get("signal", "")).rpartition("/")[2].replace("_", " ")
    height, level = data.get("height"), data.get("baseline")
    text = f"{signal}{_STATES.get(event.kind, '')} at step {event.step}"
    if isinstance(data.get("onset"), int) and data["onset"] != event.step:
        text += f", since step {data['onset']}"
    if event.kind == "non-finite":
        text += f": {data.get('value')}"
    elif (
        isinstance(height, int | float)
        and isinstance(level, int | float)
        and data.get("signal", "").endswith("/loss")
    ):
        text += f": {height:.3g} above its level of {level:.4g}"
    if site := data.get("site"):
        text += f"; first in {site}"
    return event.kind, text
