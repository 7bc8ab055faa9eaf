"""``glm generate``, ``glm evaluate``, ``glm export``: using a trained model.

Results go to standard output, their speed to standard error.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from glm.device import chosen_device
from glm.inference.decoding import DecodingConfig, Timing
from glm.inference.evaluation import EvaluationPart, evaluate_model
from glm.inference.generation import fill
from glm.inference.loading import OpenedModel, open_model
from glm.inference.model_export import export_model
from glm.inference.multiple_choice import Normalise
from glm.inference.quantized_model import is_quantized, open_quantized
from glm.precision.policy import Precision

ModelPath = Annotated[Path, tyro.conf.Positional]


def export(model: ModelPath, *, out: Path, precision: Precision = "fp32") -> int:
    """Write everything that using a model takes to one folder: weights as safetensors, tokenizer, configuration.

    Args:
        model: a run (its newest checkpoint), or a checkpoint in it.
        out: folder to make.
        precision: format of the weights; fp32 keeps every bit.
    """
    weights = export_model(model, out, precision)
    print(f"export: {weights:,} weights in {precision}: {out}")
    return 0


def generate(
    model: ModelPath,
    *,
    prompt: str,
    method: Literal["greedy", "top-p", "beam"] = "greedy",
    tokens: int = 64,
    temperature: float = 1.0,
    top_p: float = 0.9,
    top_k: int = 0,
    seed: int = 0,
    beams: int = 4,
    length_penalty: float = 0.6,
    quantize: str | None = None,
    precision: Precision | None = None,
    device: str | None = None,
    json_output: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> int:
    """Fill the [MASK]s of a text, or continue a text that has none or ends in [gMASK].

    Args:
        model: a run, a checkpoint in it, or an export.
        prompt: the text.
        method: greedy: the most probable token; top-p: draw from the most probable ones; beam: search for the most probable text.
        tokens: generate at most this many for each blank.
        temperature: above 1 more varied, below 1 less (top-p).
        top_p: draw from the most probable tokens that together have this probability.
        top_k: draw from at most this many of them; 0: no bound.
        seed: seed of the draws.
        beams: number of texts that beam search extends together.
        length_penalty: exponent of beam search's penalty: 0 finds the most probable text, larger values longer ones.
        quantize: int8, int4, or a plan of `stabilitylab quantize`; quantizes the weights of linear layers one by one while reading.
        precision: format of weights and products; by default as stored.
        device: "cpu", "cuda", ...; by default cuda where there is one.
        json_output: print one JSON object instead of the text.
    """
    decoding = DecodingConfig(
        method=method,
        tokens=tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        beams=beams,
        length_penalty=length_penalty,
    )
    filled = fill(_open(model, quantize, precision, device), prompt, decoding)
    if json_output:
        print(json.dumps({"prompt": prompt, **asdict(filled)}, ensure_ascii=False))
        return 0
    print(filled.text)
    Console(stderr=True, soft_wrap=True, highlight=False).print(_said(filled.timing))
    return 0


def evaluate(
    model: ModelPath,
    *,
    data: Path,
    parts: tuple[EvaluationPart, ...] | None = None,
    rows: int = 64,
    examples: int | None = None,
    normalise: Normalise = "length",
    tasks: tuple[Path, ...] = (),
    quantize: str | None = None,
    precision: Precision | None = None,
    device: str | None = None,
    json_output: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> int:
    """Held-out perplexity, last words of sentences, and zero-shot tasks by multiple choice, in each language.

    Args:
        model: a run, a checkpoint in it, or an export.
        data: folder made by `glm shards` with the model's tokenizer; its held-out split is used.
        parts: what to measure; by default everything that the data allows.
        rows: held-out rows for each perplexity.
        examples: at most this many of each task and language; by default all of a task, and 1,000 sentences for last words.
        normalise: compare answers by log-probability per token (length), as it is (none), or by what the prompt adds to it (prior).
        tasks: .jsonl files of your own instead of the folder's tasks, each with its .jinja template beside it.
        quantize: int8, int4, or a plan of `stabilitylab quantize`; quantizes the weights of linear layers one by one while reading.
        precision: format of weights and products; by default as stored.
        device: "cpu", "cuda", ...; by default cuda where there is one.
        json_output: print one JSON object instead of tables.
    """
    found = evaluate_model(
        _open(model, quantize, precision, device),
        model,
        data,
        parts=parts,
        rows=rows,
        examples=examples,
        normalise=normalise,
        task_files=tasks,
    )
    if json_output:
        print(found.to_json())
    else:
        found.show(Console())
    return 0


def _open(model: Path, quantize: str | None, precision: Precision | None, device: str | None) -> OpenedModel:
    if quantize is not None or is_quantized(model):
        return open_quantized(model, quantize, precision=precision, device=chosen_device(device))
    return open_model(model, precision=precision, device=chosen_device(device))


def _said(timing: Timing) -> str:
    read = timing.prefill_tokens / max(timing.prefill_seconds, 1e-9)
    said = f"read {timing.prefill_tokens:,} tokens at {read:,.0f} tokens/s"
    if timing.decode_tokens:
        made = timing.decode_tokens / timing.decode_seconds
        said += f", generated {timing.decode_tokens:,} at {made:,.0f} tokens/s"
    return said
