"""Tells a command and a webhook of alerts, each in its own thread, so that the watch itself never waits.

*Command.* The watch splits it into words once, by the shell's rules but without a shell; no part of an alert ever enters it. The
facts are environment variables (``alerts``). It may run for a minute; a failure is one line.

*Webhook.* A POST of JSON, with a timeout and retries after 1, 2 and 4 seconds where the server fails, is too busy or cannot be
reached; any other answer is final. The watch tries an abandoned alert once more after a minute, then at growing intervals, and as
soon as the server has taken another. It follows no redirects. An address holds its secret, so messages name only the host, and
``env:NAME`` takes it from the environment, hidden from the process list.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import queue
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import deque
from collections.abc import Callable
from typing import Any

from stabilitylab.errors import InputError
from stabilitylab.watching.alerts import Alert, plain

COMMAND_SECONDS = 60.0
WEBHOOK_SECONDS = 10.0
PAUSES = (1.0, 2.0, 4.0)
LATE_SECONDS = (60.0, 900.0)  # until another try of an abandoned alert: at first, at the longest
_MOST_LATE = 1000
_LONGEST_PAUSE = 30.0
_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})


class Notifier:
    """Delivers alerts one after the other, in its own thread.

    Args:
        say: takes a line about what went wrong.
        done: takes each alert that needs no further try.
        late: seconds until another try of an abandoned alert, at first and at the longest.
    """

    def __init__(
        self,
        say: Callable[[str], object],
        done: Callable[[Alert], object] | None = None,
        *,
        late: tuple[float, float] = LATE_SECONDS,
    ) -> None:
        self._say, self._done, self._late = say, done, late
        self._queue: queue.SimpleQueue[Alert | None] = queue.SimpleQueue()
        self._ending = threading.Event()
        self._thread = threading.Thread(
            target=self._run, name=f"stabilitylab-{type(self).__name__}", daemon=True
        )
        self._thread.start()

    def tell(self, alert: Alert) -> None:
        """Queue the alert; returns at once."""
        self._queue.put(alert)

    def close(self, seconds: float) -> bool:
        """Wait at most so long for deliveries under way; False: something was left untold."""
        self._queue.put(None)
        self._thread.join(seconds)
        self._ending.set()
        return not self._thread.is_alive()

    def _run(self) -> None:
        given_up: deque[Alert] = deque(maxlen=_MOST_LATE)
        pause, longest = self._late
        while True:
            try:
                alert = self._queue.get(timeout=pause if given_up else None)
            except queue.Empty:
                if self._tried(self.deliver_late, given_up[0]):
                    given_up.popleft()
                    pause = 0.0  # the next one at once
                else:
                    pause = min(2 * pause, longest) or self._late[0]
                continue
            if alert is None:
                return
            if not self._tried(self.deliver, alert):
                given_up.append(alert)
                pause = pause or self._late[0]
            elif given_up:
                pause = 0.0

    def _tried(self, deliver: Callable[[Alert], bool], alert: Alert) -> bool:
        """Whether no further try is needed."""
        try:
            if not deliver(alert):
                return False
            if self._done is not None:
                self._done(alert)
        except Exception as error:  # the watch goes on, whatever happens to its messenger
            self._say(f"{type(self).__name__.lower()}: {type(error).__name__}: {error}")
        return True

    def deliver(self, alert: Alert) -> bool:
        """Deliver the alert; returns whether no further try is needed."""
        raise NotImplementedError

    def deliver_late(self, alert: Alert) -> bool:
        """``deliver`` an abandoned alert, without a message."""
        return self.deliver(alert)


class Command(Notifier):
    """Runs a program for each alert.

    Args:
        command: program and arguments.

    Raises:
        InputError: the command cannot be split, or there is no such program.
    """

    def __init__(
        self, command: str, say: Callable[[str], object], *, seconds: float = COMMAND_SECONDS
    ) -> None:
        try:
            self._words = shlex.split(command)
        except ValueError as error:
            raise InputError(f"--exec {command!r}: {error}") from None
        if not self._words or shutil.which(self._words[0]) is None:
            raise InputError(f"--exec {command!r}: there is no such program; it is not run in a shell")
        self._seconds = seconds
        self._running: subprocess.Popen[bytes] | None = None
        super().__init__(say)

    def deliver(self, alert: Alert) -> bool:
        # Into a file: a pipe would make us wait for as long as any process that the command started holds it.
        with tempfile.TemporaryFile() as output:
            try:
                self._running = subprocess.Popen(
                    self._words,
                    env={**os.environ, **alert.environment()},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                self._say(f"--exec: {self._words[0]} cannot be run: {error.strerror}")
                return True
            try:
                code = self._running.wait(self._seconds)
            except subprocess.TimeoutExpired:
                self._end()
                self._say(f"--exec: {self._words[0]} took over {self._seconds:g} s and was ended")
                return True
            if code:
                output.seek(0)
                lines = output.read().decode("utf-8", errors="replace").strip().splitlines()
                said = f": {plain(lines[-1])[:200]}" if lines else ""
                self._say(f"--exec: {self._words[0]} ended with {code}{said}")
        return True

    def close(self, seconds: float) -> bool:
        """Wait as every notifier; then end a command that still runs, and all that it has started."""
        done = super().close(seconds)
        if not done:
            self._end()
        return done

    def _end(self) -> None:
        if self._running is not None and self._running.poll() is None:
            with contextlib.suppress(OSError):
                os.killpg(self._running.pid, signal.SIGKILL) if hasattr(
                    os, "killpg"
                ) else self._running.kill()
            self._running.wait()


class Webhook(Notifier):
    """Posts each alert.

    Args:
        url: http or https; ``env:NAME``: the variable that holds it.
        done: takes each alert that the server has taken, or never will.

    Raises:
        InputError: ``url`` is no such address.
    """

    def __init__(
        self,
        url: str,
        say: Callable[[str], object],
        done: Callable[[Alert], object] | None = None,
        *,
        seconds: float = WEBHOOK_SECONDS,
        pauses: tuple[float, ...] = PAUSES,
        late: tuple[float, float] = LATE_SECONDS,
    ) -> None:
        if url.startswith("env:"):
            name, url = url[4:], os.environ.get(url[4:], "")
            if not url:
                raise InputError(f"--webhook env:{name}: the variable {name} is not set")
        try:
            parts = urllib.parse.urlsplit(url.strip())
            host, port = parts.hostname, parts.port
        except ValueError:
            host = None
        if host is None or parts.scheme not in ("http", "https"):
            raise InputError("--webhook needs an address that begins with https:// or http://, or env:NAME")
        # Any other part of the address may be a secret.
        self.shown = f"{parts.scheme}://{host}" + (f":{port}" if port else "")
        self._url, self._seconds, self._pauses = url.strip(), seconds, pauses
        self._opener = urllib.request.build_opener(_NoRedirects)
        super().__init__(say, done, late=late)

    def deliver(self, alert: Alert) -> bool:
        body = json.dumps(alert.slack()).encode()
        tries = len(self._pauses) + 1
        for count in range(tries):
            reason, again, pause = self._post(body)
            if reason is None:
                return True
            last = not again or count + 1 == tries
            self._say(
                f"webhook {self.shown}: {reason}"
                + ("; given up" if last else f", try {count + 1} of {tries}")
            )
            if not again:
                return True
            if last or self._ending.wait(max(self._pauses[count], pause)):
                break
        return False

    def deliver_late(self, alert: Alert) -> bool:
        reason, again, _ = self._post(json.dumps(alert.slack()).encode())
        return reason is None or not again

    def _post(self, body: bytes) -> tuple[str | None, bool, float]:
        """Post; returns what went wrong (None: nothing), whether another try may help, and after how many seconds."""
        request = urllib.request.Request(
            self._url,
            data=body,
            method="POST",
            headers={"Content-Type": "application/json", "User-Agent": "stabilitylab"},
        )
        began = time.monotonic()
        try:
            with self._opener.open(request, timeout=self._seconds) as answer:
                answer.close()
            return None, False, 0.0
        except urllib.error.HTTPError as error:
            error.close()
            return f"HTTP {error.code}", error.code in _AGAIN, _retry_after(error.headers)
        except TimeoutError:
            return f"no answer within {self._seconds:g} s", True, 0.0
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                return f"no answer within {self._seconds:g} s", True, 0.0
            said = getattr(error.reason, "strerror", None) or type(error.reason).__name__
            return f"cannot be reached ({said})", True, 0.0
        except (OSError, http.client.HTTPException) as error:
            return f"{type(error).__name__} after {time.monotonic() - began:.1f} s", True, 0.0


def _retry_after(headers: Any) -> float:
    try:
        return min(float(headers.get("Retry-After", 0)), _LONGEST_PAUSE)
    except (TypeError, ValueError):
        return 0.0


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Refuses redirects: a message is only for the server named."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None
