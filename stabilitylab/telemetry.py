"""What a measurement is: its name, the samples of a flush, events, and the run folder that holds them.

A metric is ``family/site/statistic``. The *family* says what was measured (gradient, attention, activation, update,
precision, train), the *site* where, as the module or parameter path that the model itself uses, or ``-`` for the run as
a whole, the *statistic* how it was summarised:

    gradient/layers.3.attention.query_key_value.weight/l2
    attention/layers.3.attention/score_max                  one value a head, told apart by the index
    activation/layers.3.feed_forward.down/kurtosis
    precision/-/loss_scale
    train/-/loss

A ``Key`` is a metric and an index (-1 for a scalar). Samples are tidy columns (step, key, value); an ``Event`` is one
line of ``events.jsonl``. Whoever reads a run reads the run folder and nothing else:

    config.json   telemetry/*.parquet   events.jsonl   tensorboard/   checkpoints/   report.html

History can be rewritten: a resumed or rolled-back run goes back to step s and trains on from there. That is the event
``rewind`` with ``step = s``: everything recorded earlier for steps >= s is superseded, and every reader drops it.
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from stabilitylab.errors import InputError

try:
    import fcntl
except ImportError:
    # Windows has no advisory locks of this kind; runs there are not guarded against each other.
    fcntl = None  # type: ignore[assignment]

RUN_SITE = "-"
SCALAR = -1


@dataclass(frozen=True, slots=True, order=True)
class Key:
    """The name of one number: ``family/site/statistic`` and, for vectors, the index in it (-1 for a scalar)."""

    family: str
    site: str
    statistic: str
    index: int = SCALAR

    @property
    def metric(self) -> str:
        """``family/site/statistic``, without the index."""
        return f"{self.family}/{self.site}/{self.statistic}"

    @classmethod
    def parse(cls, metric: str, index: int = SCALAR) -> Key:
        """Split ``family/site/statistic``. Sites may hold slashes; family and statistic may not.

        The site is empty where the model itself is a site: a module's path in itself.
        """
        family, _, rest = metric.partition("/")
        site, slash, statistic = rest.rpartition("/")
        if not (family and slash and statistic):
            raise InputError(f"metric {metric!r} is not of the form family/site/statistic")
        return cls(family, site, statistic, index)


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """The numbers of one flush, as tidy columns of equal length: ``value[i]`` was seen for ``keys[key[i]]`` at ``step[i]``.

    ``keys`` is the same tuple object from flush to flush as long as the set of metrics is unchanged, so a sink can
    cache by its identity. Values are float64 and may be NaN or infinite: what was seen is recorded.
    """

    keys: tuple[Key, ...]
    step: NDArray[np.int64]
    key: NDArray[np.int32]
    value: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.value)

    def __iter__(self) -> Iterator[tuple[int, Key, float]]:
        """Row by row, for tests and small sinks; large ones read the columns."""
        for step, key, value in zip(self.step.tolist(), self.key.tolist(), self.value.tolist(), strict=True):
            yield step, self.keys[key], value

    @classmethod
    def of(cls, rows: Iterable[tuple[int, Key, float]]) -> Samples:
        """Build from rows ``(step, key, value)``."""
        rows = list(rows)
        keys = tuple(dict.fromkeys(key for _, key, _ in rows))
        number = {key: i for i, key in enumerate(keys)}
        return cls(
            keys,
            np.array([step for step, _, _ in rows], dtype=np.int64),
            np.array([number[key] for _, key, _ in rows], dtype=np.int32),
            np.array([value for _, _, value in rows], dtype=np.float64),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened at a step: a spike, a response, a checkpoint, a rewind.

    Kinds that the project writes: ``run-start``, ``run-end``, ``interrupted``, ``checkpoint``, ``rewind``, the detector's
    ``hard-batch``, ``spike``, ``divergence``, ``non-finite``, ``loss-scale-collapse``, their ``diagnosis``, the
    responder's ``response``, ``recovered`` (a damaged checkpoint was passed over), ``parameters-joined`` (an optimizer was
    given more of them), and ``checkpoint-lost`` and ``telemetry-lost`` (one could not be written; training went on).
    """

    step: int
    kind: str
    data: Mapping[str, Any] = field(default_factory=dict)
    time: float = field(default_factory=time.time)

    def to_json(self) -> str:
        """One line of strict JSON. Non-finite numbers become the strings "nan", "inf", "-inf"."""
        body = {"step": self.step, "kind": self.kind, "time": self.time, "data": _plain(self.data)}
        return json.dumps(body, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Event:
        body = json.loads(line)
        return cls(step=body["step"], kind=body["kind"], time=body["time"], data=body["data"])


def _plain(value: Any) -> Any:
    """Numbers, strings, lists and dictionaries that strict JSON can hold."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(v) for v in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, Path):
        return str(value)
    return value


class RunFolder:
    """A run's folder on disk: where each thing lies, who may write, and its events.

    Args:
        path: the folder; need not exist for reading its paths.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock: IO[str] | None = None

    config = property(lambda self: self.path / "config.json")
    telemetry = property(lambda self: self.path / "telemetry")
    events = property(lambda self: self.path / "events.jsonl")
    tensorboard = property(lambda self: self.path / "tensorboard")
    checkpoints = property(lambda self: self.path / "checkpoints")
    report = property(lambda self: self.path / "report.html")

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunFolder:
        """A run that exists, for reading. Raises InputError where there is none."""
        run = cls(path)
        if not run.path.is_dir():
            raise InputError(f"{run.path} is not a run folder: there is no such directory")
        if not (run.telemetry.is_dir() or run.events.is_file()):
            raise InputError(f"{run.path} is not a run folder: it holds neither telemetry/ nor events.jsonl")
        return run

    def claim(self) -> None:
        """Make the folder and take the right to write into it, until this process ends or ``release`` is called.

        Raises InputError when another process is writing there: two runs in one folder would mix their histories. Also
        where the folder cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("a+", encoding="utf-8")
        except (FileExistsError, NotADirectoryError):
            raise InputError(f"{self.path} cannot be a run folder: a file stands in the way") from None
        except OSError as error:
            if error.errno in (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            reason = os.strerror(error.errno).lower()
            raise InputError(
                f"{_brief(self.path)} cannot be written: {reason}; choose another folder"
            ) from None
        except ValueError as error:  # a null byte
            raise InputError(f"{_brief(self.path)} is no path ({error}): choose another folder") from None
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                raise InputError(
                    f"{self.path} is being written by another run: wait for it, or choose another folder"
                ) from None
        self._lock = lock
        _CLAIMED.add(self)
        self._mend_events()

    def release(self) -> None:
        """Give the right to write back."""
        if self._lock is not None:
            if fcntl is not None:
                # Closing is not enough while a process started meanwhile still holds the same open file.
                fcntl.flock(self._lock, fcntl.LOCK_UN)
            self._forget()

    def _forget(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def append_events(self, events: Sequence[Event]) -> None:
        """Add lines to ``events.jsonl`` and hand them to the operating system: all of them, or none where that fails."""
        if not events:
            return
        lines = "".join(event.to_json() + "\n" for event in events).encode()
        with self.events.open("ab", buffering=0) as file:
            end = file.tell()
            written = 0
            try:
                while written < len(lines):
                    written += file.write(lines[written:])
            except OSError as error:
                file.truncate(end)
                error.filename = str(self.events)
                raise

    def _mend_events(self) -> None:
        """Give a last line that a kill cut short its end, or take it away: the next event starts a line of its own."""
        if not self.events.is_file():
            return
        with self.events.open("r+b") as file:
            *_, last = file.read().split(b"\n")
            if not last:
                return
            try:
                Event.from_json(last.decode())
                file.write(b"\n")
            except (ValueError, KeyError, TypeError):
                file.truncate(file.tell() - len(last))

    def read_events(self) -> list[Event]:
        """All events whose history still stands: those at or after a later ``rewind``'s step are dropped.

        A last line cut short by a kill is ignored; any other malformed line is an InputError.
        """
        if not self.events.is_file():
            return []
        lines = self.events.read_text(encoding="utf-8", errors="replace").split("\n")
        standing: list[Event] = []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                event = Event.from_json(line)
            except (ValueError, KeyError, TypeError):
                if number >= len(lines) - 1:
                    continue
                raise InputError(
                    f"{self.events}, line {number} is not an event: repair or remove the line"
                ) from None
            if event.kind == "rewind":
                standing = [e for e in standing if e.step < event.step or e.kind in _SURVIVES_REWIND]
            standing.append(event)
        return standing


_CLAIMED: weakref.WeakSet[RunFolder] = weakref.WeakSet()


def _leave_claims() -> None:
    """A forked process (a data loader's worker) has inherited the open lock, not the right to write: were it to keep the
    file open, a run that is killed would stay locked for as long as its workers live."""
    for run in list(_CLAIMED):
        run._forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_claims)


def _brief(path: Path) -> str:
    """A path that fits into a line, without what would not print."""
    shown = str(path).replace("\0", "\\0")
    return shown if len(shown) < 200 else f"{shown[:80]}...{shown[-40:]}"


# What the run did about its history outlives the history itself: a response explains why steps were taken back.
_SURVIVES_REWIND = frozenset(
    {"run-start", "rewind", "response", "interrupted", "telemetry-lost", "checkpoint-lost", "recovered"}
)
