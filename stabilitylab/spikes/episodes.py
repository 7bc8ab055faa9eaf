"""Episodes, which the detector finds: from the first outlying value to the last.

| kind | meaning |
| --- | --- |
| hard-batch | one or two outlying steps that recover by themselves: the data, not the state |
| spike | an excursion of the run's state that recovers |
| divergence | an excursion less than half recovered when the log ends, or after 128 values |
| non-finite | NaN, infinity, or a number at the end of its type's range |
| dead | a loss that is exactly 0 repeatedly, far below its level |
| frozen | a value that repeats itself more often than chance explains |
| loss-scale-collapse | an established loss scale fell to a sixteenth without growing once |

The detector reports an episode as events of its kind, which share ``data["episode"]``: ``phase`` is "onset" when it begins (with
the kind that is likely then), "change" when it turns out to be of another kind, "end" when it is over. ``episodes_of`` folds them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from stabilitylab.telemetry import Event

KINDS = ("hard-batch", "spike", "divergence", "non-finite", "loss-scale-collapse", "dead", "frozen")


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """One event in a run's life.

    Attributes:
        kind: see the table above.
        onset: step of the first outlying value.
        peak: step of the highest value.
        end: step of the last outlying value; None while the episode lasts.
        height: peak above the baseline at onset, in the signal's unit (nats for a loss, log2 for a loss
            scale, natural log for other signals); None for non-finite values.
        signal: the metric or log column that shows it.
        told: the step at which the online detector reports it; None: only the whole log shows it.
        to_the_end: whether it was still open when the log ended.
        level: the baseline before it, in the signal's unit.
        end_level: the signal's median over the 64 values after the end; None where there are none.
        precursors: signal -> steps by which it left its baseline before this one did.
        reason: what the log itself shows as its reason: a changed learning rate, batch size or phase of the data, a period.
    """

    kind: str
    onset: int
    peak: int
    end: int | None
    height: float | None
    signal: str
    told: int | None = None
    to_the_end: bool = False
    level: float | None = None
    end_level: float | None = None
    precursors: Mapping[str, int] = field(default_factory=dict)
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def episodes_of(events: Iterable[Event]) -> list[Episode]:
    """The episodes that ``events`` report, in the order of their onsets, each with its latest known kind and extent."""
    latest: dict[tuple[int, str], Event] = {}
    for event in events:
        if event.kind in KINDS and "episode" in event.data:
            # A rollback may drop an episode's events, and the restored detector then uses its number again.
            latest[event.data["episode"], event.data["signal"]] = event
    episodes = [
        Episode(
            kind=event.kind,
            onset=event.data["onset"],
            peak=event.data["peak"],
            end=event.data["end"],
            height=_number(event.data["height"]),
            signal=event.data["signal"],
            told=event.data.get("told"),
            to_the_end=bool(event.data.get("to_the_end", False)),
            level=_number(event.data.get("baseline")),
            precursors=dict(event.data.get("precursors", {})),
            reason=event.data.get("reason"),
        )
        for event in latest.values()
    ]
    return sorted(episodes, key=lambda episode: episode.onset)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None
