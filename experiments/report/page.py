"""A question's report: the frontier and the verdicts first, then how sure they are, what broke and why, and the numbers.

It is for someone who never saw the tool: every chart says what it shows, every verdict is a sentence, and the report explains each
abbreviation once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from datetime import date
from pathlib import Path

import torch

from experiments.arm import Arm, Suite
from experiments.metrics import Metric
from experiments.report import charts
from experiments.report.headline import cause_of, lead
from experiments.results import FRONTIER, Made, Results, results_of
from experiments.study import Outcome, Study, yes_or_no
from experiments.verdicts import Verdict, effect_words, evidence_words, seeds_words
from stabilitylab.report import Content, Page, Said, Section, Statements, Table, TableCell
from stabilitylab.report import sections as shown
from stabilitylab.runs import Run

TONE = {"supported": "good", "against": "bad", "equivalent": "even", "undecided": "open"}
MOST_BROKEN = 40
# The report shows the layers of at most this many runs: one per arm, at the lowest rate.
MOST_LOOKED_INTO = 8
# Up to this many seeds a cell of the metrics shows each value, beyond that the lowest and the highest.
FEW = 4
COUNTED = "counted"
NBSP = "\N{NO-BREAK SPACE}"


def write_report(asked: Suite | Study, out: Path, *, results: Results | None = None) -> Path:
    """Write ``report.html`` into the folder from its results. Raises InputError if there are none."""
    results = results or results_of(asked, out)
    page = Page(title=title(results), lead=lead(results), facts=facts(asked, results))
    page.sections += [first_screen(results), how_sure(results)]
    if results.runs:
        page.sections += [broken_section(results), *course_sections(results)]
    page.sections += [metric_section(results), arms_section(asked)]
    if isinstance(asked, Suite):
        page.sections += [*layer_sections(results), commands_section(asked)]
    else:
        page.sections.append(predictions_section(asked))
    return page.write(out / "report.html")


def title(results: Results) -> str:
    """The question's first sentence."""
    first = results.question.partition("?")[0].strip()
    return f"{first}?" if "?" in results.question else f"{results.name}: {first}"


# ------------------------------------------------------------------------------------------------------- what comes first


def first_screen(results: Results) -> Section:
    """The frontier and the verdicts."""
    parts: list[Content] = []
    if results.alive:
        parts.append(charts.frontier_chart(results))
    elif results.verdicts:
        parts.append(charts.effects_chart(results))
    parts.append(verdict_statements(results))
    rows: list[list[TableCell | str]] = [[arm.name, arm.summary] for arm in results.arms]
    parts.append(Table(columns=["arm", "what it is"], rows=rows))
    name = "Which rate is survived, and what is decided" if results.alive else "What is decided"
    return Section(title=name, parts=parts)


def verdict_statements(results: Results) -> Statements:
    """Every claim with its verdict, decided ones first."""
    said = [
        Said(
            word=verdict.judgement,
            text=f"{number}. {verdict.claim.text}",
            detail=verdict_detail(verdict, results.outcomes[verdict.claim.metric]),
            tone=TONE[verdict.judgement],
        )
        for number, verdict in charts.numbered(results)
    ]
    return Statements(
        said=said,
        note="Supported, against: the seeds rule out that there is no difference, at 5 % a claim and however often one has looked. "
        "Equivalent: whatever difference is left is too small to matter. Undecided: more seeds are needed; what these would have "
        "found, they would have with a power of 80 %. In brackets: 95 % intervals.",
    )


def verdict_detail(verdict: Verdict, outcome: Metric | Outcome) -> str:
    """ "Largest rate survived: deepnorm-bf16 0.5 against deepnorm 0.0625; effect +3 octaves [+3, +3]; 6 of 10 seeds"."""
    claim, one = verdict.claim, verdict.decision
    if not one.n:
        return "No seed has run in both arms."
    of_rates = claim.metric == FRONTIER
    counted = outcome.unit == "share" and yes_or_no((verdict.arm_values, verdict.baseline_values))
    kind = FRONTIER if of_rates else COUNTED if counted else ""
    sides = _mean_words(claim.arm, verdict.arm_values, kind)
    if claim.baseline is not None:
        sides += f" against {_mean_words(claim.baseline, verdict.baseline_values, kind)}"
    alone = "" if verdict.holds else "; by itself, not among all claims together"
    seen = (
        ""
        if not math.isfinite(one.detectable) or one.verdict != "undecided"
        else f"; would have found {one.detectable:.2g}"
    )
    title = outcome.title.removesuffix(", log2") if of_rates else outcome.title
    effect, seeds = effect_words(verdict, outcome), seeds_words(verdict)
    return f"{title}: {sides}; effect {effect}; {seeds} seed{'' if seeds == '1' else 's'}{seen}{alone}"


def how_sure(results: Results) -> Section:
    """Effects on one scale, evidence over seeds, and the claims in numbers."""
    rows: list[list[TableCell | str]] = [
        [
            TableCell(text=f"{number}. {verdict.claim.text}", detail=f"after {verdict.claim.source}"),
            verdict.judgement,
            seeds_words(verdict).replace(" ", NBSP),
            effect_words(verdict, results.outcomes[verdict.claim.metric]),
            evidence_words(verdict.decision.e_value),
            "–" if verdict.judgement == "undecided" else "yes" if verdict.holds else "no",
        ]
        for number, verdict in charts.numbered(results)
    ]
    parts: list[Content] = [charts.effects_chart(results)] if results.alive and results.verdicts else []
    if any(charts.evidence_of(one, results.outcomes[one.claim.metric])[0] for one in results.verdicts):
        parts.append(charts.evidence_chart(results))
    if results.verdicts:
        columns = ["claim", "verdict", "seeds", "effect, 95 % interval", "e-value", "holds among all"]
        parts.append(Table(columns=columns, rows=rows))
    many = (
        f"Of {len(results.claims)} claims without any effect {0.05 * len(results.claims):.1f} false verdicts would be expected at "
        "most; the last column says which hold when all are judged together (Holm)."
    )
    one = "A claim without any effect would get a false verdict with a probability of 5 % at most."
    return Section(title="How sure", text=(one if len(results.claims) == 1 else many,), parts=parts)


# ----------------------------------------------------------------------------------------------------- what the runs did


def broken_section(results: Results) -> Section:
    """The collapsed runs, when and of what."""
    broken = results.broken
    if not broken:
        return Section(title="Runs that broke", text=(f"None of {len(results.runs)} runs broke.",))
    groups: dict[tuple[float, str], list[Made]] = {}
    for made in broken:
        groups.setdefault((made.rate or 0.0, made.arm), []).append(made)
    rows: list[list[TableCell | str]] = []
    for (_, arm), several in sorted(groups.items()):
        causes = Counter(", ".join(filter(None, cause_of(made) or ("not told",))) for made in several)
        of = sum(one.arm == arm and one.rate == several[0].rate for one in results.runs)
        rows.append(
            [
                arm,
                "–" if several[0].rate is None else charts.rate_words(several[0].rate),
                f"{len(several)}{NBSP}of{NBSP}{of}",
                TableCell(
                    text="; ".join(
                        cause + (f" ({n})" if n > 1 else "") for cause, n in causes.most_common(3)
                    ),
                    detail="seed: step "
                    + ", ".join(
                        f"{made.seed}: {made.broke:,}"
                        for made in sorted(several, key=lambda one: one.seed)[:MOST_BROKEN]
                    ),
                ),
                several[0].run.name,
            ]
        )
    text = f"{len(broken)} of {len(results.runs)} runs lost their loss for good; a lost run ends early."
    parts = [
        Table(
            columns=["arm", "rate", "broke", "first suspect, and where each began", "folder of the first"],
            rows=rows,
            note="stabilitylab report FOLDER shows one run from near; docs/causes.md says what the suspects mean.",
        ),
    ]
    return Section(title="Runs that broke", text=(text,), parts=parts)


def course_sections(results: Results) -> list[Section]:
    """Runs on course over the steps, and loss and gradient norm, at the rate where the arms differ most."""
    rate = charts.telling_rate(results)
    alive = charts.alive_chart(results, rate)
    at = "" if rate is None else f" at a rate of {charts.rate_words(rate)}"
    curves = shown.overview(_runs_at(results, rate))
    curves.title += at
    return [Section(title="How long runs last", parts=[alive]), curves]


def layer_sections(results: Results) -> list[Section]:
    """The layers' behaviour, in one run per arm at the lowest rate."""
    rates = [made.rate for made in results.runs if made.rate is not None]
    by_label = {
        arm: runs[:1]
        for arm, runs in list(_runs_at(results, min(rates, default=None)).items())[:MOST_LOOKED_INTO]
    }
    found = [
        shown.gradients(by_label),
        shown.residual_stream(by_label),
        shown.attention(by_label),
        shown.outliers(by_label),
    ]
    for section in found:
        section.title += ", one seed"
    return found


def _runs_at(results: Results, rate: float | None) -> dict[str, list[Run]]:
    by_label: dict[str, list[Run]] = {}
    for made in results.runs:
        if made.rate == rate:
            by_label.setdefault(made.arm, []).append(made.run)
    return by_label


# ------------------------------------------------------------------------------------------------------------ the numbers


def facts(asked: Suite | Study, results: Results) -> dict[str, str]:
    """Small print: what ran, where, when."""
    found = {"question": results.name}
    if isinstance(asked, Suite):
        config = results.runs[0].run.config
        planned = len(asked.arms) * len(asked.seeds) * max(len(asked.rates), 1)
        found |= {
            "runs": f"{len(results.runs)} of {planned} complete",
            "steps": str(config.get("steps")),
            "seeds": ", ".join(map(str, asked.seeds)),
        }
    else:
        found["seeds"] = f"{results.seeds} ({asked.seeds} planned)"
    return {**found, "preset": asked.preset, "torch": torch.__version__, "date": date.today().isoformat()}


def arms_section(asked: Suite | Study) -> Section:
    """The arms' common settings, and each arm's own."""
    rows = [
        [arm.name, " ".join(f"--{k} {v}" for k, v in arm.settings.items())]
        for arm in asked.arms
        if arm.settings
    ]
    common = " ".join(f"--{k} {v}" for k, v in asked.settings.items())
    return Section(
        title="Settings",
        text=(f"All arms share: {common or 'those of the preset alone'}.",),
        parts=[Table(columns=["arm", "its own"], rows=rows)] if rows else [],
    )


def metric_section(results: Results) -> Section:
    """One row per metric, one column per arm: mean, with the seeds' values below."""
    arms = [arm.name for arm in results.arms if any(arm.name in by_arm for by_arm in results.values.values())]
    rows, none = list[list[TableCell | str]](), list[str]()
    for name, outcome in results.outcomes.items():
        by_arm = results.values.get(name, {})
        means = {arm: _mean(by_arm.get(arm, {})) for arm in arms}
        everywhere = getattr(outcome, "everywhere", True)
        if not everywhere and all(math.isnan(mean) for mean in means.values()):
            continue
        if all(mean == 0 for mean in means.values()) and outcome.unit != "share":
            none.append(outcome.title)
            continue
        best = _best(means, outcome)
        counted = outcome.unit == "share" and yes_or_no(by_arm.values())
        row: list[TableCell | str] = [
            TableCell(text=outcome.title + (f", {outcome.unit}" if outcome.unit else ""))
        ]
        for arm in arms:
            text, detail = _number(means[arm], outcome), _seeds(by_arm.get(arm, {}), outcome)
            if name == FRONTIER and math.isfinite(means[arm]):
                row[0] = TableCell(text="Largest rate survived")
                text, detail = charts.rate_words(means[arm]), f"log2 {detail}"
            if counted and arm in by_arm:
                detail = _count(by_arm[arm])
            row.append(TableCell(text=text, best=arm in best, detail=detail))
        rows.append(row)
    note = (
        "Large: mean over seeds. Small: each seed, or the lowest and the highest. Shaded: the stable end of the row, where one arm "
        "stands alone there."
    )
    if none:
        note += f" Nothing in any run: {', '.join(none)}."
    rates = [made.rate for made in results.runs if made.rate is not None]
    at = f" at the lowest rate, {charts.rate_words(min(rates))}" if rates else ""
    return Section(title=f"Metrics{at}", parts=[Table(columns=["metric", *arms], rows=rows, note=note)])


def predictions_section(study: Study) -> Section:
    """Expectations from before the first run."""
    return Section(title="Predictions", text=tuple(study.predictions))


def commands_section(suite: Suite) -> Section:
    """How to repeat each arm by hand."""
    rate = min(suite.rates, default=None)

    def command(arm: Arm) -> str:
        return "glm " + " ".join(
            suite.command(arm, suite.seeds[0], data=Path("DATA"), out=Path("RUN"), rate=rate)
        )

    return Section(title="Repeat a run", text=tuple(command(arm) for arm in suite.arms))


def _mean(by_seed: Mapping[int, float]) -> float:
    return sum(by_seed.values()) / len(by_seed) if by_seed else math.nan


def _mean_words(arm: str, by_seed: Mapping[int, float], kind: str) -> str:
    mean = _mean(by_seed)
    if kind == COUNTED and by_seed:
        return f"{arm} {_count(by_seed)}"
    if kind == FRONTIER and math.isfinite(mean):
        return f"{arm} {charts.rate_words(mean)}"
    return f"{arm} {mean:.4g}" if math.isfinite(mean) else f"{arm} {mean}"


def _count(by_seed: Mapping[int, float]) -> str:
    """ "34 of 46" of yes and no."""
    found = [one for one in by_seed.values() if not math.isnan(one)]
    return f"{sum(found):.0f} of {len(found)}"


def _best(means: Mapping[str, float], outcome: Metric | Outcome) -> set[str]:
    finite = {arm: value for arm, value in means.items() if math.isfinite(value)}
    better = getattr(outcome, "better", None)
    if better is None or not finite:
        return set()
    edge = min(finite.values()) if better == "less" else max(finite.values())
    arms = {arm for arm, value in finite.items() if value == edge}
    return arms if len(arms) == 1 else set()


def _number(value: float, outcome: Metric | Outcome) -> str:
    short = f"{value:.{getattr(outcome, 'digits', 4)}g}"
    return f"{float(short):,.0f}" if "e+0" in short and abs(value) < 1e6 else short


def _seeds(by_seed: Mapping[int, float], outcome: Metric | Outcome) -> str:
    values = sorted(by_seed.values())
    if len(values) <= FEW:
        return " · ".join(_number(value, outcome) for value in by_seed.values())
    lowest, highest = (_number(values[i], outcome) for i in (0, -1))
    return lowest if lowest == highest else f"{lowest}{NBSP}to{NBSP}{highest}"
