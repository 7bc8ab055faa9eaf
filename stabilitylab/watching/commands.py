"""``stabilitylab watch``: follows a growing log, prints findings, notifies others, and ends where the user asked for it."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Annotated

import tyro

from stabilitylab.errors import InputError
from stabilitylab.watching.alerts import Alert
from stabilitylab.watching.alerts import plain as plain_text
from stabilitylab.watching.kept_state import KeptState, default_folder
from stabilitylab.watching.notifiers import Command, Notifier, Webhook
from stabilitylab.watching.options import Options
from stabilitylab.watching.rules import rules_named
from stabilitylab.watching.standard_input import piped
from stabilitylab.watching.watch import Watch

FAILED = 3
_WAIT_FOR_HOOKS = 30.0


def watch(
    path: Annotated[Path, tyro.conf.Positional],
    *,
    exec: str | None = None,
    webhook: str | None = None,
    fail_on: tuple[str, ...] = (),
    tell: tuple[str, ...] = (),
    silent_after: float = 600.0,
    every: float = 1.0,
    once: bool = False,
    new_only: bool = False,
    plain: bool = False,
    state: Path | None = None,
    loss: str | None = None,
    step: str | None = None,
    run: str | None = None,
    pattern: str | None = None,
) -> int:
    """Follow a growing log and say what is found the moment it is found (docs/watch.md has the rules).

    Ends with exit code 3 when it finds what --fail-on names; with 0 when you interrupt it, or a run folder's run is over.

    Args:
        path: a log of any format in docs/logs.md, a run folder, a TensorBoard folder, a tracker's run; need not exist yet;
            - is standard input.
        exec: a command to run for each alert, without a shell; environment variables STABILITYLAB_... hold the alert's facts.
        webhook: an address to post each alert to, as Slack takes it; env:NAME takes it from the environment.
        fail_on: rules that end the watch with exit code 3, such as spike,divergence,non-finite.
        tell: notices to report as alerts, such as hard-batch.
        silent_after: seconds without a value after which silence is an alert; 0: never.
        every: seconds between two looks.
        once: look once, say what is found, and end.
        new_only: learn from what stands in the log already, but do not report it.
        plain: print lines only, no panel.
        state: folder in which the watch remembers where it stands; by default in ~/.local/state/stabilitylab/watch.
        loss: name of the loss column, where it is not one of the usual names.
        step: name of the step column, likewise.
        run: name of one run, rank or phase in the log.
        pattern: a pattern for the lines of a text log, or a TOML file of patterns (docs/logs.md).
    """
    ends = rules_named(fail_on, "--fail-on")
    options = Options(
        loss=loss,
        step=step,
        run=run,
        pattern=pattern,
        tell=rules_named(tell, "--tell") | (ends & {"hard-batch"}),
        silent_after=silent_after,
        new_only=new_only,
    )
    if not every > 0:
        raise InputError(f"--every {every:g}: give seconds above 0")
    asked = {"loss": loss, "step": step, "run": run, "pattern": pattern}
    stop = _Stop()
    with piped() if str(path) == "-" else contextlib.nullcontext() as pipe:
        while pipe is not None and once and not pipe.ended.is_set() and not stop.asked:
            stop.wait(0.1)
        return _watch(
            path if pipe is None else pipe.file,
            options,
            stop,
            memory_in=(state or default_folder(path, asked)) if pipe is None else pipe.state,
            is_over=(lambda: False) if pipe is None else pipe.ended.is_set,
            ends=ends,
            exec=exec,
            webhook=webhook,
            every=every,
            once=once,
            plain=plain,
        )


def _watch(
    path: Path,
    options: Options,
    stop: _Stop,
    *,
    memory_in: Path,
    is_over: Callable[[], bool],
    ends: frozenset[str],
    exec: str | None,
    webhook: str | None,
    every: float,
    once: bool,
    plain: bool,
) -> int:
    screen = _Screen(live=not plain and not once and sys.stdout.isatty())
    memory = KeptState(memory_in)
    hooks: list[Notifier] = []
    try:
        if exec is not None:
            hooks.append(Command(exec, screen.note))
        if webhook is not None:
            post = Webhook(webhook, screen.note, memory.delivered)
            hooks.append(post)
            for alert in memory.undelivered:
                post.tell(alert)
        found: list[Alert] = []

        def say(alert: Alert) -> None:
            if alert.rule in ends:
                found.append(alert)
            screen.say(alert)

        watched = Watch(
            path=path, options=options, memory=memory, say=say, hooks=tuple(hooks), posts=webhook is not None
        )
        try:
            with _ended_by_signals(stop), screen.showing(watched):
                # Where nobody reads any more, the watch goes on only for hooks and --fail-on.
                others = bool(hooks or ends)
                _look(
                    watched, screen, stop, every=every, once=once, found=found, is_over=is_over, others=others
                )
        finally:
            watched.close()
        if found or (once and memory.has_told(ends)):
            return FAILED
        # Only for a person: a script that looks every hour wants only alerts.
        if once and not watched.announcer.told and sys.stdout.isatty():
            screen.note(_nothing_new(watched))
        return 0
    finally:
        ended = [hook.close(_WAIT_FOR_HOOKS) for hook in hooks]
        if not all(ended):
            screen.note("not every alert could be delivered; a webhook's are tried again by the next watch")
        memory.close()


def _look(
    watched: Watch,
    screen: _Screen,
    stop: _Stop,
    *,
    every: float,
    once: bool,
    found: list[Alert],
    is_over: Callable[[], bool],
    others: bool,
) -> None:
    while not stop.asked and (others or not screen.is_gone):
        last = once or is_over()  # asked before the look, so that it sees all that came before the end
        watched.look(last=last)
        screen.refresh(watched)
        if last or found or watched.is_over:
            return
        stop.wait(every)


def _nothing_new(watched: Watch) -> str:
    said = f"nothing new up to step {watched.step:,}" if watched.step >= 0 else "no value of a loss yet"
    return f"{plain_text(str(watched.path))}: {said}"


class _Stop:
    """Whether a signal has asked for the end. It is no ``threading.Event``: a handler that runs inside its ``wait`` would wait for
    the lock that the interrupted code holds."""

    def __init__(self) -> None:
        self.asked = False

    def wait(self, seconds: float) -> None:
        """Return after this many seconds, or soon after a signal."""
        until = time.monotonic() + seconds
        while not self.asked and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))


@contextlib.contextmanager
def _ended_by_signals(stop: _Stop) -> Iterator[None]:
    """End the watch in order at Ctrl-C, SIGTERM and the end of the terminal's session (but heed ``nohup``). Only the main thread
    gets signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        stop.asked = True

    asks = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        asks.append(signal.SIGHUP)
    before = {one: signal.signal(one, end) for one in asks}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


class _Screen:
    """Lines on standard output, and on a terminal a panel under them.

    A closed terminal, or a pipe whose reader has left, raises OSError at any write. Output then goes nowhere, and ``is_gone`` says
    so; the screen does not decide whether the watch continues.
    """

    def __init__(self, *, live: bool) -> None:
        from rich.console import Console

        self.is_gone = False
        self._console = Console(highlight=False, soft_wrap=True)
        self._wants = live
        self._live: object | None = None
        self._lock = threading.Lock()

    def say(self, alert: Alert) -> None:
        """Write an alert as one line."""
        self._line(alert.line())

    def note(self, text: str) -> None:
        """Write what went wrong with telling others; from any thread."""
        with self._lock, contextlib.suppress(OSError, ValueError):
            print(text, file=sys.stderr, flush=True)

    def _line(self, text: str) -> None:
        def write() -> None:
            if self._live is not None:
                self._console.print(text, markup=False)
            else:
                print(text, flush=True)

        with self._lock:
            self._written(write)

    def _written(self, write: Callable[[], object]) -> None:
        """Write, if anybody is there."""
        try:
            try:
                write()
            except (
                BlockingIOError
            ):  # another program has made the shared terminal non-blocking, so a write did not wait
                with contextlib.suppress(OSError, ValueError):
                    os.set_blocking(sys.stdout.fileno(), True)
                write()
        except OSError:
            self.is_gone = True
            # Buffered output would be written at the end of the process, and fail there.
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, sys.stdout.fileno())
                os.close(nowhere)

    @contextlib.contextmanager
    def showing(self, watched: Watch) -> Iterator[None]:
        """Show a panel, where there is a terminal."""
        if not self._wants:
            yield
            return
        from rich.live import Live

        from stabilitylab.watching.panel import panel

        live = Live(
            panel(watched, width=self._console.width),
            console=self._console,
            auto_refresh=False,
            transient=False,
        )
        self._written(live.start)
        self._live = live
        try:
            yield
        finally:
            self._live = None
            self._written(live.stop)

    def refresh(self, watched: Watch) -> None:
        """Redraw the panel; without one, check whether somebody still reads, as a quiet log writes nothing for days."""
        if self._live is None:
            self.is_gone |= _has_no_reader()
            return
        from rich.live import Live

        from stabilitylab.watching.panel import panel

        live = self._live
        assert isinstance(live, Live)
        with self._lock:
            self._written(lambda: live.update(panel(watched, width=self._console.width), refresh=True))


def _has_no_reader() -> bool:
    """Whether standard output is a pipe, or a terminal, whose other end is closed."""
    if not hasattr(select, "poll"):  # Windows
        return False
    try:
        asked = select.poll()
        asked.register(sys.stdout.fileno(), 0)
        return any(state & (select.POLLERR | select.POLLHUP) for _, state in asked.poll(0))
    except (OSError, ValueError):
        return False
