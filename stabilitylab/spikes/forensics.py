"""Why an episode happened, as far as the telemetry around it tells.

Sites are ranked by when they left their own baseline (``departures.py``). The cause is read off the earliest ones:

| cause | pattern |
| --- | --- |
| learning-rate | the rate jumped by half or more within 64 steps before the onset, and no site had left before it did |
| overflow | numbers went out of the format by 3 steps after the onset, or the loss scale had collapsed |
| batch | most gradients left in the very step of the loss, and whatever left in the forward pass came back after the batch |
| attention | attention scores of few heads left first |
| activation | activations of few sites left first |
| gradient | gradients of few parameters left first, without anything in the forward pass |
| optimizer | many gradients left before the loss did, or only updates did: the state as a whole |
| unknown | nothing that was measured left its baseline |

Updates are listed, but are no cause beside anything else: they follow from rate and gradients, and under Adam rise by
themselves where gradients agree from step to step.

What is close in time is not thereby the cause: the sentences say what was seen, in which order, and how finely it was
measured. The same batch from another state may do no harm (PaLM, 2204.02311, section 5.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from stabilitylab.runs import Run
from stabilitylab.spikes.change_onsets import AFTER, ORDER, ChangeOnset, find_departures
from stabilitylab.spikes.episodes import Episode, episodes_of
from stabilitylab.spikes.reasons import RATE_FACTOR
from stabilitylab.telemetry import LEARNING_RATE, LOSS_SCALES, Event

LEAD_STEPS = 64
MOST = 10
FORWARD = ("attention", "activation")


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What the telemetry says about an episode.

    Attributes:
        episode: what is explained.
        cause: a word of the table in ``stabilitylab/spikes/forensics.py``.
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

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``events.jsonl``."""
        return {**asdict(self), "sentences": self.sentences}

    @property
    def event(self) -> Event:
        """The diagnosis as an event of kind ``diagnosis`` at the onset."""
        return Event(step=self.episode.onset, kind="diagnosis", data=self.to_json())

    @property
    def sentences(self) -> list[str]:
        """What was seen, for a reader."""
        return list(_sentences(self))


def diagnose_run(run: Run, *, describe_batch: Callable[[int], list[str]] | None = None) -> list[Diagnosis]:
    """Explain every episode that the run's events tell of, in order."""
    return [diagnose(run, episode, describe_batch=describe_batch) for episode in episodes_of(run.events)]


def diagnose(
    run: Run, episode: Episode, *, describe_batch: Callable[[int], list[str]] | None = None
) -> Diagnosis:
    """Explain one episode.

    Args:
        run: a run folder opened by ``load_run``.
        episode: what to explain.
        describe_batch: step -> the documents and token ranges of its batch, one a line.
    """
    onset = episode.onset
    departures = find_departures(run, onset)
    change = _rate_change(run, onset)
    overflow = _overflow(run, episode)
    cause, culprit = _cause(departures, episode, change, overflow)
    first = min((one.step for one in departures), default=None)
    if cause == "learning-rate" and change is not None:
        first = change[0]
    elif culprit is not None:
        first = culprit.step
    leads: dict[str, int] = {}
    for one in departures:
        leads.setdefault(one.family, onset - one.step)
    return Diagnosis(
        episode=episode,
        cause=cause,
        site=None if culprit is None else culprit.name,
        first_step=first,
        lead=None if first is None else onset - first,
        resolution=None if culprit is None else max(1, culprit.step - culprit.since),
        departures=tuple(departures[:MOST]),
        leads=leads,
        embedding_share=_embedding_share(run, onset),
        embedding_rows=_embedding_rows(run, onset),
        batches=_batches(first, onset, describe_batch),
        overflow=overflow,
        loss_scale=_loss_scale(run, episode),
        learning_rate_change=change,
    )


def _cause(
    departures: Sequence[ChangeOnset],
    episode: Episode,
    change: tuple[int, float] | None,
    overflow: tuple[int, str] | None,
) -> tuple[str, ChangeOnset | None]:
    first = next((one for one in departures if one.family != "update"), departures[0] if departures else None)
    # Updates follow the rate in its own step: they are its shadow.
    ahead_of_change = change is not None and any(
        one.step < change[0] for one in departures if one.family != "update"
    )
    if change is not None and not ahead_of_change:
        return "learning-rate", None
    if episode.kind == "loss-scale-collapse" or (
        overflow is not None and overflow[0] <= episode.onset + AFTER
    ):
        return "overflow", first
    if first is None:
        return "unknown", None
    # Families tie on the step, and a site that is measured seldom may have left at any step since it was last seen in order.
    # Among these, what few sites show is more telling than what all do.
    earliest = [one for one in departures if one.since < first.step and one.family != "update"]
    local = [one for one in earliest if one.is_local]
    lasting = [one for one in local if one.family in FORWARD and _lasts(one, episode)]
    if lasting:
        culprit = min(lasting, key=lambda one: (ORDER[one.family], -one.sigmas))
        return culprit.family, culprit
    alone = [one for one in local if one.family == "gradient"]
    if alone:
        return "gradient", alone[0]
    gradients = [one for one in earliest if one.family == "gradient"]
    if gradients and first.step == episode.onset:
        return "batch", gradients[0]
    forward = [one for one in earliest if one.family in FORWARD]
    if forward:
        return ("batch" if first.step == episode.onset else forward[0].family), forward[0]
    return "optimizer", first


def _lasts(one: ChangeOnset, episode: Episode) -> bool:
    """Whether it was still out after the first step out: the state, and not what one batch did to it."""
    return one.until > max(one.step, episode.onset) or not math.isfinite(one.ratio)


def _rate_change(run: Run, onset: int) -> tuple[int, float] | None:
    """The latest jump of the learning rate within 64 steps before the onset, as (step, factor).

    A warm-up from zero multiplies its first rates by 2, 3/2, ...: a jump counts only if it is more than half as large
    again as the step before it was.
    """
    rate = run.series(LEARNING_RATE)
    rate = rate[(rate.index <= onset) & (rate.index >= onset - LEAD_STEPS - 2) & (rate > 0)]
    factors = (rate / rate.shift(1)).to_numpy(np.float64)
    for i in range(len(factors) - 1, 1, -1):
        usual = max(1.0, factors[i - 1])
        if factors[i] >= RATE_FACTOR * usual:
            return int(rate.index[i]), float(factors[i])
    return None


def _overflow(run: Run, episode: Episode) -> tuple[int, str] | None:
    """Step, and tensor and site of the first overflow from 64 steps before the onset to the episode's end."""
    end = episode.onset + LEAD_STEPS if episode.end is None else episode.end
    for event in run.events:
        if event.kind == "overflow" and episode.onset - LEAD_STEPS <= event.step <= end:
            tensor = str(event.data.get("tensor", "tensor")).replace("_", " ")
            return event.step, f"{tensor} of {event.data.get('site', '?')}"
    return None


def _embedding_share(run: Run, onset: int) -> tuple[float, float] | None:
    shares = run.rows("gradient", "share")
    sites = shares["site"].astype(str)
    embedding = shares[sites.str.contains("embed|wte", case=False, regex=True)]
    if embedding.empty:
        return None
    by_step = embedding.groupby("step")["value"].sum(min_count=1)
    at = by_step[by_step.index >= onset].head(1)
    usual = by_step[(by_step.index < onset) & (by_step.index >= onset - LEAD_STEPS)]
    if at.empty or usual.empty:
        return None
    return float(at.iloc[0]), float(usual.median())


def _embedding_rows(run: Run, onset: int) -> list[int]:
    rows = run.rows("gradient", "top_row")
    at = rows[rows["step"] == onset].sort_values("index")
    return [int(value) for value in at["value"] if math.isfinite(value)]


def _batches(
    first: int | None, onset: int, describe_batch: Callable[[int], list[str]] | None
) -> dict[int, list[str]]:
    """The batches of the first departure and of the onset, each with the one before it."""
    if describe_batch is None:
        return {}
    begins = {onset} if first is None else {first, onset}
    steps = sorted({step for begin in begins for step in (begin - 1, begin) if step >= 0})
    return {step: describe_batch(step) for step in steps}


def _loss_scale(run: Run, episode: Episode) -> tuple[float, float] | None:
    for name in LOSS_SCALES:
        scale = run.series(name)
        if len(scale) and scale.max() > 1:
            at = scale[scale.index <= episode.onset]
            end = episode.onset if episode.end is None else episode.end
            within = scale[(scale.index >= episode.onset) & (scale.index <= end + 1)]
            if len(at) and len(within):
                return float(at.iloc[-1]), float(within.min())
    return None


_WORDS = {
    "learning-rate": "the learning rate",
    "overflow": "an overflow of the number format",
    "batch": "the batch",
    "attention": "attention scores",
    "activation": "activations",
    "gradient": "a gradient",
    "optimizer": "the optimizer's state",
    "unknown": "not visible in what was measured",
}


def _sentences(one: Diagnosis) -> Sequence[str]:
    episode = one.episode
    height = "" if episode.height is None else f", {episode.height:.3g} high"
    said = [f"{episode.kind} at step {episode.onset}{height}. First suspect: {_WORDS[one.cause]}."]
    if one.learning_rate_change is not None:
        step, factor = one.learning_rate_change
        said.append(
            f"The learning rate was multiplied by {factor:.3g} at step {step}, {_ago(step, episode)}."
        )
    if one.departures:
        first = one.departures[0]
        if one.site is not None:
            first = next((d for d in one.departures if d.name == one.site), first)
        said.append(
            f"{_what(first)} left its baseline first, at step {first.step}, {_ago(first.step, episode)} "
            f"({_times(first.ratio)}, {first.sigmas:.0f} deviations; measured every {one.resolution or 1} steps)."
        )
        others = [d for d in one.departures if d is not first][:3]
        if others:
            said.append(
                "Then: " + "; ".join(f"{_what(d)} at step {d.step} ({_times(d.ratio)})" for d in others) + "."
            )
    else:
        said.append("No site that was measured left its baseline around the onset.")
    if one.embedding_share is not None:
        now, usual = one.embedding_share
        said.append(
            f"The embedding's share of the squared gradient norm was {now:.2f} (usually {usual:.2f})."
        )
    if one.overflow is not None:
        step, where = one.overflow
        said.append(f"Numbers first left the format at step {step}, in the {where}.")
    if one.loss_scale is not None:
        before, lowest = one.loss_scale
        said.append(
            f"The loss scale was {before:g} at the onset and fell to {lowest:g}."
            if lowest < before
            else f"The loss scale stayed at {before:g}."
        )
    for step, documents in one.batches.items():
        shown = "; ".join(documents[:4]) + ("; ..." if len(documents) > 4 else "")
        said.append(f"Batch of step {step}: {shown}.")
    return said


def _what(one: ChangeOnset) -> str:
    noun = {
        "attention": "The attention score maximum of",
        "activation": "The activation maximum of",
        "activation_gradient": "The activation gradient of",
        "gradient": "The gradient of",
        "update": "The update of",
    }[one.family]
    return f"{noun} {one.name}"


def _ago(step: int, episode: Episode) -> str:
    lead = episode.onset - step
    if lead == 0:
        return "in the step of the onset"
    steps = f"{abs(lead)} step{'s' if abs(lead) != 1 else ''}"
    return f"{steps} before the onset" if lead > 0 else f"{steps} after the onset"


def _times(ratio: float) -> str:
    return "not finite" if not math.isfinite(ratio) else f"x {ratio:.3g}"
