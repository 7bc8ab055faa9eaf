"""A diagnosis in sentences: the first suspect, what moved and in which order, what to try."""

from __future__ import annotations

import math
from collections.abc import Iterator

from stabilitylab.spikes.change_onsets import LEAST_VALUES, ChangeOnset
from stabilitylab.spikes.diagnosis import Diagnosis
from stabilitylab.spikes.episodes import Episode

_CAUSES = {
    "parameter": "a parameter changed from outside",
    "optimizer": "the optimizer's state",
    "learning-rate": "the learning rate",
    "overflow": "an overflow of the number format",
    "batch": "the batch",
    "attention": "attention scores",
    "activation": "activations",
    "gradient": "a gradient",
    "unknown": "not visible in what was measured",
}
_NOUNS = {
    "attention": "The attention score maximum of",
    "activation": "The activation maximum of",
    "activation_gradient": "The activation gradient of",
    "gradient": "The gradient of",
    "update": "The update of",
}


def sentences(one: Diagnosis) -> list[str]:
    """The findings for a reader; the first three sentences make sense alone."""
    return [
        *_suspect(one),
        *_order(one),
        *_numbers(one),
        *([one.advice] if one.advice else []),
        *_documents(one),
    ]


def _suspect(one: Diagnosis) -> Iterator[str]:
    episode = one.episode
    if episode.height is None:
        height = ""
    elif episode.kind in ("site-departure", "parameter-changed", "moments-changed"):
        height = f", {_times(math.exp(min(episode.height, 700.0)))}"
    else:
        height = f", {episode.height:.3g} high"
    where = ""
    if one.site is not None and one.cause not in ("batch", "learning-rate"):
        where = f", {one.site}" + (f" in the stack {one.stack}" if one.stack else "")
    yield f"{episode.kind} at step {episode.onset}{height}. First suspect: {_CAUSES[one.cause]}{where}."
    if one.outside is not None:
        yield _outside(one)
    if one.disturbs:
        first, *furthest = one.disturbs
        said = f"It disturbs {_lower(_what(first))} first ({_times(first.ratio)})"
        yield (
            said + "".join(f", {_lower(_what(most))} most ({_times(most.ratio)})" for most in furthest) + "."
        )
    if one.learning_rate_change is not None:
        step, factor = one.learning_rate_change
        yield f"The learning rate was multiplied by {factor:.3g} at step {step}, {_ago(step, episode)}."
    if (climb := one.learning_rate_climb) is not None:
        yield (
            f"The learning rate had risen from {climb.low:.3g} at step {climb.since} to {climb.high:.3g} at step {climb.step} "
            f"({_times(climb.high / climb.low)}), past all that the run had borne; no site left by a jump."
        )


def _outside(one: Diagnosis) -> str:
    told = one.outside or {}
    step = int(told["step"])
    if told["kind"] == "optimizer-changed":
        return f"{told['setting']} went from {told['before']} to {told['after']} at step {step}, {_ago(step, one.episode)}."
    several = f" and of {told['count'] - 1} others of {told['of']}" if told.get("count", 1) > 1 else ""
    factor = told.get("factor")
    times = f" (its norm {_times(factor)})" if isinstance(factor, (int, float)) else " (not finite now)"
    if told["kind"] == "moments-changed":
        return f"Adam's second moment of {told['site']}{several} fell by more than a step can do, at step {step}{times}."
    return f"Between two steps, before step {step}, the weights of {told['site']}{several} moved without an update{times}."


def _order(one: Diagnosis) -> Iterator[str]:
    if not one.departures:
        if 0 < one.measurements < LEAST_VALUES:
            yield (
                f"Layers were measured {one.measurements} times in the 128 steps before the onset: too seldom to say what "
                "is usual. Measure more often (every=), or give the monitor a recorder."
            )
        elif one.measurements == 0:
            yield "No site that was measured left its baseline: layers were not measured before the onset."
        elif one.cause == "batch" and one.episode.kind != "hard-batch":
            yield "The loss rose in one step while every site that was measured stayed where it was: other data, the same state."
        else:
            yield "No site that was measured left its baseline around the onset."
        return
    first = one.departures[0]
    if one.site is not None:
        first = next((d for d in one.departures if d.name == one.site), first)
    others = [d for d in one.departures if d is not first]
    ago = f"at step {first.step}, {_ago(first.step, one.episode)}"
    every = one.resolution or max(1, first.step - first.since)
    often = "every step" if every == 1 else f"every {every} steps"
    seen = f"{_times(first.ratio)}, {first.sigmas:.0f} deviations; measured {often}"
    together = bool(others) and all(d.step == first.step for d in others)
    listed = "; ".join(f"{_lower(_what(d))} ({_times(d.ratio)})" for d in others[:3])
    if together and one.cause == "batch":
        yield f"{_what(first)} left its baseline {ago} ({seen}), together with the others: {listed}."
    elif together:
        yield f"{_what(first)} left its baseline first, in the order of execution, {ago} ({seen})."
        yield f"In that same step: {listed}."
    else:
        yield f"{_what(first)} left its baseline first, {ago} ({seen})."
        if others:
            yield (
                "Then: "
                + "; ".join(f"{_lower(_what(d))} at step {d.step} ({_times(d.ratio)})" for d in others[:3])
                + "."
            )


def _numbers(one: Diagnosis) -> Iterator[str]:
    if one.embedding_share is not None:
        now, usual = one.embedding_share
        if max(now, usual) >= 0.01:
            yield f"The embedding's share of the squared gradient norm was {now:.2g} (usually {usual:.2g})."
    if one.overflow is not None:
        step, where = one.overflow
        yield f"Numbers first left the format at step {step}, in the {where}."
    if one.loss_scale is not None:
        before, lowest = one.loss_scale
        yield (
            f"The loss scale was {before:g} at the onset and fell to {lowest:g}."
            if lowest < before
            else f"The loss scale stayed at {before:g}."
        )


def _documents(one: Diagnosis) -> Iterator[str]:
    for step, documents in one.batches.items():
        shown = "; ".join(documents[:4]) + ("; ..." if len(documents) > 4 else "")
        yield f"Batch of step {step}: {shown}."


def _what(one: ChangeOnset) -> str:
    return f"{_NOUNS[one.family]} {one.name}"


def _lower(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]


def _ago(step: int, episode: Episode) -> str:
    lead = episode.onset - step
    if lead == 0:
        return "in the step of the onset"
    steps = f"{abs(lead)} step{'s' if abs(lead) != 1 else ''}"
    return f"{steps} before the onset" if lead > 0 else f"{steps} after the onset"


def _times(ratio: float) -> str:
    return "not finite" if not math.isfinite(ratio) else f"x {ratio:.3g}"
