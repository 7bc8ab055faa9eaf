"""The numbers that compare arms, each computed from a run folder's telemetry alone.

| metric | meaning | unit |
| --- | --- | --- |
| final_loss | mean training loss of the last tenth of the steps; infinite where one was not finite | nats a target |
| heldout_loss | loss on fixed held-out rows at the end; infinite for a run that was lost | nats a target |
| spike_score | share of loss values 7 deviations off their rolling window, as OLMo 2 defines it | share |
| spikes | episodes of kind spike or divergence that the detector closed or left open | count |
| gradient_norm_max | largest global gradient norm after warm-up, non-finite steps aside | - |
| gradient_norm_spread | standard deviation of ln(global gradient norm) after warm-up, non-finite steps aside | - |
| embedding_share | the embedding's mean share of the squared gradient norm | share |
| residual_stream_max | largest absolute value on the residual stream, over layers and steps | - |
| residual_stream_growth | largest absolute value after the last layer, over that after the first | - |
| attention_score_max | largest attention score, over layers, heads and steps | - |
| fp16_headroom | log2(65504 / largest value of residual stream and attention scores) | bits |
| skipped_steps | updates skipped since the gradient was not finite | steps |
| survived | steps before the loss broke out; all of them where it never did | steps |
| norm_lead | steps by which the gradient norm broke out before the loss did; NaN where either did not | steps |
| embedding_surge | embedding's share of the squared gradient norm where that breaks out, less its median over the 50 steps before | share |
| outlier_fraction | mean share of activation values with abs >= 6, at the end | share |

A run without a metric's telemetry has NaN there, and the tables show it. Maxima ignore NaN (it shows as a skipped step or a
non-finite episode) and count infinities. To *break out* is to pass four times
the median of the 50 steps before, for a norm; for a loss it is the onset of the first spike, divergence or non-finite episode.
"""  # noqa: E501 - the table's rows

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from experiments.statistics import Scale
from stabilitylab.runs import Run
from stabilitylab.spikes import episodes_of, spike_score

FP16_MAX = 65504.0
MEMORY = 50
BREAK = 4.0


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A named number of a run.

    Attributes:
        title: for a table's row.
        better: the stable end, for emphasis; None where neither is.
        measure: computes it.
        digits: significant digits shown.
        everywhere: whether a table shows it even where no run has a value; it leaves out metrics that only a broken run has.
        scale: for comparing arms; ratios by their logarithms, counts by their order.
        margin: the smallest effect of interest, in the unit of that scale; None: none is too small to matter.
    """

    title: str
    measure: Callable[[Run], float]
    better: str | None = "less"
    unit: str = ""
    digits: int = 3
    everywhere: bool = True
    scale: Scale = "linear"
    margin: float | None = None

    @property
    def worst(self) -> float | None:
        """The value of a run without one; None: such a run says nothing."""
        return {"less": math.inf, "more": -math.inf, None: None}[self.better]


def final_loss(run: Run) -> float:
    loss = run.series("train/-/loss")
    if not len(loss):
        return math.nan
    mean = float(loss.iloc[-max(1, len(loss) // 10) :].mean(skipna=False))
    # A run with a loss that is not finite did worse than any without.
    return mean if math.isfinite(mean) else math.inf


def heldout_loss(run: Run) -> float:
    loss = run.series("train/-/heldout_loss")
    if len(loss):
        return float(loss.iloc[-1]) if math.isfinite(loss.iloc[-1]) else math.inf
    lost = any(event.kind == "run-end" and event.data.get("lost") for event in run.events)
    return math.inf if lost else math.nan


def run_spike_score(run: Run) -> float:
    return float(spike_score(run.series("train/-/loss").to_numpy()))


def spike_count(run: Run) -> float:
    return float(sum(episode.kind in ("spike", "divergence") for episode in episodes_of(run.events)))


def gradient_norm_max(run: Run) -> float:
    norm = _settled_gradient_norm(run)
    return float(norm.max()) if len(norm) else math.nan


def gradient_norm_spread(run: Run) -> float:
    norm = _settled_gradient_norm(run)
    return float(np.log(norm[norm > 0]).std()) if len(norm) > 1 else math.nan


def embedding_share(run: Run) -> float:
    share = run.series("gradient/embedding.weight/share")
    return float(share[np.isfinite(share)].mean()) if len(share) else math.nan


def residual_stream_by_layer(run: Run) -> pd.Series[float]:
    """Largest |value| after each block, over all measured steps: index "layers.0", ..."""
    absmax = run.matrix("activation", "absmax")
    blocks = [site for site in absmax.index if site.removeprefix("layers.").isdigit()]
    return absmax.loc[sorted(blocks, key=lambda site: int(site.removeprefix("layers.")))].max(axis=1)


def residual_stream_max(run: Run) -> float:
    by_layer = residual_stream_by_layer(run)
    return float(by_layer.max()) if len(by_layer) else math.nan


def residual_stream_growth(run: Run) -> float:
    by_layer = residual_stream_by_layer(run)
    if len(by_layer) < 2 or not np.isfinite(by_layer.iloc[0]) or by_layer.iloc[0] <= 0:
        return math.nan
    return float(by_layer.iloc[-1] / by_layer.iloc[0])


def attention_score_max(run: Run) -> float:
    scores = run.matrix("attention", "score_max", index="max")
    return float(np.nanmax(scores.to_numpy())) if scores.size else math.nan


def fp16_headroom(run: Run) -> float:
    largest = float(np.fmax(residual_stream_max(run), attention_score_max(run)))
    if math.isinf(largest):
        return -math.inf
    return float(np.log2(FP16_MAX / largest)) if largest > 0 else math.nan


def skipped_steps(run: Run) -> float:
    return float(run.series("train/-/skipped").sum())


def survived(run: Run) -> float:
    loss = run.series("train/-/loss")
    broke = _loss_breaks(run)
    return math.nan if not len(loss) else float(loss.index[-1] + 1 if broke is None else broke)


def norm_lead(run: Run) -> float:
    loss, norm = _loss_breaks(run), _norm_breaks(run)
    return math.nan if loss is None or norm is None else float(loss - norm)


def embedding_surge(run: Run) -> float:
    broke, share = _norm_breaks(run), run.series("gradient/embedding.weight/share")
    if broke is None or not len(share):
        return math.nan
    before = share[(share.index >= broke - MEMORY) & (share.index < broke)]
    after = share[share.index >= broke]  # empty where gradients were not measured again
    return float(after.iloc[0] - before.median()) if len(before) and len(after) else math.nan


def outlier_fraction(run: Run) -> float:
    fractions = run.matrix("activation", "outlier_fraction")
    return float(np.nanmean(fractions.iloc[:, -1])) if fractions.size else math.nan


def _loss_breaks(run: Run) -> int | None:
    """Onset of the loss's first episode other than a hard batch."""
    onsets = [
        episode.onset
        for episode in episodes_of(run.events)
        if episode.signal == "train/-/loss" and episode.kind in ("spike", "divergence", "non-finite")
    ]
    return min(onsets, default=None)


def _norm_breaks(run: Run) -> int | None:
    """First step whose gradient norm exceeds four times the median of the 50 before it (25 at least), or is not finite. A step that
    the loss scaler skipped is routine and does not count.
    """
    norm, skipped = run.series("train/-/gradient_norm"), run.series("train/-/skipped")
    norm = norm[~norm.index.isin(skipped.index[skipped == 1])].replace(math.inf, math.nan)
    usual = norm.rolling(MEMORY, min_periods=MEMORY // 2).median().shift(1)
    broken = norm.index[(norm > BREAK * usual) | (norm.isna() & usual.notna())]
    return int(broken[0]) if len(broken) else None


def _settled_gradient_norm(run: Run) -> pd.Series[float]:
    """The global gradient norm after warm-up, where it is finite."""
    norm = run.series("train/-/gradient_norm")
    after = norm[norm.index >= _warmup(run)]
    return after[np.isfinite(after)]


def _warmup(run: Run) -> int:
    return int(run.config.get("schedule", {}).get("warmup", 0))


# Ratios within a tenth of each other are alike, on a logarithmic scale.
TENTH = math.log(1.1)

METRICS: Mapping[str, Metric] = {
    "final_loss": Metric(title="Final loss", unit="nats", measure=final_loss, digits=4, margin=0.01),
    "heldout_loss": Metric(
        title="Held-out loss", unit="nats", measure=heldout_loss, digits=4, everywhere=False, margin=0.01
    ),
    "spike_score": Metric(title="Spike score (OLMo 2)", measure=run_spike_score, scale="rank"),
    "spikes": Metric(title="Spikes and divergences found", measure=spike_count, scale="rank"),
    "gradient_norm_max": Metric(
        title="Largest gradient norm after warm-up", measure=gradient_norm_max, scale="log", margin=TENTH
    ),
    "gradient_norm_spread": Metric(
        title="Spread of the gradient norm's logarithm after warm-up", measure=gradient_norm_spread
    ),
    "embedding_share": Metric(
        title="Embedding's share of the squared gradient norm", measure=embedding_share
    ),
    "residual_stream_max": Metric(
        title="Largest residual-stream value", measure=residual_stream_max, scale="log", margin=TENTH
    ),
    "residual_stream_growth": Metric(
        title="Residual stream, last layer over first",
        measure=residual_stream_growth,
        scale="log",
        margin=TENTH,
    ),
    "attention_score_max": Metric(
        title="Largest attention score", measure=attention_score_max, scale="log", margin=TENTH
    ),
    "fp16_headroom": Metric(
        title="fp16 headroom", unit="bits", measure=fp16_headroom, better="more", margin=0.25
    ),
    "skipped_steps": Metric(title="Skipped steps", measure=skipped_steps, scale="rank"),
    "survived": Metric(
        title="Steps before the loss broke out", unit="steps", measure=survived, better="more", scale="rank"
    ),
    "norm_lead": Metric(
        title="Steps from the gradient norm's break to the loss's",
        unit="steps",
        measure=norm_lead,
        better=None,
        everywhere=False,
    ),
    "embedding_surge": Metric(
        title="Embedding's share of the gradient, at the norm's break less before",
        measure=embedding_surge,
        better=None,
        everywhere=False,
    ),
    "outlier_fraction": Metric(title="Outlier values (abs >= 6) at the end", measure=outlier_fraction),
}


def measure(runs: Mapping[str, Mapping[int, Run]]) -> dict[str, dict[str, dict[int, float]]]:
    """All metrics of all runs: ``values[metric][arm][seed]``."""
    return {
        name: {
            arm: {seed: metric.measure(run) for seed, run in by_seed.items()} for arm, by_seed in runs.items()
        }
        for name, metric in METRICS.items()
    }
