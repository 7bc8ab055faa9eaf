"""Derives the first suspect from the evidence around an episode: the rules, in the order in which they are tried.

| cause | pattern | site |
| --- | --- | --- |
| parameter | weights moved between two steps without an update, before any site left or with it | the parameter |
| optimizer | a setting jumped, moments fell by more than a step can do, or updates left before all else | |
| learning-rate | the rate jumped by half or more within 64 steps before the onset, and no site had left before it did | |
| | or it had doubled gradually, beyond all that it had survived, and sites left one after another, none by a jump | |
| overflow | an activation left the format before any other site left, or the loss scale collapsed | the tensor's module |
| | (a site of another module that left eightfold earlier in the same step led to it) | |
| batch | sites left in the step of the loss, many gradients among them, and came back; or a hard batch left none; or the | |
| | model's input, that of its first layer, left first or was not finite; or nothing left, and half of the | |
| | rise was there in one step: other data through the same state | |
| attention | attention scores of few heads are the first in the order of execution | module, and head |
| | scores of most heads left, behind the projection that feeds them | the projection |
| activation | activations of few sites are | module |
| gradient | a gradient is, with nothing in the forward pass before it | parameter or module |
| unknown | nothing measured left its baseline | |

Recorded changes of optimizer or weights from outside are certain, so they come first; the rules on departures follow the order in
which a step computes. Of the sites that share the earliest step (or may, being measured seldom), the suspect is the first in the
forward pass that stands out from its family; a site whose input left comes after the one that fed it, so it is no suspect. Where no
site in the forward pass qualifies, it is the first in the backward pass. Weak departures beside far larger ones are their echo: the
rules pass over a rise of less than a fifth of the largest, on the log scale.

Updates follow rate and gradients, and under Adam rise by themselves where gradients agree from step to step: they point to the
optimizer only where they left alone, or a third of them before all else, or one by more than Adam can move by itself while its
gradient stood. A rate that is too high moves all of them together: sites follow over some steps, each gradually, while a fault of
one place shows there at once. An optimizer that bounds its update by its own second moment (StableAdamW) moves most in the step
after; that is later than the gradient, and so does no harm here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from stabilitylab.spikes.change_onsets import ChangeOnset
from stabilitylab.spikes.episodes import Episode
from stabilitylab.spikes.evidence import Evidence
from stabilitylab.telemetry import Event

CAUSES = (
    "parameter",
    "optimizer",
    "learning-rate",
    "overflow",
    "batch",
    "attention",
    "activation",
    "gradient",
    "unknown",
)
FORWARD = ("attention", "activation")
_ECHO = 0.2
_MANY = 1 / 3
# How far a batch may move activations and scores: more is a fault of the state.
_OF_A_BATCH = 8.0
# An update over the rate is at most (1 - beta1) / sqrt(1 - beta2) = 3.2, at beta2 .999; .1 is usual.
_OF_ADAM = 32.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspect:
    """A cause and its place; ``departure`` or ``event`` is the evidence for it."""

    cause: str
    site: str | None = None
    step: int | None = None
    departure: ChangeOnset | None = None
    event: Event | None = None


def first_suspect(episode: Episode, seen: Evidence) -> Suspect:
    """The first rule that applies."""
    moved = [one for one in seen.departures if one.family != "update"]
    begin = min((one.step for one in moved), default=episode.onset)
    return (
        _from_outside(seen, min(begin, episode.onset))
        or _rate(seen, moved)
        or _overflowed(episode, seen, moved)
        or _climbed(episode, seen, moved)
        or _departed(episode, seen, moved)
    )


def disturbed(suspect: Suspect, seen: Evidence) -> tuple[ChangeOnset, ...]:
    """The effect of a cause outside the forward pass on it: the first site that left, and the one that left furthest.

    A changed weight shows in its own module's output and in what that feeds, which says nothing new: others come before those.
    """
    if suspect.cause == "attention" and suspect.departure is not None and suspect.site is not None:
        return tuple(_scores_of(suspect.departure, seen.departures)[:1])
    if suspect.event is None or suspect.event.kind == "overflow":
        return ()
    begin = -math.inf if suspect.step is None else suspect.step
    left = [one for one in seen.departures if one.family in FORWARD and one.step >= begin and one.is_local]
    own = (suspect.site or "").rpartition(".")[0]
    others = [one for one in left if one.site != own and not one.site.endswith(":input")] or left
    if not others:
        return ()
    step = min(one.step for one in others)
    first = _strong(_as_executed([one for one in others if one.since < step]))[0]
    most = max(others, key=lambda one: (one.ratio, -one.step))
    return (first,) if most.name == first.name or most.ratio < 2.0 * first.ratio else (first, most)


def _from_outside(seen: Evidence, begin: int) -> Suspect | None:
    """The latest change from outside by the time the first site left."""
    earlier = [event for event in seen.outside if event.step <= begin]
    if not earlier:
        return None
    step = max(event.step for event in earlier)
    at = [event for event in earlier if event.step == step]
    event = next((event for event in at if event.kind != "parameter-changed"), at[0])
    if event.kind != "parameter-changed":
        return Suspect(cause="optimizer", step=step, event=event)
    # Half of the model at once means a state loaded, decayed or averaged: there is no single site.
    if 2 * int(event.data.get("count", 1)) > int(event.data.get("of", 0)):
        return Suspect(cause="parameter", step=step, event=event)
    several = [str(name) for name in event.data.get("sites", [event.data["site"]])]
    site = min(several, key=lambda name: seen.execution.place("update", name))
    return Suspect(cause="parameter", site=site, step=step, event=event)


def _rate(seen: Evidence, moved: Sequence[ChangeOnset]) -> Suspect | None:
    """Updates follow the rate in its own step: they are its shadow."""
    if seen.rate_change is None or any(one.step < seen.rate_change[0] for one in moved):
        return None
    return Suspect(cause="learning-rate", step=seen.rate_change[0])


def _overflowed(episode: Episode, seen: Evidence, moved: Sequence[ChangeOnset]) -> Suspect | None:
    if episode.kind == "loss-scale-collapse" and seen.overflow is None:
        first = moved[0] if moved else None
        return Suspect(cause="overflow", site=None if first is None else first.name, departure=first)
    if seen.overflow is None:
        return None
    event = seen.overflow
    # A NaN loss shows at once, the NaN tensor perhaps only at the next measured step.
    begin = min(event.step, episode.onset) if episode.kind == "non-finite" else event.step
    grew = [one for one in moved if one.step < begin and math.isfinite(one.ratio) and one.is_local]
    if grew:  # it had begun to leave before
        return None
    if (origin := _led_to(event, begin, seen)) is not None:
        if origin.family == "activation" and _is_given(origin.site, seen):
            return Suspect(cause="batch", step=origin.step, departure=origin)
        return _with_scores(origin, [one for one in moved if one.family in FORWARD], seen.heads)
    if event.data.get("tensor") == "activation" and _is_given(str(event.data.get("site")), seen):
        return Suspect(cause="batch", step=event.step, event=event)
    return Suspect(
        cause="overflow", site=str(event.data.get("site", "")) or None, step=event.step, event=event
    )


def _led_to(event: Event, begin: int, seen: Evidence) -> ChangeOnset | None:
    """The site that grew in the step of an overflow, in another module that the step came to before."""
    site = str(event.data.get("site", ""))
    place = seen.execution.place(str(event.data.get("tensor")), site)
    module = site.removesuffix(":input")
    grew = [
        one
        for one in seen.departures
        if one.family in FORWARD
        and one.step == begin
        and math.isfinite(one.jump)
        and one.jump >= _OF_A_BATCH
        and one.order < place
        and one.site.removesuffix(":input") != module
    ]
    return _as_executed(grew)[0] if grew else None


def _climbed(episode: Episode, seen: Evidence, moved: Sequence[ChangeOnset]) -> Suspect | None:
    """A rate that rose past what the run can bear."""
    if seen.climb is None or episode.kind == "hard-batch":
        return None
    if not moved:
        return None if seen.is_sudden else Suspect(cause="learning-rate", step=seen.climb.step)
    first = moved[0]
    if any(one.jump >= _OF_A_BATCH for one in moved if one.step == first.step):
        return None
    # Where all gradients leave in the step of the loss, a batch made them.
    together = sum(one.family == "gradient" for one in moved if one.step == first.step)
    if first.step >= episode.onset and together >= max(2.0, _MANY * seen.gradients):
        return None
    return Suspect(cause="learning-rate", step=seen.climb.step, departure=first)


def _departed(episode: Episode, seen: Evidence, moved: Sequence[ChangeOnset]) -> Suspect:
    """What the sites that left say by themselves: in the forward pass, in the backward pass, else by when they left."""
    if not moved and episode.kind == "hard-batch":
        return Suspect(cause="batch", step=episode.onset)
    if (early := _updates_alone(seen, moved)) is not None:
        return Suspect(cause="optimizer", step=early.step, departure=early)
    if not moved:
        cause = "batch" if seen.is_sudden else "unknown"
        return Suspect(cause=cause, step=episode.onset if seen.is_sudden else None)
    step = moved[0].step
    tied = _as_executed([one for one in moved if one.since < step])
    strong = _strong(tied)
    forward = [one for one in strong if one.family in FORWARD and one.is_local]
    if strong and strong[0].family == "activation" and _is_given(strong[0].site, seen):
        return Suspect(cause="batch", step=strong[0].step, departure=strong[0])
    faults = [one for one in forward if _lasts(one, episode) or one.ratio >= _OF_A_BATCH]
    if faults:
        return _with_scores(faults[0], faults, seen.heads)
    backward = [one for one in tied if one.family not in FORWARD]
    many = sum(one.family == "gradient" for one in backward) >= max(2.0, _MANY * seen.gradients)
    if (fault := _backward_fault(episode, seen, step, backward, forward=forward, many=many)) is not None:
        return _at(fault)
    if step >= episode.onset:
        return Suspect(cause="batch", step=step, departure=tied[0])
    if forward:
        return _at(forward[0])
    if backward and many and not any(one.family in FORWARD for one in tied):
        return Suspect(cause="optimizer", step=step, departure=backward[0])
    return _at(tied[0])


def _backward_fault(
    episode: Episode,
    seen: Evidence,
    step: int,
    backward: Sequence[ChangeOnset],
    *,
    forward: Sequence[ChangeOnset],
    many: bool,
) -> ChangeOnset | None:
    """The gradient or update that no batch explains; None where a batch does. ``many``: many gradients left in ``step``."""
    # A batch's effect starts at the loss; what begins later in the backward pass is a fault there.
    if not any(one.order[1] <= _nearest(seen) and one.ratio >= _OF_A_BATCH for one in backward):
        beyond = [one for one in _strong(backward) if one.ratio >= _OF_A_BATCH**2]
        if beyond and not forward:
            return beyond[0]
    alone = [one for one in _strong(backward) if one.is_local]
    if not alone:
        return None
    # The lower the loss was, the more a hard batch multiplies every gradient, from the one nearest to the loss on.
    of_batch = episode.kind == "hard-batch" and alone[0].order[1] <= _nearest(seen)
    if many and step >= episode.onset and (of_batch or alone[0].ratio < _OF_A_BATCH**2):
        return None
    return alone[0]


def _is_given(site: str, seen: Evidence) -> bool:
    """Whether a site is the model's input: that of the first layer followed. Token models have none, as their first site is the
    embedding's output."""
    return site.endswith(":input") and site in seen.execution.order[:1]


def _nearest(seen: Evidence) -> int:
    """The place in the backward pass of the parameters nearest to the loss."""
    return max((seen.execution.place("gradient", site)[1] for site in seen.nearest), default=-1)


def _with_scores(first: ChangeOnset, faults: Sequence[ChangeOnset], heads: Mapping[str, int]) -> Suspect:
    """A query or key that grew shows in its projection's output, and in the scores as much or more. Where few heads' scores left,
    those heads are the place; where most did, the projection is."""
    scores = [
        one
        for one in _scores_of(first, faults)
        if one.ratio > first.ratio / 2
        # Compare values that turn non-finite later by their first step out.
        or (math.isinf(first.ratio) and math.isfinite(one.jump) and one.jump > first.jump / 2)
    ]
    if not scores:
        return _at(first)
    if 2 * len({one.index for one in scores}) <= heads.get(scores[0].site, 0):
        return _at(scores[0])
    return replace(_at(first), cause="attention")


def _scores_of(first: ChangeOnset, several: Sequence[ChangeOnset]) -> list[ChangeOnset]:
    """The scores of the attention that a projection is part of, largest first."""
    own = [one for one in several if one.family == "attention" and first.site.startswith(f"{one.site}.")]
    return sorted(own, key=lambda one: -one.ratio)


def _updates_alone(seen: Evidence, moved: Sequence[ChangeOnset]) -> ChangeOnset | None:
    """The first update, where many left while everything else still stood, or where nothing else left at all; or one that left by
    more than agreeing gradients can move it."""
    updates = [one for one in seen.departures if one.family == "update"]
    if not updates or not moved:
        return updates[0] if updates else None
    # A site measured seldom may have left as early as the step after its last measurement.
    earliest = min(one.since for one in moved)
    early = [one for one in updates if one.step <= earliest]
    far = [one for one in early if one.jump >= _OF_ADAM and seen.gradients]
    return early[0] if len(early) >= max(2.0, _MANY * seen.gradients) else next(iter(far), None)


def _as_executed(several: Sequence[ChangeOnset]) -> list[ChangeOnset]:
    return sorted(several, key=lambda one: (one.order, -one.sigmas))


def _strong(several: Sequence[ChangeOnset]) -> list[ChangeOnset]:
    """The departures without the echoes of the largest."""
    most = max((min(one.ratio, 1e4) for one in several), default=1.0)
    least = min(most**_ECHO, 4.0)
    return [one for one in several if one.ratio >= least]


def _at(one: ChangeOnset) -> Suspect:
    cause = one.family if one.family in FORWARD else "gradient"
    return Suspect(cause=cause, site=one.name, step=one.step, departure=one)


def _lasts(one: ChangeOnset, episode: Episode) -> bool:
    """Whether it was still out after the first step out, so that the state moved and not one batch."""
    return one.until > max(one.step, episode.onset) or not math.isfinite(one.ratio)
