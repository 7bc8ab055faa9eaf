"""Makes a plan: measures layers, chooses a scheme for each, verifies whole plans, and reports the outcome on a separate text.

first text     what enters each layer, what each scheme does to it     ``measured_layers``, ``measured_ends``
second text    the loss of whole plans, by which one is chosen         ``Advisor``, ``Verification``
third text     the outcome that the plan tells: chosen for its loss on the second, it looks better there than it is
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from stabilitylab.errors import InputError
from stabilitylab.models import TextModel, Window
from stabilitylab.models.fused_experts import expert_groups
from stabilitylab.quantization.calibrated import needs_moments
from stabilitylab.quantization.kv_cache import CacheBudget, cache_plan, require_cache
from stabilitylab.quantization.latency import BATCHES, KEPT, measure_latencies
from stabilitylab.quantization.plan import Budget, QuantizationPlan
from stabilitylab.quantization.plan_assembly import assembled_plan
from stabilitylab.quantization.plan_search import Advice, Advisor, most_verified
from stabilitylab.quantization.ranges import layer_inputs
from stabilitylab.quantization.replacement import quantizable_layers
from stabilitylab.quantization.rounded_weights import RoundedWeights
from stabilitylab.quantization.schemes import LinearScheme, scheme_of
from stabilitylab.quantization.sensitivity_pass import By, begun, measured_layers
from stabilitylab.quantization.tables import whole_model
from stabilitylab.quantization.text_checks import text_notes
from stabilitylab.quantization.time_left import Pace
from stabilitylab.quantization.verification import Twins, Verification, block_count
from stabilitylab.quantization.vocabulary import EmbeddingMatrix, embedding_matrices
from stabilitylab.quantization.vocabulary_sensitivity import Ends, measured_ends, output_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """Windows of a text's three parts; a short text has no third, or no second."""

    first: list[Window]
    second: list[Window]
    third: list[Window]

    @property
    def verifying(self) -> list[Window]:
        """Where whole plans are measured."""
        return self.second or self.first


def make_plan(
    model: TextModel,
    text: Path,
    budget: Budget,
    schemes: Sequence[LinearScheme],
    *,
    tokens: int = 512,
    verify_tokens: int = 4096,
    length: int | None = None,
    by: By = "gradients",
    work: Path | None = None,
    cache: CacheBudget | None = None,
    embeddings: bool = True,
    console: Console | None = None,
) -> QuantizationPlan:
    """Measure, choose, verify.

    Args:
        model: unchanged afterwards.
        text: UTF-8 file.
        budget: what the plan may spend.
        schemes: the schemes to choose from.
        tokens: tokens of the text on which to measure every layer and scheme.
        verify_tokens: tokens of the text after those, on which to verify whole plans; as many again give the reported outcome.
        length: tokens of a window.
        by: how to measure layers' sensitivities: see ``measured_layers``.
        cache: what the KV cache may take; None measures none.
        embeddings: whether to plan them.
        work: the file that the plan will go to; an interrupted pass leaves what it measured next to it, and the next pass resumes
            from that.
        console: where to show progress.

    Raises:
        InputError: the text gives no tokens, no layer can be quantized, or the budget cannot be met.
    """
    console = console or Console(quiet=True)
    if tokens < 1 or verify_tokens < 1:
        raise InputError(f"tokens ({tokens}) and verify-tokens ({verify_tokens}) must be at least 1")
    if work is None and any(needs_moments(scheme) for scheme in schemes):
        raise InputError(
            "schemes that round for their inputs need a place for the rounded weights: give the plan's file"
        )
    if cache is not None:
        require_cache(model)  # before the hours, not after
    texts = _split(model, text, tokens, verify_tokens, length)
    rounded = None if work is None else RoundedWeights(work.with_suffix(".rounded"))
    pace = Pace(console)
    matrices = embedding_matrices(model.module)
    outputs = output_layers(model, matrices)
    matrices = matrices if embeddings else {}
    tied = {path: layer for matrix in matrices.values() for path, layer in matrix.outputs.items()}
    with torch.no_grad():
        inputs = layer_inputs(model, texts.first, quantizable_layers(model.module) | tied)
    outputs = {path: layer for path, layer in outputs.items() if path in inputs.largest}
    so_far = begun(model, texts.first, schemes, work)
    sensitivity, said = measured_layers(
        model,
        texts.first,
        schemes,
        inputs.largest,
        sensitivity=by,
        so_far=so_far,
        rounded=rounded,
        pace=pace,
        apart=outputs,
    )
    schemes = [scheme for scheme in schemes if scheme.name in sensitivity[0].effects]
    first, last = measured_ends(
        Ends(model, texts.first, inputs.largest), matrices, list(outputs), schemes, rounded, pace, so_far
    )
    sensitivity = [*first, *sensitivity, *last]
    if so_far.latencies is None:
        with torch.inference_mode(), pace.of("timing layers"):
            so_far.add_latencies(
                measure_latencies(model.module, inputs.samples, inputs.largest, schemes, batches=BATCHES)
            )
    latencies = so_far.latencies
    assert latencies is not None
    twins = Twins(model.module, inputs.largest, rounded, matrices)
    stretch = pace.of(
        "verifying whole plans, blocks of at most so many", most_verified(budget) * block_count(model)
    )
    with torch.inference_mode(), stretch:
        verification = Verification(model, texts.verifying, twins, so_far.losses(texts.verifying), pace.step)
        advice = Advisor(sensitivity, latencies, verification, expert_groups(model.module)).advise(budget)
        # A plan chosen for its loss on a text looks better there than it is, so another text tells the outcome.
        told = (
            Verification(model, texts.third, twins, so_far.losses(texts.third), pace.step)
            if texts.third
            else verification
        )
        outcome = advice.told_on(told)
    kept = None
    if cache is not None:
        with pace.of("measuring keys and values in few bits"):
            kept = cache_plan(model, texts.verifying, texts.third, cache)
    if rounded is not None:
        _keep_chosen(rounded, advice.assignment, matrices)
    share = whole_model(model.module, advice.assignment, outcome.planned, outcome.singles[KEPT])
    notes = [
        *model.notes,
        *said,
        *share,
        *advice.notes,
        *text_notes(model, text, verification.loss, told.loss),
        *_outcome_notes(texts, budget, advice, outcome),
    ]
    return assembled_plan(
        model,
        budget,
        sensitivity,
        latencies,
        outcome,
        inputs,
        loss=told.loss,
        tokens=(sum(window.tokens for window in texts.first), verification.tokens),
        told_tokens=told.tokens,
        notes=notes,
        rounded=rounded,
        cache=kept,
        matrices=matrices,
        embeddings=embeddings,
    )


def _keep_chosen(
    rounded: RoundedWeights, assignment: Mapping[str, str], matrices: Mapping[str, EmbeddingMatrix]
) -> None:
    """Delete all rounded weights but those that the plan chose."""
    chosen = {path: scheme_of(name) for path, name in assignment.items() if name != KEPT}
    meant = {path: matrices[path].scheme(one) if path in matrices else one for path, one in chosen.items()}
    rounded.keep_only(
        (path, one.name) for path, one in meant.items() if one is not None and needs_moments(one)
    )


def _outcome_notes(texts: Texts, budget: Budget, advice: Advice, outcome: Advice) -> list[str]:
    """How far the text by which the plan was chosen flattered it, or that the text is too short to say."""
    if not texts.second:
        return ["the text ends with the measured part: plans were verified on that same part"]
    if not texts.third:
        return [
            "the text ends with the part on which plans were verified: the outcome is measured on that same part"
        ]
    notes = [
        f"the plan was chosen at {advice.planned.loss:+.4f} on the second text; on the third it is {outcome.planned.loss:+.4f}"
    ]
    if budget.kind == "loss" and outcome.planned.loss > budget.value:
        notes.append(f"on the third text the plan is beyond the {budget.text}: give more --verify-tokens")
    return notes


def _split(model: TextModel, text: Path, tokens: int, verify_tokens: int, length: int | None) -> Texts:
    """Windows to measure on, windows after them to choose by, and windows after those to tell the outcome on."""
    if length is None:
        length = 256 if model.longest is None else min(256, model.longest)
    texts = Texts(first=[], second=[], third=[])
    count = 0
    for window in model.windows(text, length, tokens + 2 * verify_tokens):
        count += window.tokens
        if not texts.first or count <= tokens:
            texts.first.append(window)
        elif not texts.second or count <= tokens + verify_tokens:
            texts.second.append(window)
        else:
            texts.third.append(window)
    return texts
