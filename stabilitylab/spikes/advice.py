"""What to try after a diagnosis, in one line: the change, the reason, and the command where ``glm replay`` can repeat the run.

``glm replay`` trains again from before an event with one thing changed, so it takes minutes to see whether advice helps. The advice
comes from the literature: PaLM skipped batches (2204.02311, section 5.1), OPT-175B lowered the rate and the clipping bound
(2205.01068, section 2.5), ViT-22B normed queries and keys (2302.05442), Gemma 2 capped scores (2408.00118), StableAdamW bounds
updates where v lags behind (2304.13013). Where recorded runs tried the same, the line says how often it helped
(``treatment_outcomes.py``).
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stabilitylab.runs import Run
from stabilitylab.spikes.suspects import Suspect
from stabilitylab.spikes.treatment_outcomes import TRIED, record_of

_TRY = {
    "learning-rate": (
        "go back to the last stable rate, or warm up to the new one more slowly",
        "--responder.policy lower-rate",
    ),
    "batch": ("skip this batch: from another state it may do no harm", "--responder.policy skip-batch"),
    "attention": (
        "norm queries and keys or cap the scores, so that they cannot grow",
        "--model.attention.soft-cap 30 --model.attention.softmax fp32",
    ),
    "activation": (
        "lower the rate from a state before it, and look at this layer's norm and weights",
        "--responder.policy lower-rate",
    ),
    "gradient": ("clip gradients, so that one tensor cannot set the step", "--optimizer.clip 0.3"),
    "overflow": ("run this layer in a wider format, or bound its inputs", "--precision bf16"),
    "unknown": ("measure more closely: every=1, or a recorder of some 64 steps", ""),
}
OF_OPTIMIZER = "--optimizer.update-clipping"
_OUTSIDE = {
    "parameter-changed": (
        "find what writes to it between steps (loading, averaging, a hook, memory), and go back to a state before it: "
        "no update did this"
    ),
    "moments-changed": "keep the optimizer's state when resuming, or warm the rate up again after it was lost",
    "optimizer-changed": "restore the setting, or change it over several hundred steps",
}


# What to try for a cause, under an outcome's name for it.
_TREATMENT = {
    "learning-rate": "lower-rate",
    "batch": "skip-batch",
    "attention": "soft-cap",
    "activation": "lower-rate",
    "gradient": "clip",
    "overflow": "precision",
    "optimizer": "update-clipping",
}


def advice(run: Run, suspect: Suspect, number: int | None) -> str:
    """One line of what to try.

    Args:
        number: of the event in the list of ``stabilitylab spikes``; None for one that is not listed.
    """
    if suspect.event is not None and suspect.event.kind in _OUTSIDE:
        return f"Try: {_OUTSIDE[suspect.event.kind]}."
    if suspect.cause == "optimizer":
        said = (
            "Try: bound each tensor's update by its own second moment (StableAdamW), or a smaller beta2."
            + command(run, number, OF_OPTIMIZER)
        )
    else:
        what, flags = _TRY[suspect.cause]
        said = f"Try: {what}." + command(run, number, flags)
    return said + _record(run, suspect.cause)


def told_now(run: Run, diagnosis: Mapping[str, Any]) -> list[str]:
    """The sentences of a recorded diagnosis, with its advice brought up to date (replays may have run since) and the run's path as
    seen from here."""
    sentences = [str(one) for one in diagnosis["sentences"]]
    line = diagnosis.get("advice")
    if not line or line not in sentences or diagnosis.get("outside") is not None:
        return sentences
    advised, replay, rest = line.partition(f" {TRIED}")[0].partition("glm replay ")
    if replay:
        advised = f"{advised}{replay}{_place(run)} --event{rest.partition(' --event')[2]}"
    fresh = advised + _record(run, str(diagnosis["cause"]))
    return [fresh if one == line else one for one in sentences]


def _record(run: Run, cause: str) -> str:
    treatment = _TREATMENT.get(cause)
    return record_of(run, treatment) if treatment is not None else ""


def command(run: Run, number: int | None, flags: str) -> str:
    """The replay command for a run of ``glm train``, known by its configuration; for others, only what to change."""
    if not flags or number is None or "responder" not in run.config:
        return ""
    return f" To see whether it helps: `glm replay {_place(run)} --event {number} {flags}`."


def _place(run: Run) -> str:
    """The run's path, relative to the current folder if it lies in it."""
    here, there = Path.cwd(), run.path.resolve()
    return shlex.quote(str(there.relative_to(here) if there.is_relative_to(here) else there))
