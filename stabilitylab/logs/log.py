"""Training logs from anywhere, as a stream of numbers: CSV, JSONL, Parquet, TensorBoard files, run folders.

A log is read in blocks, so its size does not matter. What a column is called differs from trainer to trainer;
names are compared in lower case with ``/``, ``-`` and blanks as ``_`` and without a leading ``train_``:

| signal | names |
| --- | --- |
| step | step, steps, global_step, iteration, iterations, iter, it, update, num_steps |
| loss | loss, lm_loss, training_loss, total_loss, nll_loss, else the only column with "loss" in its name |
| gradient norm | grad_norm, gradient_norm, global_grad_norm, grad_norm_total, gnorm |
| loss scale | loss_scale, scale, grad_scale |
| learning rate | lr, learning_rate |
| skipped | skipped, overflow |
| batch size | batch_size, global_batch_size |
| phase of the data | data_phase, curriculum_step, curriculum_seqlen, sequence_length, seq_length |

Columns of evaluation (valid, val, eval, test) are never the training loss. An empty cell or ``null`` is a
value that was not logged; ``nan`` and ``inf`` are values that were. Without a step column the row number is
the step.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stabilitylab.errors import InputError
from stabilitylab.telemetry import (
    BATCH_SIZE,
    DATA_PHASE,
    GRADIENT_NORM,
    LEARNING_RATE,
    LOSS,
    LOSS_SCALES,
    SKIPPED,
)

STEP = "step"
_NAMES: Mapping[str, tuple[str, ...]] = {
    STEP: ("step", "steps", "global_step", "iteration", "iterations", "iter", "it", "update", "num_steps"),
    LOSS: ("loss", "lm_loss", "training_loss", "total_loss", "nll_loss"),
    GRADIENT_NORM: ("grad_norm", "gradient_norm", "global_grad_norm", "grad_norm_total", "gnorm"),
    LOSS_SCALES[0]: ("loss_scale", "scale", "grad_scale"),
    LEARNING_RATE: ("lr", "learning_rate"),
    SKIPPED: ("skipped", "overflow"),
    BATCH_SIZE: ("batch_size", "global_batch_size"),
    DATA_PHASE: ("data_phase", "curriculum_step", "curriculum_seqlen", "sequence_length", "seq_length"),
}
EVALUATION = re.compile(r"(^|_)(val|valid|validation|eval|test|dev)(_|$)")
BLOCK_ROWS = 65_536


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive rows of a log.

    Attributes:
        steps: whole numbers.
        values: signal -> one float a row.
        logged: signal -> whether the row holds the signal; where it does not, the value means nothing.
    """

    steps: NDArray[np.int64]
    values: Mapping[str, NDArray[np.float64]]
    logged: Mapping[str, NDArray[np.bool_]]

    def __len__(self) -> int:
        return len(self.steps)

    def take(self, order_N: NDArray[np.intp]) -> Block:
        """The rows in another order."""
        return Block(
            self.steps[order_N],
            {name: values[order_N] for name, values in self.values.items()},
            {name: logged[order_N] for name, logged in self.logged.items()},
        )

    @classmethod
    def concatenate(cls, blocks: Sequence[Block]) -> Block:
        """All rows one after the other; the blocks are of one log."""
        return cls(
            np.concatenate([block.steps for block in blocks]),
            {name: np.concatenate([block.values[name] for block in blocks]) for name in blocks[0].values},
            {name: np.concatenate([block.logged[name] for block in blocks]) for name in blocks[0].logged},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """A log that can be read, again and again.

    Attributes:
        path: where it lies.
        columns: signal -> its name in the log; ``step`` is missing where rows are counted.
    """

    path: Path
    columns: Mapping[str, str]

    def blocks(self) -> Iterator[Block]:
        """The rows that hold a step and at least one signal, in the order of the log."""
        raise NotImplementedError


def open_log(path: Path, *, loss: str | None = None, step: str | None = None) -> Log:
    """Recognise a log and its columns.

    Args:
        path: a file or folder.
        loss: the loss column's own name, where the usual names do not do.
        step: the step column's.

    Raises:
        InputError: there is no such file, it is empty, cannot be understood, or has no loss column.
    """
    # The readers know this module's names; they are imported when needed, tensorboard and pyarrow with them.
    if not path.exists():
        raise InputError(f"{path}: there is no such file or folder")
    if path.is_dir():
        return _open_folder(path, loss=loss, step=step)
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty: a log needs a header and at least one row")
    kind = _kind_of(path)
    if kind in ("csv", "parquet"):
        from stabilitylab.logs.tables import CsvLog, ParquetLog

        return (CsvLog if kind == "csv" else ParquetLog).open(path, loss=loss, step=step)
    if kind == "tensorboard":
        from stabilitylab.logs.tensorboard import TensorBoardLog

        return TensorBoardLog.open_files(path, [path], loss=loss, step=step)
    from stabilitylab.logs.records import JsonLinesLog

    return JsonLinesLog.open(path, loss=loss, step=step)


def _open_folder(path: Path, *, loss: str | None, step: str | None) -> Log:
    if (path / "telemetry").is_dir() or (path / "events.jsonl").is_file():
        from stabilitylab.logs.records import RunLog

        return RunLog.open(path, loss=loss)
    files = sorted(file for file in path.rglob("*tfevents*") if file.is_file())
    if not files:
        raise InputError(
            f"{path} is neither a run folder nor one of TensorBoard event files: give a log file"
        )
    from stabilitylab.logs.tensorboard import TensorBoardLog

    return TensorBoardLog.open_files(path, files, loss=loss, step=step)


def _kind_of(path: Path) -> str:
    if "tfevents" in path.name:
        return "tensorboard"
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return "parquet"
    if suffix in (".jsonl", ".ndjson", ".json"):
        return "jsonl"
    if suffix in (".csv", ".tsv"):
        return "csv"
    with path.open("rb") as file:
        head = file.read(4096)
    if head.startswith(b"PAR1"):
        return "parquet"
    return "jsonl" if head.lstrip().startswith(b"{") else "csv"


def choose_columns(
    names: Iterable[str], *, source: Path, loss: str | None = None, step: str | None = None
) -> dict[str, str]:
    """Which column is which signal.

    Raises:
        InputError: no loss column, or several that could be; the columns there are are named.
    """
    names = list(names)
    plain = {name: _plain(name) for name in names}
    chosen: dict[str, str] = {}
    for wanted, given in ((LOSS, loss), (STEP, step)):
        if given is not None:
            if given not in plain:
                raise InputError(f"{source} has no column {given!r}: its columns are {_list(names)}")
            chosen[wanted] = given
    for signal, usual in _NAMES.items():
        if signal not in chosen:
            found = [name for word in usual for name in names if plain[name] == word]
            if found:
                chosen[signal] = found[0]
    if LOSS not in chosen:
        others = set(chosen.values())
        found = [
            n for n in names if "loss" in plain[n] and n not in others and not EVALUATION.search(plain[n])
        ]
        if len(found) != 1:
            problem = "has several loss columns" if found else "has no loss column"
            which = _list(found) if found else f"its columns are {_list(names)}"
            raise InputError(f"{source} {problem}: {which}; name one with --loss")
        chosen[LOSS] = found[0]
    return chosen


def _plain(name: str) -> str:
    plain = re.sub(r"[^0-9a-z]+", "_", name.strip().lower()).strip("_")
    return plain.removeprefix("train_").removeprefix("precision_")


def _list(names: Sequence[str], most: int = 20) -> str:
    shown = ", ".join(repr(name) for name in names[:most]) or "none"
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def whole_steps(steps_N: NDArray[np.float64], source: str) -> NDArray[np.int64]:
    """Steps as whole numbers. Raises InputError where one is not."""
    odd = np.flatnonzero(~(np.abs(steps_N) < 2**53) | (steps_N != np.round(steps_N)))
    if len(odd):
        raise InputError(
            f"{source} holds {steps_N[odd[0]]:g}: steps are whole numbers; name another with --step"
        )
    return steps_N.astype(np.int64)
