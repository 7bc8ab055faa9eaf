"""What to try after a diagnosis, in one line: the thing, the reason, and the command where the run is one that can be replayed.

``glm replay`` runs an event again from before it with one thing changed, so whether an advice helps is a matter of minutes. The
advice is the field's: PaLM left batches out (2204.02311, section 5.1), OPT-175B lowered rate and clipping bound (2205.01068,
section 2.5), ViT-22B normed queries and keys (2302.05442), Gemma 2 capped scores (2408.00118), StableAdamW bounds updates where v
lags behind (2304.13013).
"""

from __future__ import annotations

from stabilitylab.runs import Run
from stabilitylab.spikes.suspects import Suspect

_TRY = {
    "learning-rate": (
        "go back to the rate before the jump, or warm up to the new one",
        "--responder.policy lower-rate",
    ),
    "batch": ("leave this batch out: from another state it may do no harm", "--responder.policy skip-batch"),
    "attention": (
        "norm queries and keys or cap the scores, so that they cannot grow",
        "--model.attention.soft-cap 30 --model.attention.softmax fp32",
    ),
    "activation": (
        "lower the rate from before it, and look at this layer's norm and weights",
        "--responder.policy lower-rate",
    ),
    "gradient": ("clip gradients, so that one tensor cannot set the step", "--optimizer.clip 0.3"),
    "overflow": ("run this layer in a wider format, or bound its inputs", "--precision bf16"),
    "unknown": ("measure more closely: every=1, or a recorder of some 64 steps", ""),
}
_OUTSIDE = {
    "parameter-changed": (
        "find what writes to it between steps (loading, averaging, a hook, memory), and go back to before it: no update did this"
    ),
    "moments-changed": "keep the optimizer's state when resuming, or warm the rate up again after it was lost",
    "optimizer-changed": "put the setting back, or change it over some hundred steps",
}


def advice(run: Run, suspect: Suspect, number: int | None) -> str:
    """One line of what to try.

    Args:
        number: of the event, as ``stabilitylab spikes`` lists it; None for one that is not listed.
    """
    if suspect.event is not None and suspect.event.kind in _OUTSIDE:
        return f"Try: {_OUTSIDE[suspect.event.kind]}."
    if suspect.cause == "optimizer":
        return (
            "Try: bound each tensor's update by its own second moment (StableAdamW), or a smaller beta2."
            + _command(run, number, "--optimizer.update-clipping")
        )
    what, flags = _TRY[suspect.cause]
    return f"Try: {what}." + _command(run, number, flags)


def _command(run: Run, number: int | None, flags: str) -> str:
    """Runs of ``glm train`` can be replayed, as their configuration shows; others say what to change alone."""
    if not flags or number is None or "responder" not in run.config:
        return ""
    return f" To see whether it helps: glm replay {run.path.name} --event {number} {flags}."
