"""A run on disk: the place of each file, who may write, and the events of the history that still stands.

Readers of a run read only its folder:

    config.json   model_structure.json   telemetry/*.parquet   events.jsonl   tensorboard/   checkpoints/
    report.html

A run can rewrite its history: a resumed or rolled-back run goes back to step s and trains on from there. It records an event
``rewind`` with ``step = s``, which supersedes everything recorded earlier for steps >= s; every reader drops that.
"""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from stabilitylab.errors import InputError
from stabilitylab.telemetry import Event

try:
    import fcntl
except ImportError:
    # Windows has no advisory locks of this kind: nothing guards runs there against each other.
    fcntl = None  # type: ignore[assignment]


class RunFolder:
    """A run's folder on disk: the place of each file, who may write, and its events.

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
    structure = property(lambda self: self.path / "model_structure.json")

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunFolder:
        """An existing run, for reading. Raises InputError if there is none."""
        run = cls(path)
        if not run.path.is_dir():
            raise InputError(f"{run.path} is not a run folder: there is no such directory")
        if not (run.telemetry.is_dir() or run.events.is_file()):
            raise InputError(f"{run.path} is not a run folder: it holds neither telemetry/ nor events.jsonl")
        return run

    def claim(self) -> None:
        """Make the folder and take the right to write into it, until this process ends or calls ``release``.

        Raises InputError when another process is writing there, as two runs in one folder would mix their histories, or where the
        folder cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("a+", encoding="utf-8")
        except (FileExistsError, NotADirectoryError):
            raise InputError(f"{self.path} cannot be a run folder: a file is in the way") from None
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

    def is_being_written(self) -> bool | None:
        """Whether a process of this machine has claimed the folder; None where the system cannot tell.

        It reads the system's list of locks, since taking the lock to find out would block a run that is about to start.
        """
        try:
            lock = (self.path / ".lock").stat()
            held = Path("/proc/locks").read_text(encoding="ascii")
        except (OSError, UnicodeDecodeError):
            return None
        # By the inode alone: a layered file system (overlayfs) gives another device there.
        return any(f":{lock.st_ino} " in line for line in held.splitlines())

    def release(self) -> None:
        """Give up the right to write."""
        if self._lock is not None:
            if fcntl is not None:
                # Closing is not enough while a process started since still holds the same open file.
                fcntl.flock(self._lock, fcntl.LOCK_UN)
            self._forget()

    def _forget(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def append_events(self, events: Sequence[Event]) -> None:
        """Add lines to ``events.jsonl`` and hand them to the operating system: all, or none if that fails."""
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
        """Complete a last line that a kill cut short, or remove it, so that the next event starts its own line."""
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
        """All events whose history still stands, without those at or after a later ``rewind``'s step.

        Ignores a last line cut short by a kill; any other malformed line raises InputError.
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
    """Close a forked process's copies of open locks. A data loader's worker inherits the lock, not the right to write: if it kept
    the file open, a killed run would stay locked for as long as its workers live."""
    for run in list(_CLAIMED):
        run._forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_claims)


def _brief(path: Path) -> str:
    """A path that fits into a line, without unprintable characters."""
    shown = str(path).replace("\0", "\\0")
    return shown if len(shown) < 200 else f"{shown[:80]}...{shown[-40:]}"


# The run's actions on its history outlive it: a response explains why steps were taken back.
_SURVIVES_REWIND = frozenset(
    {"run-start", "rewind", "response", "interrupted", "telemetry-lost", "checkpoint-lost", "recovered"}
)
