"""Logs that grow while a watch looks at them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from stabilitylab.watching.alerts import Alert
from stabilitylab.watching.kept_state import KeptState
from stabilitylab.watching.options import Options
from stabilitylab.watching.watch import Watch


def losses(count: int, *, spike: int | None = None, seed: int = 0) -> list[float]:
    """A falling curve with noise of a hundredth, and thirty values up by 2 from ``spike`` on."""
    noise = np.random.default_rng(seed).normal(0, 0.02, count)
    return [
        2
        + 6 * math.exp(-k / 150)
        + float(noise[k])
        + (2.0 if spike is not None and spike <= k < spike + 30 else 0.0)
        for k in range(count)
    ]


def megatron(step: int, loss: float | None) -> str:
    said = "" if loss is None else f" lm loss: {loss:.6E} |"
    return f" iteration {step:8d}/    9000 |{said} loss scale: 1.0 | grad norm: 1.000 |\n"


def append(file: Path, text: str) -> None:
    with file.open("a") as opened:
        opened.write(text)


OPEN: list[Watched] = []


class Watched:
    """A watch and what it has said, begun again as often as a test likes."""

    def __init__(self, path: Path, state: Path, **options: object) -> None:
        self.path, self.state, self.options = path, state, options
        self.said: list[Alert] = []
        self.begin()
        OPEN.append(self)

    def begin(self) -> None:
        self.memory = KeptState(self.state)
        self.watch = Watch(
            path=self.path,
            options=Options(**self.options),  # type: ignore[arg-type]
            memory=self.memory,
            say=self.said.append,
        )

    def look(self, *, last: bool = False) -> list[tuple[str, int | None]]:
        """Rules and steps of what is new."""
        before = len(self.said)
        self.watch.look(last=last)
        return [(alert.rule, alert.step) for alert in self.said[before:]]

    def end(self) -> None:
        self.watch.close()
        self.memory.close()

    def rules(self) -> list[str]:
        return [alert.rule for alert in self.said]
