"""``stabilitylab quantize`` chooses a scheme for every layer from measurements on your text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stabilitylab.command_line.narrow_tables import print_table
from stabilitylab.errors import InputError
from stabilitylab.models import open_text_model
from stabilitylab.quantization.export_forms import held_schemes, holds_embeddings, instead
from stabilitylab.quantization.exports import require_form, require_format, save_as
from stabilitylab.quantization.kv_cache import CacheBudget, cache_lines
from stabilitylab.quantization.latency import BATCHES
from stabilitylab.quantization.plan import Budget, QuantizationPlan, load_plan
from stabilitylab.quantization.plan_making import make_plan
from stabilitylab.quantization.schemes import LinearScheme, scheme_of
from stabilitylab.quantization.sensitivity_pass import By, layers_file
from stabilitylab.quantization.tables import outcome_rows
from stabilitylab.quantization.text_checks import tokenizer_mark

DEFAULT_SCHEMES = (
    "w8a8-token",
    "mixed",
    "smoothquant",
    "int8-row",
    "int4-row",
    "int4-g128",
    "int4-g64-asym-mse",
    "int4-g64-asym-mse-gptqo",
)


def quantize(
    model: Annotated[Path, tyro.conf.Positional],
    *,
    plan: Path,
    text: Path | None = None,
    budget_loss: float | None = None,
    budget_memory: float | None = None,
    budget_bits: float | None = None,
    budget_latency: float | None = None,
    batch: int = 1,
    schemes: tuple[str, ...] = DEFAULT_SCHEMES,
    tokens: int = 512,
    verify_tokens: int = 4096,
    length: int | None = None,
    sensitivity: By = "gradients",
    kv_context: int | None = None,
    budget_kv: float | None = None,
    apply: Path | None = None,
    format: str = "stabilitylab",
    embeddings: bool = True,
    html: Path | None = None,
    json_output: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> int:
    """Choose a quantization scheme for every linear layer of a model, by measuring, and apply it.

    Give at most one budget; without one it is a loss increase of 0.02 nats per token, for encoders an output error of 0.05.

    Args:
        model: a HuggingFace folder, a GGUF file, or a run or checkpoint of an installed package.
        plan: file to write the plan to; without --text, an existing plan to apply.
        text: what to measure on: plain text of the kind that the model is for.
        budget_loss: find the fewest bytes within this loss increase, in nats per token (for encoders, relative output error).
        budget_memory: find the least loss increase within this share of the layers' 16-bit bytes.
        budget_bits: the same budget in bits a weight, scales included: 4.5 is a share of 0.28125.
        budget_latency: find the least loss increase within this share of the unquantized layers' time.
        batch: rows at which --budget-latency counts: 1, 32 or 256.
        schemes: the schemes to choose from.
        tokens: tokens of the text on which to measure every layer and scheme.
        verify_tokens: tokens of the text after those, on which to verify whole plans and choose one; as many again give the
            reported outcome of the chosen plan.
        length: tokens of a window; by default 256, or fewer where the model takes fewer.
        sensitivity: how to measure what the schemes do to a layer: by gradients of the output, in one backward pass for all, or by
            a run of the model for each layer and scheme.
        kv_context: measure a KV cache in few bits too, its bytes at a context of this many tokens; needs --text.
        budget_kv: name the cache format of least loss within this share of the cache's 16-bit bytes.
        apply: folder to write the quantized model to.
        format: format of that folder: stabilitylab, our own; compressed-tensors, which transformers and vLLM open; gguf, for
            llama.cpp and transformers; torchao, its own tensors; or one that you registered.
        embeddings: plan embeddings too, with an output that is tied to them; they stay as they are with --no-embeddings, and in
            a format for linear layers alone.
        html: file to write a report to.
        json_output: print the plan as one JSON object instead of tables.
    """
    require_format(format)
    budget = _budget(budget_loss, budget_memory, budget_bits, budget_latency, batch)
    if kv_context is None and budget_kv is not None:
        raise InputError("--budget-kv is a share of bytes at a context length: give --kv-context too")
    if kv_context is not None and text is None:
        raise InputError("--kv-context needs --text FILE to be measured on")
    chosen = [scheme_of(name) for name in dict.fromkeys(schemes)]
    if not chosen:
        raise InputError("--schemes is empty: name at least one")
    for file in (plan, html, apply):
        if file is not None and not file.parent.is_dir():
            raise InputError(f"cannot write {file}: there is no folder {file.parent}")
    if apply is not None and apply.exists():
        raise InputError(f"{apply} exists already: give another --apply, or remove it")
    existing = _existing(plan, text, budget)
    console = Console(stderr=json_output)
    if apply is not None and existing is None:
        chosen = _menu(format, chosen, given=schemes != DEFAULT_SCHEMES, console=console)
    opened = open_text_model(model, hold=True)
    if apply is not None:
        require_form(format, opened)
    if existing is None:
        assert text is not None
        made = make_plan(
            opened,
            text,
            budget or Budget(kind="loss", value=0.02 if opened.predicts else 0.05),
            chosen,
            tokens=tokens,
            verify_tokens=verify_tokens,
            length=length,
            by=sensitivity,
            work=plan,
            cache=None if kv_context is None else CacheBudget(context=kv_context, share=budget_kv),
            embeddings=embeddings and (apply is None or holds_embeddings(format)),
            console=console,
        )
        made.write(plan)
    else:
        made = existing
        made.require(opened.fingerprint, opened.name, tokenizer_mark(opened))
    show(made, console)
    if json_output:
        print(plan.read_text(encoding="utf-8"), end="")
    if apply is not None:
        size = save_as(format, opened, made, apply)
        console.print(f"written: {apply} ({size / 1e6:.1f} MB of weights)", markup=False, highlight=False)
    if html is not None:
        from stabilitylab.quantization.page import plan_page

        plan_page(made).write(html)
        console.print(f"written: {html}", highlight=False)
    # Keep it until all is written, so that the same command can go on after an interruption.
    layers_file(plan).unlink(missing_ok=True)
    return 0


def show(plan: QuantizationPlan, console: Console) -> None:
    """The plan on a terminal."""
    what = "loss" if plan.criterion == "loss" else "error"
    title = f"{plan.model}: {plan.budget.text}"
    meaning = "increase in nats per token" if plan.criterion == "loss" else "relative, of the output"
    caption = (
        f"share: of 16 bits a weight; ms: one call of every layer, by rows; {what}: {meaning}, verified, or with ~ the sum of the "
        "layers' own"
    )
    table = Table(title=Text(title), title_justify="left", caption=caption, caption_justify="left")
    table.add_column("", no_wrap=True)
    for heading in ("MB", "share", *(f"ms at {batch}" for batch in plan.planned.seconds), what):
        table.add_column(heading, justify="right", min_width=8 if heading == what else None)
    for row in outcome_rows(plan):
        table.add_row(*(Text(cell) for cell in row))
    print_table(console, table)
    for layer_path, layer in plan.layers.items():
        console.print(Text(f"{layer_path}: {layer.reason}"), soft_wrap=True)
    for layer_path, why in plan.kept.items():
        console.print(Text(f"{layer_path}: {why}"), soft_wrap=True)
    if plan.cache is not None:
        for line in cache_lines(plan.cache):
            console.print(Text(line), soft_wrap=True)
    for note in plan.notes:
        console.print(Text(f"note: {note}"), soft_wrap=True)


def _budget(
    loss: float | None, memory: float | None, bits: float | None, latency: float | None, batch: int
) -> Budget | None:
    if batch not in BATCHES:
        raise InputError(f"--batch {batch} is not measured: choose {', '.join(map(str, BATCHES))}")
    asked = {"loss": loss, "memory": memory, "bits": bits, "latency": latency}
    given = {name: value for name, value in asked.items() if value is not None}
    if len(given) > 1:
        names = " and ".join(f"--budget-{name}" for name in given)
        raise InputError(f"{names} cannot both be kept to: give one budget")
    for name, value in given.items():
        if name == "bits":
            return Budget(kind="memory", value=value / 16)
        return Budget(kind=name, value=value, batch=batch)  # type: ignore[arg-type]
    return None


def _menu(
    format: str, schemes: Sequence[LinearScheme], *, given: bool, console: Console
) -> list[LinearScheme]:
    """The schemes that the folder's format can hold. Says before the plan is made, not after, what it leaves out."""
    held, others = held_schemes(format, schemes)
    if others and given:
        raise InputError(
            f"--format {format} has no exact form for {', '.join(others)}: leave them out of --schemes; it has for "
            f"{instead(format)}"
        )
    if others:
        if format == "gguf":
            held.append(scheme_of("int4-g32-mse-gptqo"))
        names = ", ".join(scheme.name for scheme in held)
        console.print(f"of the schemes {format} holds {names}: the plan chooses among these", highlight=False)
    return held


def _existing(plan: Path, text: Path | None, budget: Budget | None) -> QuantizationPlan | None:
    """The plan to apply, where none is to be made."""
    if text is not None:
        # A command that was interrupted after it had written the plan goes on.
        if plan.exists() and not layers_file(plan).exists():
            raise InputError(f"{plan} exists already: give another --plan, or leave out --text to apply it")
        return None
    if not plan.exists():
        raise InputError(f"there is no plan {plan}: give --text FILE to make one")
    if budget is not None:
        raise InputError(f"a budget needs --text FILE to be measured on; without, {plan} is applied as it is")
    return load_plan(plan)
