"""Which layer leaves which number format, and when: trends of what the probe ``formats`` recorded, against a limit.

A layer's operand bears a format as long as the relative error that the format makes on it stays below

    limit = ``factor`` x error of the format on normal numbers               factor 2: a bit lost

so a limit asks the same of every format: how much worse than numbers without outliers. An operand is forecast to leave by a step if
its whole interval lies before that step; if the interval holds "never", or a later step, the forecast only says that it may.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import pandas as pd

from stabilitylab.errors import InputError
from stabilitylab.forecast.trend import Trend, trends
from stabilitylab.runs.run import Run

FAMILY, STATISTIC = "format", "_error"
FACTOR, AHEAD = 2.0, 4.0


@dataclass(frozen=True, kw_only=True)
class LayerForecast:
    """One operand of one layer in one format.

    Attributes:
        site: ``layers.3.mlp.down:input``.
        format: its name.
        error: the fitted line's relative error at the last step.
        limit: what the error may be.
        earliest, likely, latest: steps at which the error reaches the limit; the last step where it has passed it; infinite: never.
    """

    site: str
    format: str
    error: float
    limit: float
    earliest: float
    likely: float
    latest: float

    @property
    def has_left(self) -> bool:
        """Whether the operand no longer bears the format."""
        return self.error >= self.limit


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """The forecast of a run.

    Attributes:
        last: the last step seen.
        until: the last step forecast.
        factor: of the limit.
        layers: every operand in every format, those that leave first at the front.
    """

    last: int
    until: int
    factor: float
    layers: Sequence[LayerForecast]

    @property
    def formats(self) -> list[str]:
        """Names, in the order of the telemetry."""
        return list(dict.fromkeys(one.format for one in sorted(self.layers, key=lambda one: one.format)))

    def of(self, format: str) -> list[LayerForecast]:
        """Operands in one format."""
        return [one for one in self.layers if one.format == format]

    def leaving(self, format: str) -> list[LayerForecast]:
        """Operands whose whole interval lies before the end of the forecast, and that have not left yet."""
        return [one for one in self.of(format) if not one.has_left and one.latest <= self.until]

    def may_leave(self, format: str) -> list[LayerForecast]:
        """Operands whose interval begins before the end of the forecast and ends behind it."""
        return [one for one in self.of(format) if one.earliest <= self.until < one.latest]

    def sentence(self, format: str) -> str:
        """One format's future in a sentence."""
        of, leaving, may = self.of(format), self.leaving(format), self.may_leave(format)
        left = sum(one.has_left for one in of)
        told = f"{left} of {len(of)} operands have left it by step {self.last:,}"
        until = f"until step {self.until:,}"
        if not leaving and not may:
            return f"{told}; none is forecast to leave {until}."
        if not leaving:
            first = may[0]
            return (
                f"{told}; {len(may)} more may leave {until}, {first.site} first, at step {_step(first.earliest)} or later: their "
                "past allows that they stay, too."
            )
        first = leaving[0]
        when = f"step {first.likely:,.0f} (90 %: {_step(first.earliest)} to {_step(first.latest)})"
        others = f"; {len(may)} others may" if may else ""
        return f"{told}; {len(leaving)} more leave it {until}, {first.site} first, at {when}{others}."


def forecast_run(
    run: Run, *, factor: float = FACTOR, until: int | None = None, seen: int | None = None
) -> Forecast | None:
    """The forecast of a run; None where it recorded too little of the family ``format``.

    Args:
        run: with telemetry of the probe ``formats``.
        factor: of the limit, over 1.
        until: the last step to forecast; by default four times as many as there were.
        seen: look at steps up to here only.

    Raises:
        InputError: ``factor`` allows no error, or ``until`` lies in the past.
    """
    if not factor > 1:
        raise InputError(
            f"a factor of {factor:g} allows less error than normal numbers have: give more than 1"
        )
    metrics = run.metrics
    names = metrics.loc[metrics["family"] == FAMILY, "statistic"].unique()
    found: list[LayerForecast] = []
    last = -1
    for name in sorted(name.removesuffix(STATISTIC) for name in names if name.endswith(STATISTIC)):
        values = run.matrix(FAMILY, name + STATISTIC)
        if seen is not None:
            values = values[[step for step in values.columns if int(step) <= seen]]
        limit = factor * _usual(name)
        for operand in (":input", ":weight", ":gradient"):
            # Operands of a kind err alike, so their slopes judge each other.
            alike = values[[str(site).endswith(operand) for site in values.index]]
            for site, trend in trends(alike).items():
                last = max(last, trend.last)
                found.append(_told(site, name, trend, limit))
    if not found:
        return None
    if until is not None and until <= last:
        raise InputError(f"the run has reached step {last}: forecast a later step than {until}")
    found.sort(key=lambda one: (not one.has_left, one.likely, one.earliest, -one.error / one.limit))
    return Forecast(last=last, until=until or round(AHEAD * (last + 1)), factor=factor, layers=found)


def table(forecast: Forecast) -> pd.DataFrame:
    """One row an operand and format."""
    columns = ("site", "format", "error", "limit", "earliest", "likely", "latest")
    return pd.DataFrame([{name: getattr(one, name) for name in columns} for one in forecast.layers])


def _told(site: str, name: str, trend: Trend, limit: float) -> LayerForecast:
    earliest, likely, latest = trend.reaches(limit)
    return LayerForecast(
        site=site,
        format=name,
        error=trend.level,
        limit=limit,
        earliest=earliest,
        likely=likely,
        latest=latest,
    )


@cache
def _usual(name: str) -> float:
    from stabilitylab.formats import (
        gaussian_error,
        what_if_format,
    )  # torch: only for runs that recorded formats

    return gaussian_error(what_if_format(name))


def _step(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else "never"
