"""Says a watch's findings, each once, and an episode's end only where its beginning was told."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from stabilitylab.telemetry import Event
from stabilitylab.watching.alerts import Alert, of_event, plain
from stabilitylab.watching.kept_state import KeptState
from stabilitylab.watching.notifiers import Notifier
from stabilitylab.watching.rules import ALERTS

_LATEST = 200


@dataclass(slots=True, kw_only=True)
class Announcer:
    """Says alerts and notices of one log.

    Attributes:
        path: the log's.
        tell: notices to say like alerts.
        memory: remembers what was said.
        say: takes each new alert.
        hooks: get alerts, not notices.
        posts: whether one of the hooks is a webhook, which reports delivery.
        told: the latest ones said.
        open: open episodes: segment, run, signal and number -> kind.
        is_quiet: whether to remember findings without saying them.
    """

    path: Path
    tell: frozenset[str]
    memory: KeptState
    say: Callable[[Alert], object]
    hooks: tuple[Notifier, ...] = ()
    posts: bool = False
    told: list[Alert] = field(default_factory=list)
    open: dict[str, str] = field(default_factory=dict)
    is_quiet: bool = False

    @property
    def open_episodes(self) -> list[str]:
        """Kind and segment of each open episode."""
        return [
            kind + (f" in {segment}" if (segment := key.split("/", 1)[0]) else "")
            for key, kind in self.open.items()
            if kind in ALERTS
        ]

    def hear(self, found: Iterable[tuple[int, Event]], segment: str, columns: Mapping[str, str]) -> None:
        """Take events of a segment, each with its run's number; ``columns``: signal -> its name in the log."""
        new: list[tuple[int, Event]] = []  # to tell together
        for piece, event in found:
            data = event.data
            key = f"{segment}/{piece}/{data.get('signal', data.get('site'))}/{data.get('episode')}"
            is_end = data.get("phase") == "end"
            before = self.open.get(key)
            is_told = before == event.kind
            if is_end:
                self.open.pop(key, None)
                is_told = before is None or before == event.kind or event.kind not in ALERTS
            elif data.get("episode") is not None:
                self.open[key] = event.kind
            # NaN reaches all signals at once, and is one event.
            joins = event.kind == "non-finite" and not is_end and not is_told
            if new and not (joins and new[0][1].step == event.step):
                self._announce_events(new, segment, columns)
                new = []
            if joins:
                new.append((piece, event))
            elif not is_told:
                self._announce_events([(piece, event)], segment, columns)
            if is_end and before is not None and not data.get("to_the_end"):
                self._over(piece, event, segment, columns)
        if new:
            self._announce_events(new, segment, columns)

    def _announce_events(
        self, together: list[tuple[int, Event]], segment: str, columns: Mapping[str, str]
    ) -> None:
        alerts = [
            of_event(event, path=str(self.path), segment=segment, piece=piece, columns=columns)
            for piece, event in together
        ]
        first = alerts[0]
        if len(alerts) > 1:
            names = [str(alert.facts.get("signal")) for alert in alerts]
            facts = {**first.facts, "signal": ", ".join(names)}
            text = first.text.replace(f" {names[0]} is", f" {', '.join(names)} is", 1)
            for other in alerts[1:]:
                self.memory.is_new(other)
            first = replace(first, facts=facts, text=text)
        self.announce(first)

    def _over(self, piece: int, event: Event, segment: str, columns: Mapping[str, str]) -> None:
        signal = str(event.data.get("signal"))
        name = plain(columns.get(signal, signal.rpartition("/")[2]))
        onset, end = event.data.get("onset"), event.data.get("end")
        if event.kind == "hard-batch" and "hard-batch" not in self.tell:
            return
        said = f"the {event.kind} of {name} since step {onset} is over, at step {end}"
        self.notice("over", f"{segment}/{piece}/over/{signal}/{onset}", said, segment, event.step)

    def notice(self, rule: str, name: str, text: str, segment: str = "", step: int | None = None) -> None:
        """Say something other than an event; the same ``name`` always means the same thing."""
        said = f"{rule}: {text}" if step is None else f"step {step}: {rule}: {text}"
        self.announce(
            Alert(
                id=name, rule=rule, text=said, path=plain(str(self.path)), segment=plain(segment), step=step
            )
        )

    def announce(self, alert: Alert) -> None:
        """Say the alert and give it to the hooks, unless that is done already."""
        if alert.rule == "hard-batch" and "hard-batch" not in self.tell:
            return
        loud = (alert.rule in ALERTS or alert.rule in self.tell) and not self.is_quiet
        quiet = self.is_quiet
        if not self.memory.is_new(alert, posted=loud and self.posts, quiet=quiet) or quiet:
            return
        self.told.append(alert)
        del self.told[:-_LATEST]
        self.say(alert)
        if loud:
            for hook in self.hooks:
                hook.tell(alert)
