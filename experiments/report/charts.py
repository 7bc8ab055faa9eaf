"""Charts of a question's results: the frontier, effects on a common scale, evidence over seeds, survival over steps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from experiments.metrics import Metric
from experiments.results import Results
from experiments.statistics import LEAST_SEEDS, decide
from experiments.statistics.decision import ALPHA
from experiments.statistics.proportions import share_bounds
from experiments.study import Outcome
from experiments.verdicts import Verdict, effect_words, seeds_words
from stabilitylab.charts.look import (
    GRID,
    INK,
    Chart,
    colours,
    hover,
    legend_of,
    number_axis,
    panel,
    step_axis,
    words,
)

TONES = {"supported": "#009E73", "against": "#D55E00", "equivalent": "#0072B2", "undecided": "#999999"}
# The chart draws effects beyond this at the edge, with the number under the pointer.
WIDEST = 6.0
LONGEST = 62


def frontier_chart(results: Results) -> Chart:
    """Share of seeds that survived each rate, by arm, with Clopper and Pearson's 95 % intervals."""
    from bokeh.models import ColumnDataSource, FixedTicker, NumeralTickFormatter, Range1d

    rates = sorted({rate for by_rate in results.alive.values() for rate in by_rate})
    arms = [arm.name for arm in results.arms if arm.name in results.alive]
    made = panel(
        "Share of seeds that survived each peak learning rate",
        x="peak learning rate",
        y="survived",
        height=330,
    )
    made.y_range = Range1d(-0.05, 1.05)
    entries: dict[str, list[Any]] = {}
    apart = min(0.09, 0.6 / max(len(arms), 1))
    for number, (arm, colour) in enumerate(zip(arms, colours(), strict=False)):
        by_rate = results.alive[arm]
        rows: dict[str, list[Any]] = {name: [] for name in ("x", "y", "low", "high", "rate", "arm", "said")}
        for place, rate in enumerate(rates):
            if rate not in by_rate:
                continue
            lived, of = by_rate[rate]
            low, high = share_bounds(lived, of, ALPHA, sequential=False)
            rows["x"].append(place + (number - (len(arms) - 1) / 2) * apart)
            rows["y"].append(lived / of)
            rows["low"].append(low)
            rows["high"].append(high)
            rows["rate"].append(rate_words(rate))
            rows["arm"].append(words(arm))
            rows["said"].append(f"{lived} of {of} [{low:.0%}, {high:.0%}]")
        source = ColumnDataSource(rows)
        bars = made.segment(
            "x", "low", "x", "high", source=source, color=colour, line_width=2, line_alpha=0.35
        )
        line = made.line("x", "y", source=source, color=colour, line_width=2)
        dots = made.scatter("x", "y", source=source, color=colour, size=10)
        hover(made, [dots], [("", "@arm"), ("rate", "@rate"), ("survived", "@said")])
        entries[arm] = [bars, line, dots]
    made.xaxis[0].ticker = FixedTicker(ticks=list(range(len(rates))))
    made.xaxis[0].major_label_overrides = {i: rate_words(rate) for i, rate in enumerate(rates)}
    made.yaxis[0].formatter = NumeralTickFormatter(format="0 %")
    made.xgrid[0].grid_line_color = None
    caption = "Bars are 95 % intervals of the share. Arms stand side by side at each rate; a click on a name hides it."
    return Chart(figure=made, caption=caption, legend=legend_of(entries))


def effects_chart(results: Results) -> Chart:
    """Every claim's effect and interval, turned so that right speaks for the claim, in units of what would matter."""
    from bokeh.models import BoxAnnotation, ColumnDataSource, FixedTicker, Range1d, Span

    shown = [(i, v) for i, v in numbered(results) if v.decision.n]
    columns = ("y", "x", "low", "high", "colour", "claim", "said", "verdict")
    rows: dict[str, list[Any]] = {name: [] for name in columns}
    outside: dict[str, list[Any]] = {"x": [], "y": [], "colour": [], "angle": []}
    for place, (number, verdict) in enumerate(reversed(shown)):
        unit = unit_of(verdict, results.outcomes[verdict.claim.metric])
        sign = 1 if verdict.claim.direction == "more" else -1
        one = verdict.decision
        low, high = sorted((sign * one.low / unit, sign * one.high / unit))
        value = (
            sign * one.effect / unit
            if math.isfinite(one.effect)
            else math.copysign(WIDEST, sign * one.effect)
        )
        colour = TONES[one.verdict]
        rows["y"].append(place)
        rows["x"].append(float(np.clip(value, -WIDEST, WIDEST)))
        rows["low"].append(max(low, -WIDEST))
        rows["high"].append(min(high, WIDEST))
        rows["colour"].append(colour)
        rows["claim"].append(words(f"{number}. {verdict.claim.text}"))
        rows["verdict"].append(f"{one.verdict}, {seeds_words(verdict)} seeds")
        rows["said"].append(words(effect_words(verdict, results.outcomes[verdict.claim.metric])))
        for beyond, side in ((low < -WIDEST, -1.0), (high > WIDEST, 1.0)):
            if beyond:
                outside["x"].append(side * WIDEST)
                outside["y"].append(place)
                outside["colour"].append(colour)
                outside["angle"].append(-side * math.pi / 2)
    made = panel(
        "Effect of each claim, right speaks for it",
        x="effect, in units of the smallest one that would matter",
        height=110 + 34 * max(len(shown), 1),
    )
    made.y_range, made.x_range = Range1d(-0.6, len(shown) - 0.4), Range1d(-WIDEST * 1.06, WIDEST * 1.06)
    made.add_layout(
        BoxAnnotation(
            left=-1,
            right=1,
            fill_color=TONES["equivalent"],
            fill_alpha=0.08,
            level="underlay",
            line_color=None,
        )
    )
    made.add_layout(Span(location=0, dimension="height", line_color=INK, line_width=1))
    source = ColumnDataSource(rows)
    made.segment("low", "y", "high", "y", source=source, color="colour", line_width=3, line_alpha=0.6)
    dots = made.scatter("x", "y", source=source, color="colour", size=10)
    made.scatter(
        "x", "y", source=ColumnDataSource(outside), color="colour", size=9, marker="triangle", angle="angle"
    )
    hover(made, [dots], [("", "@claim"), ("verdict", "@verdict"), ("effect", "@said")])
    made.yaxis[0].ticker = FixedTicker(ticks=list(range(len(shown))))
    made.yaxis[0].major_label_overrides = {i: f"{number}." for i, (number, _) in enumerate(reversed(shown))}
    made.ygrid[0].grid_line_color = GRID
    caption = (
        "The numbers are the claims' own. Green: supported, orange: against, blue: equivalent, grey: undecided. The band holds "
        "what is too small to matter: an interval within it is equivalent. A claim without such a size is in units of the spread "
        "between its seeds. Triangles: the interval goes on."
    )
    return Chart(figure=made, caption=caption)


def evidence_chart(results: Results) -> Chart:
    """E-value of every claim as seeds came in; from 20 on a claim is decided."""
    from bokeh.models import ColumnDataSource, Span

    made = panel(
        "Evidence against no difference, as seeds came in",
        x="seeds",
        y="e-value",
        y_axis_type="log",
        height=300,
    )
    entries: dict[str, list[Any]] = {}
    for (number, verdict), colour in zip(numbered(results), colours(), strict=False):
        seeds, evidence = evidence_of(verdict, results.outcomes[verdict.claim.metric])
        if not seeds:
            continue
        label = f"{number}. {_cut(verdict.claim.text)}"
        source = ColumnDataSource(
            {"x": seeds, "y": np.clip(evidence, 1e-3, 1e9), "claim": [words(verdict.claim.text)] * len(seeds)}
        )
        line = made.line("x", "y", source=source, color=colour, line_width=2)
        dots = made.scatter("x", "y", source=source, color=colour, size=6)
        hover(made, [dots], [("", "@claim"), ("seeds", "@x"), ("e-value", "@y{0,0.[00]}")])
        entries[label] = [line, dots]
    made.add_layout(Span(location=1 / ALPHA, dimension="width", line_color=INK, line_dash="dashed"))
    number_axis(made.yaxis[0])
    step_axis(made.xaxis[0])
    caption = "20 (dashed) decides at 5 %, however often one has looked. Equivalence is decided by the interval, not by this."
    return Chart(figure=made, caption=caption, legend=legend_of(entries))


def alive_chart(results: Results, rate: float | None) -> Chart:
    """Share of an arm's runs at a rate with unbroken loss, over the steps."""
    from bokeh.models import ColumnDataSource, NumeralTickFormatter, Range1d

    at = "" if rate is None else f" at a rate of {rate_words(rate)}"
    made = panel(f"Share of runs still on course{at}", y="on course", height=260)
    made.y_range = Range1d(-0.03, 1.05)
    entries: dict[str, list[Any]] = {}
    runs = [one for one in results.runs if one.rate == rate]
    end = max((one.length for one in runs), default=0)
    for arm, colour in zip(results.arms, colours(), strict=False):
        own = [one for one in runs if one.arm == arm.name]
        if not own:
            continue
        breaks = sorted(one.broke for one in own if one.broke is not None)
        steps = [0, *breaks, end]
        share = [1 - min(i, len(breaks)) / len(own) for i in range(len(steps))]
        share[-1] = share[-2]
        source = ColumnDataSource({"x": steps, "y": share, "arm": [words(arm.name)] * len(steps)})
        line = made.step("x", "y", source=source, mode="after", color=colour, line_width=2)
        dots = made.scatter("x", "y", source=source, color=colour, size=5)
        hover(made, [dots], [("", "@arm"), ("step", "@x"), ("on course", "@y{0 %}")])
        entries[arm.name] = [line, dots]
    made.yaxis[0].formatter = NumeralTickFormatter(format="0 %")
    return Chart(figure=made, legend=legend_of(entries))


def numbered(results: Results) -> list[tuple[int, Verdict]]:
    """The verdicts, decided ones first, numbered for a reader."""
    order = ("supported", "against", "equivalent", "undecided")
    ranked = sorted(results.verdicts, key=lambda one: (order.index(one.judgement), not one.decision.n))
    return list(enumerate(ranked, 1))


def telling_rate(results: Results) -> float | None:
    """The rate at which the arms' survival differs most, the lowest of several. None: no rates."""
    rates = sorted({rate for by_rate in results.alive.values() for rate in by_rate})

    def spread(rate: float) -> float:
        shares = [
            lived / of
            for by_rate in results.alive.values()
            for lived, of in [by_rate.get(rate, (0, 0))]
            if of
        ]
        return max(shares) - min(shares)

    return max(rates, key=lambda rate: (spread(rate), -rate)) if rates else None


def evidence_of(verdict: Verdict, outcome: Metric | Outcome) -> tuple[list[int], list[float]]:
    """Seeds so far and the e-value at each look."""
    arm, baseline = verdict.arm_values, verdict.baseline_values
    paired = verdict.claim.baseline is not None
    seeds = sorted(arm.keys() & baseline.keys() if paired else arm)
    a, b = [arm[seed] for seed in seeds], [baseline[seed] for seed in seeds] if paired else None
    scale = outcome.scale
    if scale == "log" and any(x <= 0 for x in (*a, *(b or ()))):
        scale = "rank"
    looks = range(LEAST_SEEDS, len(seeds) + 1)
    found = [
        decide(
            a[:n],
            None if b is None else b[:n],
            direction=verdict.claim.direction,
            scale=scale,
            margin=outcome.margin,
        ).e_value
        for n in looks
    ]
    return list(looks), found


def unit_of(verdict: Verdict, outcome: Metric | Outcome) -> float:
    """The unit of an effect in the chart: the smallest one that matters, else the spread between seeds."""
    if outcome.margin is not None:
        return outcome.margin
    pairs = verdict.arm_values.keys() & verdict.baseline_values.keys()
    apart = np.array([verdict.arm_values[s] - verdict.baseline_values[s] for s in pairs])
    apart = apart[np.isfinite(apart)]
    spread = float(np.std(apart, ddof=1)) if len(apart) > 1 else 0.0
    return spread or abs(verdict.decision.effect) or 1.0


def rate_words(rate: float) -> str:
    """A peak learning rate for a reader: 0.25, 0.0156."""
    return f"{2.0**rate:.3g}"


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
