"""A plan's figures beside those of every single scheme, as rows of text for terminal and page."""

from __future__ import annotations

from collections.abc import Container

from torch import nn

from stabilitylab.quantization.latency import KEPT
from stabilitylab.quantization.plan import PlanFigures, QuantizationPlan

_MOST = 0.98  # share of a model's numbers: the rest are norms and biases


def outcome_rows(plan: QuantizationPlan) -> list[list[str]]:
    """Name, megabytes, share of 16-bit bytes, milliseconds a batch, loss (~ where it is a sum of harms); each scheme, the plan."""
    whole = plan.singles[KEPT].bytes
    rows = [
        _row(name if name != KEPT else "as it is", outcome, whole, plan)
        for name, outcome in sorted(plan.singles.items(), key=lambda item: (item[0] != KEPT, item[1].loss))
    ]
    return [*rows, _row("the plan", plan.planned, whole, plan)]


def whole_model(
    module: nn.Module, layers: Container[str], planned: PlanFigures, kept: PlanFigures
) -> tuple[str, ...]:
    """A note on the plan's share of the whole model, where embeddings and the like are a part worth telling.

    Args:
        module: the model.
        layers: paths that are planned.
        planned, kept: figures of the plan, and of its layers as they are.
    """
    sizes = {name: p.numel() for name, p in module.named_parameters()}
    numbers, inside = sum(sizes.values()), kept.bytes // 2
    others = [name for name in sizes if name.rpartition(".")[0] not in layers]
    if not others or inside >= _MOST * numbers:
        return ()
    largest = max(others, key=lambda name: sizes[name])
    share = (planned.bytes + 2 * (numbers - inside)) / (2 * numbers)
    return (
        f"shares are of the planned layers, which hold {inside / numbers:.0%} of the model's numbers; the others, {largest} the "
        f"largest, stay in 16 bits: of the whole model's 16-bit bytes the plan takes {share:.3f}",
    )


def _row(name: str, outcome: PlanFigures, whole: int, plan: QuantizationPlan) -> list[str]:
    return [
        name,
        f"{outcome.bytes / 1e6:,.2f}",
        f"{outcome.bytes / whole:.3f}",
        *(f"{1e3 * seconds:.2f}" for seconds in outcome.seconds.values()),
        ("" if outcome.verified else "~")
        + (f"{outcome.loss:+.4f}" if plan.criterion == "loss" else f"{outcome.loss:.4f}"),
    ]
