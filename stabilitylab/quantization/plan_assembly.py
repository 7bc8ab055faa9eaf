"""The plan as it is stored: every layer's decision and its reason, what the plan leaves out and why, and all numbers behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

from torch import nn

from stabilitylab.model_structure import token_embeddings
from stabilitylab.models import TextModel, linear_layers
from stabilitylab.quantization.latency import KEPT, Latencies, machine
from stabilitylab.quantization.plan import Budget, PlannedLayer, QuantizationPlan
from stabilitylab.quantization.plan_search import Advice, reason
from stabilitylab.quantization.ranges import Inputs
from stabilitylab.quantization.replacement import quantizable_layers
from stabilitylab.quantization.rounded_weights import RoundedWeights
from stabilitylab.quantization.scheme import Scheme
from stabilitylab.quantization.schemes import scheme_of
from stabilitylab.quantization.sensitivity import LayerSensitivity
from stabilitylab.quantization.text_checks import tokenizer_mark
from stabilitylab.quantization.vocabulary import EmbeddingMatrix


def assembled_plan(
    model: TextModel,
    budget: Budget,
    sensitivity: Sequence[LayerSensitivity],
    latencies: Latencies,
    advice: Advice,
    inputs: Inputs,
    *,
    loss: float | None,
    tokens: tuple[int, int],
    told_tokens: int,
    notes: Sequence[str],
    rounded: RoundedWeights | None,
    cache: Mapping[str, Any] | None,
    matrices: Mapping[str, EmbeddingMatrix],
    embeddings: bool,
) -> QuantizationPlan:
    """Assemble the plan.

    Args:
        model: the plan's.
        budget: what the user asked for.
        sensitivity, latencies: measured.
        advice: decisions, and their outcomes on the third text.
        inputs: what entered the layers.
        loss: the unchanged model's loss on that text; None for encoders.
        tokens, told_tokens: how many the first and the second text have, and the third.
        notes: what a reader must know.
        rounded: weights that were rounded for their inputs.
        cache: costs of keys and values in few bits.
        matrices: the planned embeddings.
        embeddings: whether embeddings were to be planned.
    """
    criterion: Literal["loss", "output error"] = "loss" if model.predicts else "output error"
    layers, kept = {}, {}
    for layer in sensitivity:
        name = advice.assignment[layer.path]
        scheme = None if name == KEPT else scheme_of(name)
        told = layer
        if layer.path in matrices:
            meant = {one: matrices[layer.path].scheme(scheme_of(one)) for one in layer.effects}
            told = replace(
                layer, effects={to.name: layer.effects[one] for one, to in meant.items() if to is not None}
            )
            scheme = None if scheme is None else meant[name]
        smooth = isinstance(scheme, Scheme) and scheme.smooth is not None
        layers[layer.path] = PlannedLayer(
            scheme=None if scheme is None else scheme.name,
            reason=reason(told, KEPT if scheme is None else scheme.name, criterion),
            smooth=inputs.largest[layer.path].tolist() if smooth else None,
        )
    own = quantizable_layers(model.module)
    planned = layers.keys() | {place for layer in sensitivity for place in layer.also}
    for path in {**token_embeddings(model.module), **linear_layers(model.module)}:
        if path not in planned:
            kept[path] = f"left as it is: {_why_kept(path, own, inputs, embeddings)}"
    return QuantizationPlan(
        model=model.name,
        fingerprint=model.fingerprint,
        criterion=criterion,
        loss=loss,
        budget=budget,
        tokens=tokens,
        told_tokens=told_tokens,
        machine=machine(),
        layers=layers,
        kept=kept,
        planned=advice.planned,
        singles=advice.singles,
        notes=notes,
        sensitivity={
            layer.path: {
                "shape": layer.shape,
                "range": asdict(layer.range),
                "effects": {name: asdict(effect) for name, effect in layer.effects.items()},
            }
            for layer in sensitivity
        },
        latency={f"{shape[0]}x{shape[1]}": times for shape, times in latencies.items()},
        rounded=None if rounded is None or not rounded.folder.is_dir() else str(rounded.folder),
        cache=cache,
        tokenizer=tokenizer_mark(model),
    )


def _why_kept(path: str, own: Mapping[str, nn.Module], inputs: Inputs, planned: bool) -> str:
    if path in own:
        return (
            "the output does not depend on it"
            if path in inputs.largest
            else "nothing calls it on this text (where a module reads a weight itself, no other can stand there)"
        )
    if not planned:
        return "an embedding, or tied to one: embeddings are not planned"
    return "the model reads its weight itself, or does not run on token numbers alone: no other matrix can stand there"
