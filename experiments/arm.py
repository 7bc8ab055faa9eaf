"""An experiment is a question, arms that differ in one thing each, and seeds that every arm shares.

An arm is a list of command-line settings on top of a preset, so one ``glm train`` command repeats each of its runs by hand. Arms
with the same seed see the same initial weights (as far as their shapes agree) and the same batches in the same order, so verdicts
compare them seed by seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from experiments.verdicts import Claim

# Every run of a suite ends with its loss on this many rows outside training.
HELDOUT_ROWS = "64"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One treatment.

    Attributes:
        name: short, a folder's name.
        summary: what it changes, for a reader.
        settings: flags of ``glm train`` beyond the suite's own; an empty value is a flag without one.
    """

    name: str
    summary: str
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Suite:
    """One question: its arms, their common settings, and the claims it tests.

    Attributes:
        name: the name on the command line.
        question: in a sentence or two.
        preset: of ``glm train``.
        settings: flags shared by every arm.
        rates: log2 of each arm's peak learning rates, lowest first; () : the settings' own. With rates the suite has a frontier
            (the largest rate that survives), and every other metric comes from the runs at the lowest one.
        steps: updates per run.
        seeds: each arm runs once with each.
        arms: the treatments; the first is the baseline of the tables.
        claims: the expected results, and their metrics.
        data: makes the data folder if need be and returns it.
    """

    name: str
    question: str
    preset: str
    steps: int
    seeds: tuple[int, ...]
    arms: tuple[Arm, ...]
    claims: tuple[Claim, ...]
    data: Callable[[Path], Path]
    settings: Mapping[str, str] = field(default_factory=dict)
    rates: tuple[float, ...] = ()

    def command(
        self,
        arm: Arm,
        seed: int,
        *,
        data: Path,
        out: Path,
        steps: int | None = None,
        rate: float | None = None,
    ) -> list[str]:
        """The ``glm train`` arguments of one run, without the program's name. ``rate``: one of ``rates``."""
        # A run must be the same wherever it lands, and many run side by side: on the CPU, unless settings say otherwise.
        flags = {"heldout.rows": HELDOUT_ROWS, "device": "cpu", **self.settings, **arm.settings}
        if rate is not None:
            flags["schedule.peak"] = f"{2.0**rate:g}"
        return [
            "train",
            self.preset,
            *("--data", str(data)),
            *("--out", str(out)),
            *("--steps", str(self.steps if steps is None else steps)),
            *("--seed", str(seed)),
            *(word for flag, value in flags.items() for word in (f"--{flag}", value) if word),
        ]
