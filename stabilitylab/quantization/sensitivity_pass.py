"""Sensitivities of all layers, by gradients or by runs; an interrupted pass resumes where it stopped, and says how much time is
left.

    gradients    one pass backward, a rounding and a product for each layer and scheme (estimate.py)
    runs         a run of the model from the layer's block on, for each layer, scheme and window (sensitivity.py)

Where gradients are not available (a model changes tensors in place, or its operators have none), sensitivities come from runs, and
a note says so.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from stabilitylab.errors import InputError
from stabilitylab.models import TextModel, Window, linear_weight
from stabilitylab.quantization.calibrated import needs_moments
from stabilitylab.quantization.estimate import DRAWS, EstimatedLayer, estimate_sensitivity
from stabilitylab.quantization.plan_checkpoint import SoFar, mark_of
from stabilitylab.quantization.rounded_weights import RoundedWeights, dear
from stabilitylab.quantization.schemes import LinearScheme
from stabilitylab.quantization.sensitivity import LayerSensitivity, measure_sensitivity, reached_layers
from stabilitylab.quantization.time_left import Pace

By = Literal["gradients", "runs"]


def layers_file(plan: Path) -> Path:
    """Where an interrupted plan keeps what it measured."""
    return plan.with_suffix(".layers.jsonl")


def begun(
    model: TextModel, windows: Sequence[Window], schemes: Sequence[LinearScheme], work: Path | None
) -> SoFar:
    """What an interrupted plan measured before.

    Args:
        model, windows, schemes: what is measured.
        work: the plan's file; None keeps nothing.
    """
    return SoFar(None if work is None else layers_file(work), mark_of(model, windows, schemes, DRAWS))


def measured_layers(
    model: TextModel,
    windows: Sequence[Window],
    schemes: Sequence[LinearScheme],
    largest: dict[str, Tensor],
    *,
    sensitivity: By,
    so_far: SoFar,
    rounded: RoundedWeights | None,
    pace: Pace,
    apart: Container[str] = (),
) -> tuple[list[LayerSensitivity], list[str]]:
    """Sensitivities of the layers that change the output, and notes. ``apart`` are layers that are measured elsewhere.

    Raises:
        InputError: no layer can be quantized, or none changes the output.
    """
    reached = reached_layers(model.module, largest)
    layers = {path: layer for path, layer in reached.items() if path not in apart}
    notes: list[str] = []
    calibrated = any(needs_moments(scheme) for scheme in schemes)
    found: list[LayerSensitivity] | None = None
    if sensitivity == "gradients" or calibrated:
        try:
            found = _by_gradients(model, windows, schemes, largest, layers, so_far, rounded, pace)
        except RuntimeError as error:
            plain = [scheme for scheme in schemes if not needs_moments(scheme)]
            if not plain:
                raise InputError(
                    f"{model.name} cannot be run block by block with gradients ({_first_line(error)}), which schemes that "
                    "round for their inputs need: leave them out of --schemes"
                ) from error
            without = ", ".join(scheme.name for scheme in schemes if needs_moments(scheme))
            notes.append(
                f"gradients cannot be had of this model ({_first_line(error)}): every layer was measured by runs"
                + (f", without {without}, which need them" if without else "")
            )
            schemes = plain
    if found is None or sensitivity == "runs":
        total = len(layers) * len(windows)
        with torch.inference_mode(), pace.of("measuring every layer under every scheme", total):
            found = measure_sensitivity(
                model,
                windows,
                schemes,
                largest,
                progress=lambda _done, _total: pace.step(),
                rounded=rounded,
                apart=apart,
            )
    found = [layer for layer in found if any(effect.harm or effect.loss for effect in layer.effects.values())]
    if not found:
        raise InputError(
            f"no linear layer of {model.name} changes its output on this text: give another text"
        )
    return found, notes


def _by_gradients(
    model: TextModel,
    windows: Sequence[Window],
    schemes: Sequence[LinearScheme],
    largest: dict[str, Tensor],
    layers: dict[str, nn.Module],
    so_far: SoFar,
    rounded: RoundedWeights | None,
    pace: Pace,
) -> list[LayerSensitivity]:
    known = so_far.known

    def keep(path: str, scheme: LinearScheme, twin: nn.Module) -> None:
        if rounded is not None and dear(scheme):
            rounded.keep(path, scheme, twin, linear_weight(layers[path]))

    def done(layer: EstimatedLayer) -> None:
        so_far.add(layer)
        pace.step()

    with pace.of("measuring every layer under every scheme", len(layers), len(known)):
        return estimate_sensitivity(
            model, windows, schemes, largest, layers, known=known, keep=keep, done=done
        )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
