"""What a row of a page calls a run: pages hold labels, each with one run or with the seeds of an arm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from stabilitylab.runs.run import Run

Runs = Mapping[str, Sequence[Run]]


def labelled(runs: Runs) -> Iterator[tuple[str, Run]]:
    """Each run with its own name, or with its label where other runs have that name too."""
    count = Counter(run.name for several in runs.values() for run in several)
    for label, several in runs.items():
        for run in several:
            alone = label if len(several) == 1 else f"{label}: {run.name}"
            yield run.name if count[run.name] == 1 else alone, run
