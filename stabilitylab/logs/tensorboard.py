"""TensorBoard event files: which of them form one run, and which of its values still stand.

TensorBoard takes a folder for a run. The reader tells files in and under the given folder apart so:

    another folder, another suffix of the name   another run; ``val``, ``eval``, ``test`` in it: an evaluation run, left out
    one file after another                       the same run, begun again: steps from its first one on replace the older ones
    files at the same time, of other tags        writers of one run, joined side by side
    files at the same time, of the same tags     two runs
    ``purge_step`` (a session's START at step s) drops earlier values of steps from s on

Where several runs have a training loss, the user must name one. Tags of the HParams page are no curves.

Memory: 17 bytes per value of the columns read.
"""

from __future__ import annotations

import contextlib
import heapq
import io
import itertools
import logging
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from stabilitylab.errors import InputError
from stabilitylab.logs.column_names import EVALUATION, STEP
from stabilitylab.logs.columns import choose_columns
from stabilitylab.logs.log import Log, RowBlock
from stabilitylab.logs.records import PEEK, LoggedRecord, gather

# Name, time, host, process and number; what follows is the writer's own ``filename_suffix``.
_SUFFIX = re.compile(r"tfevents\.\d+\..*?\.\d+\.\d+(\D.*)?$")
_START = 1  # SessionLog.START
_MOST_NAMED = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorBoardLog(Log):
    """The scalars of one run.

    Attributes:
        files: each writer's files, in the order of writing.
        evaluation_runs: names of the folder's evaluation runs, which are not read.
    """

    files: tuple[tuple[Path, ...], ...]
    evaluation_runs: tuple[str, ...] = ()

    @classmethod
    def open_files(
        cls, path: Path, files: Sequence[Path], *, loss: str | None = None, step: str | None = None
    ) -> Self:
        """The one run of training among ``files``.

        Raises:
            InputError: there is none, or there are several, which the message names.
        """
        found = cls.open_runs(path, files, loss=loss, step=step)
        if len(found) > 1:
            shown = ", ".join(one.name for one in found[:_MOST_NAMED])
            more = f" and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
            raise InputError(f"{path} holds {len(found)} runs: {shown}{more}; give one of them")
        return found[0]

    @classmethod
    def open_runs(
        cls, path: Path, files: Sequence[Path], *, loss: str | None = None, step: str | None = None
    ) -> list[Self]:
        """Every run of training among ``files``.

        Raises:
            InputError: there is none.
        """
        if step is not None:
            raise InputError(f"{path}: TensorBoard files have steps of their own; leave out --step")
        runs = _runs(path, files)
        names = {run: _tags(writers) for run, writers in runs.items()}
        if not any(names.values()):
            raise InputError(f"{path} holds no scalars: is it a TensorBoard event file?")
        columns: dict[str, dict[str, str]] = {}
        problem: InputError | None = None
        for run, tags in names.items():
            if tags:
                try:
                    columns[run] = choose_columns(tags, source=path, loss=loss)
                except InputError as error:
                    problem = problem or error
        if not columns:
            assert problem is not None
            raise problem
        training = [run for run in columns if not _is_of_evaluation(run)] or list(columns)
        others = tuple(other for other in columns if other not in training)
        for run in training:
            columns[run].pop(STEP, None)
        return [
            cls(
                path=path,
                name=run if len(training) > 1 else "",
                format="TensorBoard",
                columns=columns[run],
                files=runs[run],
                evaluation_runs=others,
            )
            for run in training
        ]

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about how the log was read."""
        return (
            (f"left out, as of evaluation: {', '.join(self.evaluation_runs)}",)
            if self.evaluation_runs
            else ()
        )

    def blocks(self) -> Iterator[RowBlock]:
        wanted = tuple(self.columns.values())
        writers = [_standing(files, wanted) for files in self.files]
        # Steps of several writers rise side by side; those of a single one keep the file's order.
        records = writers[0] if len(writers) == 1 else heapq.merge(*writers, key=lambda record: record[0])
        return gather(records, self.columns, self.path)


@dataclass(slots=True)
class _Extent:
    """A file's tags, its time of writing, and its first step."""

    tags: set[str]
    first: float = float("inf")
    last: float = float("-inf")


def _runs(path: Path, files: Sequence[Path]) -> dict[str, tuple[tuple[Path, ...], ...]]:
    """Run name -> the run's writers, each as its files in order."""
    groups: dict[tuple[Path, str], list[Path]] = {}
    for file in sorted(files):
        groups.setdefault((file.parent, suffix_of(file)), []).append(file)
    runs: dict[str, tuple[tuple[Path, ...], ...]] = {}
    for (folder, suffix), same in groups.items():
        inside = path.is_dir() and folder != path
        place = str(folder.relative_to(path)) if inside else "."
        name = place if not suffix else f"{place} ({suffix})"
        writers = _writers(same)
        tags = (
            [set().union(*(_extent(file).tags for file in writer)) for writer in writers]
            if len(writers) > 1
            else []
        )
        if all(a.isdisjoint(b) for a, b in itertools.combinations(tags, 2)):
            runs[name] = tuple(tuple(writer) for writer in writers)
        else:
            runs |= {
                str(w[0].relative_to(path) if path.is_dir() else w[0].name): (tuple(w),) for w in writers
            }
    return runs


def event_files(path: Path) -> list[Path]:
    """The event files in and under a folder, or the one file, by name: a writer's files in order of time."""
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.rglob("*tfevents*") if file.is_file())


def suffix_of(file: Path) -> str:
    """The suffix that a writer adds to its files' names."""
    found = _SUFFIX.search(file.name)
    return (found and found[1]) or ""


def _writers(files: Sequence[Path]) -> list[list[Path]]:
    """Group files by writer: those that follow each other in time are one writer's, those that overlap are several's."""
    if len(files) == 1:
        return [list(files)]
    writers: list[tuple[list[Path], float]] = []
    for file in files:
        extent = _extent(file)
        for i, (before, last) in enumerate(writers):
            if extent.first >= last:
                writers[i] = [*before, file], max(last, extent.last)
                break
        else:
            writers.append(([file], extent.last))
    return [found for found, _ in writers]


def _extent(file: Path) -> _Extent:
    extent = _Extent(set())
    for event in _events(file):
        if tags := [tag for tag, _ in scalars(event)]:
            extent.tags.update(tags)
            extent.first, extent.last = min(extent.first, event.wall_time), max(extent.last, event.wall_time)
    return extent


def _tags(writers: Sequence[Sequence[Path]]) -> list[str]:
    """The tags at the beginning of each file, in the order of first appearance."""
    found: dict[str, None] = {}
    for file in itertools.chain(*writers):
        values = (tag for event in _events(file) for tag, _ in scalars(event))
        found |= dict.fromkeys(itertools.islice(values, PEEK))
    return [tag for tag in found if not tag.startswith(("hparam/", "_hparams_"))]


def _standing(files: Sequence[Path], wanted: Sequence[str]) -> Iterator[LoggedRecord]:
    """One writer's values of these tags, without superseded ones."""
    number = {tag: i for i, tag in enumerate(wanted)}
    steps, values, tags = array("d"), array("d"), array("b")
    for place, file in enumerate(files):
        begins = place > 0
        for event in _events(file):
            starts = event.HasField("session_log") and event.session_log.status == _START
            rows = [(number[tag], value) for tag, value in scalars(event) if tag in number]
            if starts or (begins and rows):
                begins = False
                steps, values, tags = _before(event.step, steps, values, tags)
            for tag, value in rows:
                steps.append(float(event.step))
                values.append(value)
                tags.append(tag)
    for step, value, tag in zip(steps, values, tags, strict=True):
        yield step, {wanted[tag]: value}


def _before(step: int, steps: array[float], values: array[float], tags: array[int]) -> Any:
    stand = np.frombuffer(steps, dtype=np.float64) < step if len(steps) else np.empty(0, np.bool_)
    if stand.all():
        return steps, values, tags
    return tuple(
        array(kept.typecode, np.frombuffer(kept, dtype=kept.typecode)[stand].tobytes())
        for kept in (steps, values, tags)
    )


def _events(file: Path) -> Iterator[Any]:
    with contextlib.redirect_stdout(io.StringIO()):  # its import and loader print notices
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of a last record cut short
    try:
        yield from EventFileLoader(str(file)).Load()
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{file} is not a TensorBoard event file: {error}") from None


def scalars(event: Any) -> Iterator[tuple[str, float]]:
    """An event's tags and numbers, in either of the two forms."""
    for value in event.summary.value:
        if value.HasField("tensor"):
            from tensorboard.util.tensor_util import make_ndarray

            tensor = make_ndarray(value.tensor)
            if tensor.size == 1 and np.issubdtype(tensor.dtype, np.number):
                yield value.tag, float(tensor.reshape(()))
        elif value.HasField("simple_value"):
            yield value.tag, float(value.simple_value)


def _is_of_evaluation(run: str) -> bool:
    return EVALUATION.search(re.sub(r"[^0-9a-z]+", "_", run.lower())) is not None
