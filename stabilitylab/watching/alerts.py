"""One alert: as a line, as a command's environment, as a webhook's message.

Names of columns, runs and files come from outside. An alert shows them without characters that a terminal, Slack's markup or an
environment would take for commands, and never puts them into a command line.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from stabilitylab.monitoring.alarms import alarm_line
from stabilitylab.telemetry import LOSS, Event
from stabilitylab.watching.rules import RULES

_COLOURS = {"critical": "#c0392b", "warning": "#e0a800", "notice": "#7f8c8d"}
# Facts of an event for the environment and the webhook, by their name there.
_FACTS = ("signal", "onset", "peak", "end", "height", "baseline", "value", "site", "factor")
_LONGEST = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """One finding.

    Attributes:
        id: the same for the same finding, whenever the log is read.
        rule: see ``rules``.
        text: one line.
        path: the log.
        segment: the run, rank or phase in it; "" where there is one.
        step: the step that it is about; None for no step.
        facts: name -> number or text.
        time: seconds since 1970.
    """

    id: str
    rule: str
    text: str
    path: str
    segment: str = ""
    step: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    time: float = field(default_factory=time.time)

    @property
    def severity(self) -> str:
        return RULES[self.rule].severity

    def line(self) -> str:
        """For a terminal or a log file: time, segment, what happened."""
        clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.time))
        return f"{clock} {self._where()}{self.text}"

    def _where(self) -> str:
        return f"[{self.segment}] " if self.segment else ""

    def to_json(self) -> dict[str, Any]:
        """The form kept on disk, which a command gets as STABILITYLAB_JSON."""
        return {
            "id": self.id,
            "rule": self.rule,
            "severity": self.severity,
            "text": self.text,
            "path": self.path,
            "segment": self.segment,
            "step": self.step,
            "facts": dict(self.facts),
            "time": self.time,
        }

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Alert:
        return cls(**{name: value for name, value in body.items() if name != "severity"})

    def environment(self) -> dict[str, str]:
        """STABILITYLAB_RULE, _SEVERITY, _TEXT, _PATH, _SEGMENT, _STEP, _ID, _JSON, and one per fact."""
        said = {
            name: value
            for name, value in self.to_json().items()
            if name not in ("facts", "time") and value is not None
        }
        said |= {name: value for name, value in self.facts.items() if value is not None}
        said["json"] = json.dumps(self.to_json())
        return {f"STABILITYLAB_{name.upper()}": str(value)[:_LONGEST] for name, value in said.items()}

    def slack(self) -> dict[str, Any]:
        """A message for an incoming webhook of Slack, or a compatible one (Mattermost, Discord's /slack)."""
        fields = {"rule": self.rule, "step": self.step, "segment": self.segment, **self.facts}
        return {
            "text": _escaped(f"{self.rule} in {self.path}: {self._where()}{self.text}"),
            "attachments": [
                {
                    "color": _COLOURS[self.severity],
                    "fallback": _escaped(self.text),
                    "fields": [
                        {"title": name, "value": _escaped(str(value)), "short": True}
                        for name, value in fields.items()
                        if value not in (None, "")
                    ],
                    "footer": "stabilitylab",
                    "ts": int(self.time),
                }
            ],
        }


def of_event(event: Event, *, path: str, segment: str, piece: int, columns: Mapping[str, str]) -> Alert:
    """The alert for an event of the detector or of a run's own monitor."""
    data = dict(event.data)
    signal = str(data.get("signal", data.get("metric", data.get("site", ""))))
    mark = data.get("episode", data.get("site", ""))
    if "signal" in data:
        data["signal"] = columns.get(signal, signal)
    if isinstance(leads := data.get("precursors"), Mapping):
        data["precursors"] = {columns.get(name, name): lead for name, lead in leads.items()}
    if data.get("reason"):
        data["signal"] = data.get("signal", "")
    told = alarm_line(replace(event, data=data), loss=columns.get(LOSS, LOSS))
    text = plain(told.partition(": ")[2] if told.startswith("step ") else told)
    if data.get("reason"):
        text += f" ({plain(str(data['reason']))})"
    facts = {name: _fact(data[name]) for name in _FACTS if data.get(name) is not None}
    return Alert(
        id=f"{segment}/{piece}/{signal}/{mark}/{event.kind}/{data.get('onset', event.step)}",
        rule=event.kind,
        text=f"step {event.step}: {text}",
        path=plain(path),
        segment=plain(segment),
        step=event.step,
        facts=facts,
    )


def of_silence(path: str, values: int, seconds: int, step: int, problem: str | None, is_lost: bool) -> Alert:
    """The alert for no value for this many seconds; ``values`` came before, the last of ``step`` (-1: none). ``is_lost``: nobody
    writes."""
    rule = "run-lost" if is_lost else "silent"
    said = f"{rule}: no value{'' if values else ' yet'}" + (f" ({plain(problem)})" if problem else "")
    said += f" for {seconds} s" + (f"; the last was of step {step}" if step >= 0 else "")
    if is_lost:
        said += "; no process on this machine holds the run's lock, and it has not said that it is over: it was killed"
    return Alert(
        id=f"{rule}/{values}",
        rule=rule,
        text=said,
        path=plain(path),
        step=step if step >= 0 else None,
        facts={"seconds": seconds},
    )


def _fact(value: Any) -> Any:
    return value if isinstance(value, int | float) else plain(str(value))


def plain(text: str) -> str:
    """The text without control characters, so that nothing in a log can steer a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)[:_LONGEST]


def _escaped(text: str) -> str:
    """The text escaped for Slack, which takes <!channel> for a call to everybody."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
