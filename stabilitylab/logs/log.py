"""A log as its readers see it: steps and signals in blocks.

An empty cell or ``null`` is a value that was not logged; ``nan`` and ``inf`` are values. Without a step column the row number is
the step. ``columns`` says which column is which signal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stabilitylab.errors import InputError

BLOCK_ROWS = 65_536


@dataclass(frozen=True, slots=True)
class RowBlock:
    """Consecutive rows of a log.

    Attributes:
        steps: whole numbers.
        values: signal -> one float per row.
        logged: signal -> whether the row holds it; where it does not, the value means nothing.
    """

    steps: NDArray[np.int64]
    values: Mapping[str, NDArray[np.float64]]
    logged: Mapping[str, NDArray[np.bool_]]

    def __len__(self) -> int:
        return len(self.steps)

    def take(self, order_N: NDArray[np.intp]) -> RowBlock:
        """The rows in another order."""
        return RowBlock(
            self.steps[order_N],
            {name: values[order_N] for name, values in self.values.items()},
            {name: logged[order_N] for name, logged in self.logged.items()},
        )

    @classmethod
    def concatenate(cls, blocks: Sequence[RowBlock]) -> RowBlock:
        """All rows one after the other, of blocks of one log."""
        return cls(
            np.concatenate([block.steps for block in blocks]),
            {name: np.concatenate([block.values[name] for block in blocks]) for name in blocks[0].values},
            {name: np.concatenate([block.logged[name] for block in blocks]) for name in blocks[0].logged},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """A log that can be read again and again.

    Attributes:
        path: its place.
        columns: signal -> its name in the log; without ``step`` where the row number is the step.
        name: the run, rank or phase of the file; "" where there is only one.
        format: the trainer's or format's name.
        left_out: reason -> number of records not read; complete once ``blocks`` has run to its end.
    """

    path: Path
    columns: Mapping[str, str]
    name: str = ""
    format: str = ""
    left_out: Counter[str] = field(default_factory=Counter)

    def blocks(self) -> Iterator[RowBlock]:
        """The rows that hold a step and at least one signal, in the order of the log."""
        raise NotImplementedError


def whole_steps(steps_N: NDArray[np.float64], source: str) -> NDArray[np.int64]:
    """Steps as whole numbers. Raises InputError where one is not."""
    odd = np.flatnonzero(~(np.abs(steps_N) < 2**53) | (steps_N != np.round(steps_N)))
    if len(odd):
        raise InputError(
            f"{source} holds {steps_N[odd[0]]:g}: steps are whole numbers; name another with --step"
        )
    return steps_N.astype(np.int64)
