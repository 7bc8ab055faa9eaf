"""Why an episode happened, as far as the telemetry around it shows.

Forensics ranks sites by when they left their own baseline (``change_onsets.py``), within a step by the order of execution. The
rules of ``suspects.py`` derive the cause, and its name, from the earliest sites and from changes from outside. ``advice.py`` says
what to try.

Proximity in time does not prove a cause: the sentences say what moved, in which order, and how finely the run measured it. The same
batch may be harmless in another state (PaLM, 2204.02311, section 5.1).

Forensics explains a departure that the loss does not show (``site-departure`` and the changes from outside) like an episode, under
its own kind.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from stabilitylab.runs import Run
from stabilitylab.spikes.advice import advice
from stabilitylab.spikes.change_onsets import ChangeOnset, find_departures, measurements_before
from stabilitylab.spikes.diagnosis import Diagnosis
from stabilitylab.spikes.episodes import Episode, episodes_of
from stabilitylab.spikes.evidence import LEAD_STEPS, gather
from stabilitylab.spikes.suspects import Suspect, disturbed, first_suspect
from stabilitylab.spikes.words import sentences
from stabilitylab.telemetry import DEPARTURES, LOSS_SCALES, Event

MOST = 10
_log = logging.getLogger("stabilitylab")


def diagnose_run(run: Run, *, describe_batch: Callable[[int], list[str]] | None = None) -> list[Diagnosis]:
    """Explain every episode in the run's events, and every departure that no episode covers, in order."""
    return [diagnose(run, episode, describe_batch=describe_batch) for episode in explicable(run.events)]


def explicable(events: Iterable[Event]) -> list[Episode]:
    """All episodes, and departures that the loss does not show as episodes of their own: none in an episode or within 64 steps
    before it."""
    events = list(events)
    told = episodes_of(events)
    quiet: list[Episode] = []
    for event in sorted(
        (e for e in events if e.kind in DEPARTURES), key=lambda e: (e.step, e.kind == "site-departure")
    ):
        covered = any(
            one.onset - LEAD_STEPS <= event.step <= (math.inf if one.end is None else max(one.end, one.onset))
            for one in told
        ) or any(event.step - one.onset < LEAD_STEPS for one in quiet)
        if not covered:
            quiet.append(_as_episode(event))
    return sorted([*told, *quiet], key=lambda one: one.onset)


def _as_episode(event: Event) -> Episode:
    factor = event.data.get("factor")
    height = math.log(factor) if isinstance(factor, (int, float)) and 0 < factor < math.inf else None
    signal = str(event.data.get("signal") or event.data.get("site") or event.data.get("setting"))
    return Episode(
        kind=event.kind, onset=event.step, peak=event.step, end=event.step, height=height, signal=signal
    )


def diagnose(
    run: Run, episode: Episode, *, describe_batch: Callable[[int], list[str]] | None = None
) -> Diagnosis:
    """Explain one episode.

    Args:
        run: a run folder opened by ``load_run``.
        episode: the episode to explain.
        describe_batch: step -> the documents and token ranges of its batch, one per line.
    """
    onset = episode.onset
    departures = find_departures(run, onset)
    seen = gather(run, episode, departures)
    suspect = first_suspect(episode, seen)
    first = min((one.step for one in departures), default=None) if suspect.step is None else suspect.step
    leads: dict[str, int] = {}
    for one in departures:
        leads.setdefault(one.family, onset - one.step)
    culprit = suspect.departure
    numbers = {(one.onset, one.signal): i for i, one in enumerate(episodes_of(run.events), start=1)}
    found = Diagnosis(
        episode=episode,
        cause=suspect.cause,
        site=suspect.site,
        first_step=first,
        lead=None if first is None else onset - first,
        resolution=None if culprit is None else max(1, culprit.step - culprit.since),
        departures=_listed(departures, suspect),
        leads=leads,
        embedding_share=_embedding_share(run, onset),
        embedding_rows=_embedding_rows(run, onset),
        batches=_batches(first, onset, describe_batch),
        overflow=None if seen.overflow is None else _where(seen.overflow),
        loss_scale=_loss_scale(run, episode),
        learning_rate_change=seen.rate_change,
        learning_rate_climb=seen.climb
        if suspect.cause == "learning-rate" and seen.rate_change is None
        else None,
        outside=_outside(suspect),
        disturbs=disturbed(suspect, seen),
        stack=run.places.stack_of(suspect.site.partition(",")[0]) if suspect.site else "",
        measurements=measurements_before(run, onset),
        advice=advice(run, suspect, numbers.get((onset, episode.signal))),
    )
    return replace(found, sentences=sentences(found))


def _listed(departures: Sequence[ChangeOnset], suspect: Suspect) -> tuple[ChangeOnset, ...]:
    """The earliest, the suspect's own among them."""
    own = suspect.departure
    listed = list(departures[:MOST])
    if own is not None and own not in listed:
        listed = [own, *listed[: MOST - 1]]
    return tuple(listed)


def _outside(suspect: Suspect) -> Mapping[str, Any] | None:
    event = suspect.event
    if event is None or event.kind == "overflow":
        return None
    return {"kind": event.kind, "step": event.step, **event.data}


def _where(event: Event) -> tuple[int, str]:
    tensor = str(event.data.get("tensor", "tensor")).replace("_", " ")
    return event.step, f"{tensor} of {event.data.get('site', '?')}"


def _embedding_share(run: Run, onset: int) -> tuple[float, float] | None:
    shares = run.near("gradient", "share", onset - LEAD_STEPS, onset + LEAD_STEPS)
    own = [site for site in shares["site"].cat.categories if run.places.is_embedding(str(site))]
    embedding = shares[shares["site"].isin(own)]
    if embedding.empty:
        return None
    by_step = embedding.groupby("step")["value"].sum(min_count=1)
    at = by_step[by_step.index >= onset].head(1)
    usual = by_step[(by_step.index < onset) & (by_step.index >= onset - LEAD_STEPS)]
    if at.empty or usual.empty:
        return None
    return float(at.iloc[0]), float(usual.median())


def _embedding_rows(run: Run, onset: int) -> list[int]:
    at = run.near("gradient", "top_row", onset, onset)
    at = at[at["site"].isin([site for site in at["site"].unique() if run.places.is_embedding(str(site))])]
    at = at.sort_values("index")
    return [int(value) for value in at["value"] if math.isfinite(value)]


def _batches(
    first: int | None, onset: int, describe_batch: Callable[[int], list[str]] | None
) -> dict[int, list[str]]:
    """The batches of the first departure and of the onset, each with the one before it."""
    if describe_batch is None:
        return {}
    begins = {onset} if first is None else {first, onset}
    steps = sorted({step for begin in begins for step in (begin - 1, begin) if step >= 0})
    try:
        return {step: describe_batch(step) for step in steps}
    except Exception:  # a batch that cannot be described must not lose the diagnosis
        _log.exception("the batches of steps %s could not be described", steps)
        return {}


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
