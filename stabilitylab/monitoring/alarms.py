"""Reports an alarm at once: one line in the log, and the loop's own ``on_event``.

    step 812: spike: loss has risen by 0.87 over its level of 2.314, since step 808; before it update/-/rms_over_rate (12 steps)
    step 30: non-finite: loss is nan; first in layers.3.feed_forward.down (activation)
    step 410: site-departure: attention/layers.2.attention/score_max is 31 times its level; first in layers.2.attention
    step 500: parameter-changed: weights moved without an update; first in layers.1.feed_forward.0.weight

The logger is ``stabilitylab``, at WARNING, so without any setting the line goes to standard error;
``logging.getLogger("stabilitylab").setLevel(logging.ERROR)`` silences it. ``Alarms`` reports an episode when it begins and when its
kind changes, but not when it ends; it does not report hard batches, which recover by themselves.

``Alarms`` logs the first exception of ``on_event`` and keeps calling it: monitoring never stops training.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from stabilitylab.telemetry import ALARMS, DEPARTURES, LOSS, Event

# Changes that no update made (probes/outside_changes.py), in words.
_OUTSIDE = {
    "parameter-changed": "weights moved without an update",
    "moments-changed": "Adam's second moments fell by more than a step can do",
    "optimizer-changed": "a setting jumped",
}
TOLD = ALARMS | DEPARTURES
_log = logging.getLogger("stabilitylab")


class Alarms:
    """Reports alarms.

    Args:
        on_event: called with each reported event; None for the log alone.
        loss: the metric whose height is a difference; other heights are logarithms.
    """

    def __init__(self, on_event: Callable[[Event], object] | None, *, loss: str = LOSS) -> None:
        self._on_event, self._loss = on_event, loss
        self._latest: dict[Any, str] = {}  # episode -> the kind told last
        self._has_failed = False

    def hear(self, events: Iterable[Event]) -> None:
        """Tell of the new events."""
        new: list[Event] = []
        for event in events:
            if event.kind not in TOLD:
                continue
            episode = event.data.get("episode"), event.data.get("signal")
            if event.data.get("phase") == "end":
                self._latest.pop(episode, None)
            elif episode[0] is None or self._latest.get(episode) != event.kind:
                self._latest[episode] = event.kind
                new.append(event)
        # NaN reaches all signals at once, and is one event.
        for event in _as_one(new):
            _log.warning("%s", alarm_line(event, loss=self._loss))
        for event in new:
            self._call(event)

    def _call(self, event: Event) -> None:
        if self._on_event is None:
            return
        try:
            self._on_event(event)
        except Exception:
            if not self._has_failed:
                self._has_failed = True
                _log.exception("on_event failed at step %d; training continues", event.step)


def _as_one(events: Sequence[Event]) -> list[Event]:
    """Several non-finite signals of a step as one event that names them all."""
    bad = [event for event in events if event.kind == "non-finite"]
    if len(bad) < 2:
        return list(events)
    names = ", ".join(_name(str(event.data.get("signal"))) for event in bad)
    merged = dataclasses.replace(bad[0], data={**bad[0].data, "signal": names})
    return [merged, *(event for event in events if event.kind != "non-finite")]


def alarm_line(event: Event, *, loss: str = LOSS) -> str:
    """What happened and where, in one line."""
    data = event.data
    signal = str(data.get("signal", data.get("metric", "")))
    said = f"step {event.step}: {event.kind}: {_what(event.kind, signal, data, is_loss=signal == loss)}"
    if (onset := data.get("onset")) is not None and onset != event.step:
        said += f", since step {onset}"
    if leads := {name: lead for name, lead in (data.get("precursors") or {}).items() if lead > 0}:
        # The signal that warned first says most about where.
        name = max(leads, key=lambda one: leads[one])
        said += f"; before it {_name(name)} ({leads[name]} steps)"
    if site := data.get("site"):
        tensor = data.get("tensor")
        said += f"; first in {site}" + (f" ({str(tensor).replace('_', ' ')})" if tensor else "")
    return " ".join(said.split())


def _what(kind: str, signal: str, data: Mapping[str, Any], *, is_loss: bool) -> str:
    name, height = _name(signal), data.get("height")
    if kind == "optimizer-changed":
        return f"{data.get('setting')} went from {data.get('before')} to {data.get('after')}"
    if kind in _OUTSIDE:
        several = f" in {count} of {data.get('of')} parameters" if (count := data.get("count", 1)) > 1 else ""
        return f"{_OUTSIDE[kind]}{several}"
    if kind == "non-finite":
        return f"{name} is {data.get('value', 'not finite')}"
    if kind == "dead":
        return f"{name} is exactly 0"
    if kind == "frozen":
        return f"{name} repeats itself"
    if kind == "loss-scale-collapse":
        return f"{name} has fallen from {data.get('established', 'its level')}"
    if isinstance(factor := data.get("factor"), (int, float)):
        return f"{name or 'a site'} is {factor:.3g} times its level"
    if not isinstance(height, (int, float)) or not math.isfinite(height):
        return f"{name} has left its level"
    if is_loss:
        level = data.get("baseline")
        over = f" of {level:.4g}" if isinstance(level, (int, float)) else ""
        return f"{name} has risen by {height:.3g} over its level{over}"
    return f"{name} is {math.exp(min(height, 700.0)):.3g} times its level"


def _name(metric: str) -> str:
    """A metric's name for a reader: a run's own numbers by their statistic, others in full."""
    own = metric.removeprefix("train/-/").removeprefix("precision/-/")
    return metric if own == metric else own.replace("_", " ")
