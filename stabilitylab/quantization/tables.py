"""A plan's figures beside those of every single scheme, as rows of text for terminal and page."""

from __future__ import annotations

from stabilitylab.quantization.latency import KEPT
from stabilitylab.quantization.plan import Outcome, QuantizationPlan


def outcome_rows(plan: QuantizationPlan) -> list[list[str]]:
    """Name, megabytes, share of 16-bit bytes, milliseconds a batch, loss (~ where it is a sum of harms); each scheme, the plan."""
    whole = plan.singles[KEPT].bytes
    rows = [
        _row(name if name != KEPT else "as it is", outcome, whole, plan)
        for name, outcome in sorted(plan.singles.items(), key=lambda item: (item[0] != KEPT, item[1].loss))
    ]
    return [*rows, _row("the plan", plan.planned, whole, plan)]


def _row(name: str, outcome: Outcome, whole: int, plan: QuantizationPlan) -> list[str]:
    return [
        name,
        f"{outcome.bytes / 1e6:,.2f}",
        f"{outcome.bytes / whole:.3f}",
        *(f"{1e3 * seconds:.2f}" for seconds in outcome.seconds.values()),
        ("" if outcome.verified else "~")
        + (f"{outcome.loss:+.4f}" if plan.criterion == "loss" else f"{outcome.loss:.4f}"),
    ]
