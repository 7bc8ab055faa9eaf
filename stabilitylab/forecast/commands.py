"""``stabilitylab forecast``: when each layer of a run leaves each number format, from what the probe ``formats`` recorded."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from stabilitylab.command_line.narrow_tables import print_table
from stabilitylab.errors import InputError
from stabilitylab.forecast.layer_forecast import FACTOR, Forecast, LayerForecast, forecast_run
from stabilitylab.runs import load_run


def forecast(
    run: Annotated[Path, tyro.conf.Positional],
    *,
    factor: float = FACTOR,
    until: int | None = None,
    rows: int = 20,
    json_output: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> int:
    """Say which layer's operands leave which format when, with an interval that the run's own past bears out.

    Args:
        run: run folder with telemetry of the probe ``formats``.
        factor: an operand leaves a format where the format's error exceeds this many times that on normal numbers.
        until: last step to forecast; by default four times as many as the run has.
        rows: number of operands to list.
        json_output: print one JSON object instead of a table.
    """
    found = forecast_run(load_run(run), factor=factor, until=until)
    if found is None:
        raise InputError(
            f"{run} recorded too little of what formats would cost: train with --monitor.formats-every N, or give Monitor a "
            "FormatProbe, for 16 measurements or more"
        )
    if json_output:
        print(json.dumps(_plain(found)))
        return 0
    console = Console(soft_wrap=True)
    for name in found.formats:
        console.print(f"{name}: {found.sentence(name)}", highlight=False, markup=False)
    told = [one for one in found.layers if not one.has_left and one.earliest <= found.until]
    if told:
        print_table(console, _table(told[:rows]))
        if len(told) > rows:
            console.print(f"and {len(told) - rows} more: --rows {len(told)}", highlight=False)
    console.print(
        f"Left: relative error over {found.factor:g} x that on normal numbers. A power law of the step through the last three "
        "quarters of the run; 90 % of its laws at half time had slopes within the interval's. A change of the recipe to come is "
        "not in it. Go by the interval: a most likely step (in --json) was right no more often than saying that nothing leaves.",
        highlight=False,
    )
    return 0


def _table(told: list[LayerForecast]) -> Table:
    made = Table("operand", "format", "error", "limit", "leaves within (90 %)", box=None)
    for one in told:
        cells = [one.site, one.format, f"{one.error:.3g}", f"{one.limit:.3g}"]
        made.add_row(*cells, f"{_step(one.earliest)} to {_step(one.latest)}")
    return made


def _plain(found: Forecast) -> dict[str, Any]:
    layers = [
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(one).items()}
        for one in found.layers
    ]
    return {"last": found.last, "until": found.until, "factor": found.factor, "layers": layers}


def _step(value: float) -> str:
    return f"{value:,.0f}" if math.isfinite(value) else "never"
