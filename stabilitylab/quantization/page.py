"""A plan as one HTML page, for someone who never saw the tool: what it proposes, what it costs, and why, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from stabilitylab.figures.palette import COLOURS, INK, colours
from stabilitylab.figures.style import STYLE, WIDTH, log_axis, panel
from stabilitylab.quantization.frontier import frontier
from stabilitylab.quantization.latency import KEPT
from stabilitylab.quantization.plan import QuantizationPlan
from stabilitylab.quantization.tables import outcome_rows
from stabilitylab.report.page import Page, Picture, Section, Table, TableCell


def plan_page(plan: QuantizationPlan) -> Page:
    """The page."""
    what = "loss increase, nats per token" if plan.criterion == "loss" else "relative error of the output"
    planned, whole = plan.planned, plan.singles[KEPT].bytes
    spent = f"{planned.loss:+.4f} nats per token" if plan.criterion == "loss" else f"{planned.loss:.4f}"
    lead = (
        f"Asked for: {plan.budget.text}. The plan stores the {len(plan.layers)} linear layers in {planned.bytes:,} bytes, "
        f"{planned.bytes / whole:.1%} of 16 bits a weight, at a verified {what.split(',')[0]} of {spent}."
    )
    facts = {
        "model": f"{plan.model} ({plan.fingerprint})",
        "measured on": f"{plan.tokens[0]:,} tokens; chosen on {plan.tokens[1]:,}; told on {plan.told_tokens:,} others",
        "machine": plan.machine,
    }
    if plan.loss is not None:
        facts["loss as it is"] = f"{plan.loss:.4f} nats per token"
    return Page(
        title=f"Quantization of {plan.model}",
        lead=lead,
        facts=facts,
        sections=[_before_after(plan, what), _maps(plan), _decisions(plan), _schemes()],
    )


def _before_after(plan: QuantizationPlan, what: str) -> Section:
    batches = [f"ms at batch {batch}" for batch in plan.planned.seconds]
    rows: list[Sequence[TableCell | str]] = [
        [TableCell(text=cell, best=row[0] == "the plan") if at else cell for at, cell in enumerate(row)]
        for row in outcome_rows(plan)
    ]
    text = [
        "Each row is the whole model, all its layers quantized at once, on text that nothing was chosen by. Bytes are of the "
        "layers' weights; times are one call of every layer on the machine above.",
    ]
    best = plan.best_single
    if best is not None:
        name, outcome = best
        unit = " nats per token" if plan.criterion == "loss" else ", relative error of the output"
        text.append(
            f"The best single scheme that takes no more bytes than the plan is {name}: {outcome.loss:+.4f} against the plan's "
            f"{plan.planned.loss:+.4f}{unit}."
        )
    text += [f"Note: {note}." for note in plan.notes]
    table = Table(columns=["", "megabytes", "of 16-bit", *batches, what], rows=rows)
    return Section(
        title="Before and after", text=text, parts=[table, Picture(figure=_trade(plan, what), caption=_TRADE)]
    )


_TRADE = (
    "Down and to the left is better. Points are whole models, as in the table; the line is what other plans are expected to cost, "
    "chosen layer by layer at each number of bytes and not verified. Where it falls steeply, a few more bytes buy much."
)


LINEAR = 1e-3  # smaller losses are all alike


def _trade(plan: QuantizationPlan, what: str) -> Figure:
    """Loss over bytes."""
    with mpl.rc_context(STYLE):
        figure, axes = panel()
        whole = plan.singles[KEPT].bytes
        # Nine points may lie on each other: the legend tells them apart, by colour and by shape.
        for (name, outcome), colour, mark in zip(
            plan.singles.items(), colours(), cycle("osv^<>pX"), strict=False
        ):
            axes.plot(outcome.bytes / whole, outcome.loss, mark, color=colour, label=name, alpha=0.8)
        if len(line := frontier(plan)) > 1:
            shares, losses = zip(*line, strict=True)
            axes.plot(shares, losses, "-", color=INK, linewidth=1, alpha=0.6, label="plans, expected")
        axes.plot(
            plan.planned.bytes / whole, plan.planned.loss, "D", color=INK, markersize=9, label="the plan"
        )
        axes.set_yscale("symlog", linthresh=LINEAR)
        low, high = axes.get_ylim()
        # Within the linear part alone the scale would label its odd ends, one over the other.
        if high < LINEAR:
            axes.set_ylim(min(low, -LINEAR), LINEAR)
        axes.set_xlabel("share of 16-bit bytes")
        axes.set_ylabel(what)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        axes.set_title("What bytes buy")
    return figure


def _maps(plan: QuantizationPlan) -> Section:
    text = [
        "How far each layer's output is off when that layer alone is quantized: the norm of the error over the norm of the "
        "output, on real inputs. A dark cell is a layer that the scheme breaks.",
        "Channels whose largest value is many times that of the median channel are what makes one scale for all of them coarse.",
    ]
    return Section(
        title="Where schemes hurt",
        text=text,
        parts=[
            Picture(figure=_error_map(plan), caption="Layers in the model's order."),
            Picture(figure=_outlier_curve(plan), caption="One dot a layer."),
        ],
    )


def _error_map(plan: QuantizationPlan) -> Figure:
    names = [name for name in plan.singles if name != KEPT]
    errors = np.array(
        [[layer["effects"][name]["error"] for layer in plan.sensitivity.values()] for name in names]
    )
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.8 + 0.22 * len(names)), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(
            np.log10(np.maximum(errors, 1e-4)),
            aspect="auto",
            cmap="Blues",
            vmin=-3,
            vmax=0,
            interpolation="nearest",
        )
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel("layer")
        axes.grid(visible=False)
        bar = figure.colorbar(image, ax=axes, ticks=[-3, -2, -1, 0])
        bar.ax.set_yticklabels(["0.001", "0.01", "0.1", "1"])
        axes.set_title("Relative error of the layer's output")
    return figure


def _outlier_curve(plan: QuantizationPlan) -> Figure:
    ratios = [layer["range"]["ratio"] for layer in plan.sensitivity.values()]
    with mpl.rc_context(STYLE):
        figure, axes = panel(2.2)
        axes.plot(range(len(ratios)), ratios, "o", markersize=3, color=COLOURS[0])
        axes.set_yscale("log")
        log_axis(axes.yaxis)
        axes.set_xlabel("layer")
        axes.set_title("Largest input channel, as a multiple of the median channel")
    return figure


def _decisions(plan: QuantizationPlan) -> Section:
    rows: list[Sequence[TableCell | str]] = []
    for path, layer in plan.layers.items():
        measured = plan.sensitivity[path]
        effect = measured["effects"].get(
            layer.scheme, {"error": 0.0, "bytes": 2 * measured["shape"][0] * measured["shape"][1]}
        )
        rows.append(
            [path, layer.scheme or KEPT, f"{effect['error']:.2g}", f"{effect['bytes']:,}", layer.reason]
        )
    rows += [[path, KEPT, "", "", why] for path, why in plan.kept.items()]
    return Section(
        title="The decision for every layer",
        parts=[Table(columns=["layer", "scheme", "error", "bytes", "because"], rows=rows)],
    )


def _schemes() -> Section:
    text = [
        "w8a8: weights and activations as 8-bit integers, multiplied as such; -tensor has one scale for a whole tensor, -token one "
        "a token and an output channel. mixed leaves input channels that reach 6 in floats and quantizes the rest (LLM.int8()). "
        "smoothquant moves the range of activations into the weights first.",
        "int8 and int4: only the weights are integers, with a scale for each row or each group of 32, 64 or 128 columns; -asym "
        "with zero points, -mse with scales that minimise the squared error. Activations stay as they are.",
        "fp8, mxfp8, mxfp4, nvfp4: weights in a small floating-point format, with scales as its specification has them; after a "
        "slash the activations' format. These are emulated: their errors are true, their times are not those of a machine that "
        "has the format. -had: weights and activations rotated by a Hadamard matrix first, which spreads outliers.",
        "Divergence is how many nats per token the quantized model's predictions are away from the model's own. It adds up over "
        "layers, which is how a plan is composed; that it did is what the verified figures above show.",
    ]
    return Section(title="What the schemes are", text=text)
