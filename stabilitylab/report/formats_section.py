"""Which low-bit formats a run's layers tolerate, and which they are forecast to leave, from what the probe ``formats`` recorded."""

from __future__ import annotations

import math

from stabilitylab.charts.curves import curves
from stabilitylab.forecast import Forecast, LayerForecast, forecast_run
from stabilitylab.report.page import Content, Said, Section, Statements, Table
from stabilitylab.runs.run import Run

_MOST = 12


def formats_section(run: Run) -> Section | None:
    """A sentence a format, which operands leave first, and the largest error over the steps; None where it was not recorded."""
    found = forecast_run(run)
    if found is None:
        return None
    said = [Said(word=name, text=found.sentence(name), tone=_tone(found, name)) for name in found.formats]
    parts: list[Content] = [Statements(said=said)]
    leaving = [one for one in found.layers if not one.has_left and one.earliest <= found.until][:_MOST]
    if leaving:
        parts.append(
            Table(
                columns=[
                    "operand",
                    "format",
                    "error now",
                    "limit",
                    "leaves within (90 %)",
                ],
                rows=[_row(one) for one in leaving],
                note=f"Steps beyond {found.until:,}, four times what was seen, are no forecast.",
            )
        )
    largest = {name: [run.matrix("format", f"{name}_error").max(axis=0)] for name in found.formats}
    parts.append(
        curves(
            largest, title="Error of each format, largest of all operands", unit="relative error", log=True
        )
    )
    text = (
        f"A format is left where rounding an operand to it errs {found.factor:g} times as much as on normal numbers: outliers then "
        "cost a bit. Forecast by a power law of the step through the last three quarters of the run, with an interval as wide as "
        "such laws were off at half time; a change of the recipe to come is not in it."
    )
    return Section(title="Number formats", text=(text,), parts=parts)


def _tone(found: Forecast, name: str) -> str:
    if any(one.has_left for one in found.of(name)):
        return "bad"
    return "open" if found.leaving(name) or found.may_leave(name) else "good"


def _row(one: LayerForecast) -> list[str]:
    interval = f"{_step(one.earliest)} to {_step(one.latest)}"
    return [one.site, one.format, f"{one.error:.3g}", f"{one.limit:.3g}", interval]


def _step(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else "never"
