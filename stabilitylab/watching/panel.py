"""The terminal's view of a watched log: the curves' last stretch, the findings, how long it has been silent."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from stabilitylab.telemetry import GRADIENT_NORM, LOSS
from stabilitylab.watching.alerts import plain
from stabilitylab.watching.judge import Judge
from stabilitylab.watching.watch import Watch

_BARS = "▁▂▃▄▅▆▇█"
_STYLES = {"critical": "bold red", "warning": "yellow", "notice": "dim"}
SEGMENTS = 4
EVENTS = 6


def sparkline(values: Sequence[float], width: int) -> str:
    """The last values as bars, the largest of each stretch; a non-finite value is a ×."""
    if not values:
        return ""
    values = list(values)
    size = max(1, math.ceil(len(values) / width))
    stretches = [values[i : i + size] for i in range(0, len(values), size)]
    tops = [max(s) if all(map(math.isfinite, s)) else math.nan for s in stretches]
    finite = sorted(x for x in tops if math.isfinite(x))
    if not finite:
        return "×" * len(tops)
    low, high = finite[0], finite[-1]
    span = high - low or 1.0
    return "".join(
        "×" if not math.isfinite(x) else _BARS[min(len(_BARS) - 1, int((x - low) / span * len(_BARS)))]
        for x in tops
    )


def panel(watch: Watch, *, width: int, now: float | None = None) -> RenderableType:
    """The whole panel.

    Args:
        watch: the watch to show.
        width: the terminal's, in characters.
        now: seconds since 1970.
    """
    now = time.time() if now is None else now
    shown = sorted(watch.judges.values(), key=lambda judge: -judge.curves[LOSS].step)[:SEGMENTS]
    table = Table.grid(padding=(0, 1))
    for justify in ("left", "right", "left"):
        table.add_column(justify=justify, no_wrap=True)
    for judge in shown:
        if not judge.columns:
            continue
        if len(watch.judges) > 1:
            table.add_row(Text(plain(judge.name), style="bold"), "", "")
        for signal in (LOSS, GRADIENT_NORM):
            curve = judge.curves[signal]
            if curve.values:
                name = plain(judge.columns.get(signal, signal))
                bars = sparkline(curve.values, max(10, width - 44))
                table.add_row(
                    Text(name[:24]), Text(f"{curve.values[-1]:.5g}", style="bold"), Text(bars, style="cyan")
                )
    lines: list[RenderableType] = [table]
    if len(watch.judges) > len(shown):
        lines.append(Text(f"and {len(watch.judges) - len(shown)} more segments", style="dim"))
    lines.append(_stability(watch, shown))
    for alert in watch.announcer.told[-EVENTS:]:
        lines.append(Text(alert.line(), style=_STYLES[alert.severity], overflow="ellipsis", no_wrap=True))
    title = plain(str(watch.path)) + (f", step {watch.step:,}" if watch.step >= 0 else "")
    return Panel(
        Group(*lines),
        title=Text(title),
        title_align="left",
        subtitle=_silence(watch, now),
        subtitle_align="left",
    )


def _stability(watch: Watch, shown: Sequence[Judge]) -> Text:
    """One word on the run's stability, and the measure behind it."""
    if watch.problem or not shown:
        return Text(plain(watch.problem or "waiting for values"), style="dim")
    is_open = watch.announcer.open_episodes
    if is_open:
        worst = Text(f"not steady: {', '.join(is_open[:4])}", style="bold red")
    else:
        worst = Text("steady", style="green")
    levels = []
    for judge in shown[:1]:
        base = judge.detector.loss_excursions.baseline
        if base.known:
            levels.append(f"; level {base.level:.4g}, noise {max(base.scale1, 0.0):.2g}")
        else:
            levels.append("; its noise is not known yet")
    worst.append("".join(levels), style="dim")
    return worst


def _silence(watch: Watch, now: float) -> Text:
    if watch.last_value is None:
        return Text("no value yet", style="dim")
    seconds = max(0, round(now - watch.last_value))
    late = 0 < watch.options.silent_after < seconds
    return Text(f"last value {_span(seconds)} ago", style="bold red" if late else "dim")


def _span(seconds: int) -> str:
    if seconds < 120:
        return f"{seconds} s"
    if seconds < 7200:
        return f"{seconds // 60} min"
    return f"{seconds // 3600} h"
