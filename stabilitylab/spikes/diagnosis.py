"""What the telemetry says about one episode: ``forensics.py`` derives it, ``words.py`` puts it into sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from stabilitylab.spikes.change_onsets import ChangeOnset
from stabilitylab.spikes.episodes import Episode
from stabilitylab.spikes.evidence import Climb
from stabilitylab.telemetry import Event


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What the telemetry says about an episode.

    Attributes:
        episode: the episode explained.
        cause: a word of the table in ``stabilitylab/spikes/suspects.py``.
        site: where, if the cause has a place: a module or parameter path, with the head if it is one.
        first_step: when the first site left its baseline; None if none did.
        lead: steps from there to the onset.
        resolution: steps between measurements of that site.
        departures: the earliest sites.
        leads: family -> steps by which its earliest site was ahead of the loss (negative: behind).
        embedding_share: the embedding's share of the squared gradient norm at the onset, and its usual one.
        embedding_rows: tokens with the largest rows in the embedding's gradient at the onset.
        batches: step -> documents and token ranges of the suspect batches, the previous one included.
        overflow: step at which numbers first went non-finite, and the tensor and site where.
        loss_scale: at the onset and the lowest within the episode.
        learning_rate_change: step and factor.
        learning_rate_climb: how the rate rose gradually to the run's highest, where that is the suspect.
        outside: the event of a change from outside: kind, step and data; None if there was none, or it is not the suspect.
        disturbs: the effect of a cause outside the forward pass on it: the first site that left, and the one that left furthest.
        stack: in which stack of blocks the site lies, in a model that has several.
        measurements: number of measurements of layers in the 128 steps before the onset.
        advice: one line of what to try.
        sentences: the findings for a reader (``words.py``).
    """

    episode: Episode
    cause: str
    site: str | None = None
    first_step: int | None = None
    lead: int | None = None
    resolution: int | None = None
    departures: Sequence[ChangeOnset] = ()
    leads: dict[str, int] = field(default_factory=dict)
    embedding_share: tuple[float, float] | None = None
    embedding_rows: Sequence[int] = ()
    batches: dict[int, list[str]] = field(default_factory=dict)
    overflow: tuple[int, str] | None = None
    loss_scale: tuple[float, float] | None = None
    learning_rate_change: tuple[int, float] | None = None
    learning_rate_climb: Climb | None = None
    outside: Mapping[str, Any] | None = None
    disturbs: Sequence[ChangeOnset] = ()
    stack: str = ""
    measurements: int = 0
    advice: str = ""
    sentences: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``events.jsonl``."""
        return asdict(self)

    @property
    def event(self) -> Event:
        """The diagnosis as an event of kind ``diagnosis`` at the onset."""
        return Event(step=self.episode.onset, kind="diagnosis", data=self.to_json())
