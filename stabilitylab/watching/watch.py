"""The watch: looks at a log again and again, and says what is new."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any

from stabilitylab.errors import InputError
from stabilitylab.logs.binary import NoLogError
from stabilitylab.logs.locate import LocatedLog, locate, version_of
from stabilitylab.spikes.episodes import KINDS
from stabilitylab.telemetry import DEPARTURES, LOSS
from stabilitylab.watching.alerts import Alert, of_silence, plain
from stabilitylab.watching.announcer import Announcer
from stabilitylab.watching.follower_choice import Followed, follower_of
from stabilitylab.watching.followers import DocumentFollower, NewRows, TextFollower
from stabilitylab.watching.judge import PATIENCE, Judge
from stabilitylab.watching.kept_state import KeptState
from stabilitylab.watching.notifiers import Notifier
from stabilitylab.watching.options import Options
from stabilitylab.watching.stores import is_abandoned

SAVE_SECONDS = 5.0
LOCATE_SECONDS = 10.0
FLUSH_SECONDS = 3.0
# A file just being replaced, or a network disk that does not answer, counts only after so long.
UNREACHABLE_SECONDS = 60.0
# A run folder's own events that are passed on, besides the detector's.
KINDS_OF_RUNS = frozenset(KINDS) | DEPARTURES | {"empty-steps", "telemetry-lost"}
# This much text of no known format is more than a trainer's preface.
_UNKNOWN_BYTES = 1 << 20


@dataclass(slots=True, kw_only=True)
class Watch:
    """Looks at one log again and again.

    Attributes:
        path: the log's.
        options: how to watch it.
        memory: keeps what was said, and where the watch stands.
        say, hooks, posts: as ``Announcer`` has them.
        announcer: says the findings.
        judges: segment -> its judge.
        values: rows taken so far.
        last_value: seconds since 1970, of the latest value; None: there has been none.
        problem: why the watch reads nothing; None: it does read.
        is_over: whether the run has said that it is over.
    """

    path: Path
    options: Options
    memory: KeptState
    say: InitVar[Callable[[Alert], object]]
    hooks: InitVar[tuple[Notifier, ...]] = ()
    posts: InitVar[bool] = False
    announcer: Announcer = field(init=False)
    judges: dict[str, Judge] = field(default_factory=dict)
    values: int = 0
    last_value: float | None = None
    problem: str | None = None
    is_over: bool = False
    _source: Followed | None = None
    _is_recorded: bool = False
    _is_silent: bool = False
    _saved: Mapping[str, Any] | None = None
    _saved_at: float = 0.0
    _located_at: float = 0.0
    _retry_at: float = 0.0
    _news_at: float = 0.0
    _began: float = 0.0
    _dirty: bool = False
    _place: str = ""
    _unreachable_since: float | None = None

    def __post_init__(self, say: Callable[[Alert], object], hooks: tuple[Notifier, ...], posts: bool) -> None:
        self.announcer = Announcer(
            path=self.path, tell=self.options.tell, memory=self.memory, say=say, hooks=hooks, posts=posts
        )
        self._began = self._news_at = time.time()
        # Now, as the folder in which the watch began may be gone later.
        self._place = str(self.path.resolve())
        self._saved = self.memory.load()
        if self._saved is None:
            self.announcer.is_quiet = self.options.new_only
            return
        saved = self._saved
        if saved["path"] != self._place:
            raise InputError(
                f"{self.memory.folder} is the state of a watch of {saved['path']}: give --state another folder"
            )
        if saved["asked"] != self._asked():
            self._saved = None  # another loss, or another run: from the start
            return
        self.values, self.announcer.open = saved["values"], dict(saved["open"])
        self._is_recorded, self._is_silent = saved["recorded"], saved["silent"]
        for name, state in saved["judges"].items():
            self._judge(name).load_state_dict(state)

    def _asked(self) -> list[str | None]:
        return [self.options.loss, self.options.step, self.options.run, self.options.pattern]

    # -----------------------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """The newest step of a loss in any segment; -1 before the first."""
        return max((judge.curves[LOSS].step for judge in self.judges.values()), default=-1)

    def look(self, *, last: bool = False) -> bool:
        """Read what is new and tell its findings; returns whether anything was new.

        Raises:
            InputError: the log cannot be understood, and waiting will not help or (``last``) is over.
        """
        source = self._follow(last=last)
        news = False
        if source is not None:
            try:
                for batch in source.follower.poll(last=last):
                    self._take(source, batch)
                    news = True
                self._unreachable_since = None
            except InputError as error:
                if last or (isinstance(error, NoLogError) and not self.values):
                    raise
                self._unreadable(error)
            except OSError as error:
                self._unreachable(error, last=last)
            still = time.time() - self._news_at
            if not news and isinstance(source.follower, TextFollower) and still > FLUSH_SECONDS:
                for batch in source.follower.flush():
                    self._take(source, batch)
            self._settle(source, last=last)
        self._listen(source, news=news)
        self.announcer.is_quiet = self.announcer.is_quiet and not news and source is None
        self._dirty |= news
        if self._dirty and time.monotonic() - self._saved_at > SAVE_SECONDS:
            self.save()
        return news

    def save(self) -> None:
        """Write the state to disk."""
        source = self._source
        began = time.monotonic()
        self.memory.save(
            {
                "path": self._place,
                "asked": self._asked(),
                "values": self.values,
                "open": self.announcer.open,
                "recorded": self._is_recorded,
                "silent": self._is_silent,
                "judges": {name: judge.state_dict() for name, judge in self.judges.items()},
                "source": None
                if source is None
                else {
                    "kind": source.found.kind,
                    "file": str(source.found.files[-1]),
                    "prefix": source.prefix,
                    "follower": type(source.follower).__name__,
                    "state": source.follower.state,
                },
            }
        )
        # Hundreds of ranks make a large state: spend at most a fiftieth of the time on writing it.
        self._saved_at = time.monotonic() + 50 * (time.monotonic() - began)
        self._dirty = False

    def close(self) -> None:
        """Save the state, and close the followed files; the memory's owner closes that."""
        self.save()
        if self._source is not None:
            self._source.follower.close()

    # ------------------------------------------------------------------------------------------ what is followed

    def _follow(self, *, last: bool) -> Followed | None:
        now = time.monotonic()
        if self._source is not None and now - self._located_at < LOCATE_SECONDS:
            return self._source
        if self._source is None and now < self._retry_at and not last:
            return None
        self._located_at = now
        try:
            if self._source is not None and not self.path.is_dir():
                return self._source
            found = locate(self.path)
            if self._source is None:
                self._source = self._opened(found)
            elif found.kind == "W&B" or found.files[-1] != self._source.found.files[-1]:
                self._change(self._source, found)
            self.problem = None
        except NoLogError:
            raise
        except (InputError, OSError) as error:
            missing = isinstance(error, FileNotFoundError)
            said = f"{self.path} is not there yet" if missing else " ".join(str(error).split())
            self.problem = said
            if last and self._source is None:
                raise InputError(
                    f"{self.path}: there is no such file or folder" if missing else said
                ) from None
            if not missing and self._source is None and self._is_long():
                self._unreadable(InputError(said))
        # Searching a long preface, or a folder, again and again gets a twentieth of the time. Read a short file at every look,
        # however long this one took: the machine may have stood still for a moment.
        if self._is_slow_to_read():
            self._retry_at = time.monotonic() + 20 * (time.monotonic() - now)
        return self._source

    def _is_slow_to_read(self) -> bool:
        try:
            return self.path.is_dir() or self._is_long()
        except OSError:
            return True

    def _is_long(self) -> bool:
        try:
            return self.path.is_file() and self.path.stat().st_size > _UNKNOWN_BYTES
        except OSError:
            return False

    def _unreachable(self, error: OSError, *, last: bool) -> None:
        """Note that a file went away between two looks, or its disk does not answer; the next look tries again."""
        said = f"{error.filename or self.path}: {(error.strerror or type(error).__name__).lower()}"
        if last:
            raise InputError(said) from None
        self.problem = plain(said)
        now = time.monotonic()
        self._unreachable_since = self._unreachable_since or now
        if now - self._unreachable_since > UNREACHABLE_SECONDS:
            self._unreadable(InputError(said))

    def _unreadable(self, error: InputError) -> None:
        """Say the problem once; the watch still reads a log that is mended, or a trainer that begins at last."""
        said = plain(" ".join(str(error).split()))
        self.problem = said
        self.announcer.announce(
            Alert(
                id=f"unreadable/{said}",
                rule="unreadable",
                text=f"unreadable: {said}",
                path=plain(str(self.path)),
            )
        )

    def _opened(self, found: LocatedLog) -> Followed | None:
        saved = self._saved["source"] if self._saved else None
        state, prefix = None, version_of(found.files[-1]) if found.kind == "versions" else ""
        if saved is not None and saved["kind"] == found.kind:
            state, prefix = saved["state"], saved["prefix"]
            if found.kind == "versions" and saved["file"] != str(found.files[-1]):
                state, prefix = None, version_of(found.files[-1])
        follower = follower_of(found, self.path, self.options, state, saved["follower"] if saved else None)
        self._saved = None if follower is not None else self._saved
        return None if follower is None else Followed(found, follower, prefix)

    def _change(self, source: Followed, found: LocatedLog) -> None:
        """Follow the folder's new latest file: the next checkpoint, a new version, one more run."""
        if found.kind == "W&B" == source.found.kind:
            source.found, source.follower._files = found, list(found.files)  # type: ignore[attr-defined]
        elif isinstance(source.follower, DocumentFollower) and found.kind == "file":
            source.found, source.follower.path = found, found.files[-1]
        elif found.kind not in ("TensorBoard", "MLflow", "run folder"):
            follower = follower_of(found, self.path, self.options)
            if follower is not None:
                source.follower.close()
                prefix = version_of(found.files[-1]) if found.kind == "versions" else found.files[-1].name
                self._source = Followed(found, follower, prefix)

    # ------------------------------------------------------------------------------------------------ what it says

    def _judge(self, name: str) -> Judge:
        if name not in self.judges:
            self.judges[name] = Judge(name, self.path, loss=self.options.loss, step=self.options.step)
        return self.judges[name]

    def _take(self, source: Followed, batch: NewRows) -> None:
        if batch.anew:
            self.judges.clear()
            self.announcer.open.clear()
            self.values = 0
            return
        if batch.turn:
            for judge in self.judges.values():
                judge.turn()
            what = "another file has taken its name" if batch.turn == "rotated" else "it begins anew"
            self.announcer.notice(batch.turn, f"{batch.turn}/{self.values}/{len(batch.rows)}", what)
        if batch.events:
            self._is_recorded |= any(event.kind in KINDS for event in batch.events)
            self.announcer.hear(((0, event) for event in batch.events if event.kind in KINDS_OF_RUNS), "", {})
            for event in batch.events:
                self.is_over = event.kind == "run-end" or (
                    self.is_over and event.kind in ("diagnosis", "checkpoint")
                )
            if self.is_over:
                step = batch.events[-1].step
                self.announcer.notice("run-ended", f"run-ended/{step}", "the run is over", step=step)
        parts: dict[str, list[Mapping[str, float | None]]] = {}
        for part, values in batch.rows:
            parts.setdefault(f"{source.prefix} {part}".strip(), []).append(values)
        for name, rows in parts.items():
            self.values += len(rows)
            if self.options.run is not None and self.options.run not in name:
                continue
            judge = self._judge(name)
            found = judge.take(rows, source.follower.reading)
            for step, before in judge.restarts:
                said = f"steps went back from {before} to {step}"
                self.announcer.notice(
                    "restarted", f"{name}/restarted/{judge.piece}/{before}/{step}", said, name, step
                )
            judge.restarts.clear()
            if not self._is_recorded:
                self.announcer.hear(found, name, judge.columns)

    def _settle(self, source: Followed, *, last: bool) -> None:
        """Rows have come without a loss: wait, or say what a finished log would get."""
        if any(judge.columns for judge in self.judges.values()) or not self.judges:
            self.problem = None if self.judges else self.problem
            if not self.judges and last and not self._is_recorded:
                run = f" of a run {self.options.run!r}" if self.options.run else ""
                raise InputError(f"{self.path} holds no values{run} ({source.follower.reading.format})")
            return
        error = next((judge.problem for judge in self.judges.values() if judge.problem), None)
        if error is None:
            return
        self.problem = str(error)
        if last or self.values > PATIENCE:
            raise error

    def _listen(self, source: Followed | None, *, news: bool) -> None:
        """Report silence."""
        now = time.time()
        if news:
            # Values already there are as old as the file.
            seen = source.follower.changed() if source is not None and self.last_value is None else None
            self.last_value = min(now, seen) if seen is not None else now
            self._news_at = now
            if self._is_silent and now - self.last_value < self.options.silent_after:
                self._is_silent = False
                self.announcer.notice("speaking-again", f"speaking/{self.values}", "values again")
        elif (
            self.last_value is None and source is not None and (seen := source.follower.changed()) is not None
        ):
            self.last_value = min(now, seen)
        if self.is_over or self.options.silent_after <= 0 or self._is_silent:
            return
        since = self.last_value if self.last_value is not None else self._began
        if now - since > self.options.silent_after:
            self._is_silent = self._dirty = True
            lost = is_abandoned(source and source.follower)
            self.announcer.announce(
                of_silence(str(self.path), self.values, round(now - since), self.step, self.problem, lost)
            )
