"""Keeps a watch's state on disk, so that it continues after a kill and reports nothing twice.

    FOLDER/state.json     followers and judges, replaced as a whole every few seconds
    FOLDER/alerts.jsonl   one line per alert before the watch says it, and one when a webhook has taken it

After a kill the watch reads the log again from the last state on. The detector is a function of its input, so the alerts of that
stretch come again with the same ids, and the watch does not repeat those in ``alerts.jsonl``; it tries a webhook that had not taken
one again. Neither file holds the address of a webhook, or a command.

By default FOLDER lies in ``$XDG_STATE_HOME/stabilitylab/watch`` (``~/.local/state``), named by the log's path and the watch's
options.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any

from stabilitylab.errors import InputError
from stabilitylab.watching.alerts import Alert

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

VERSION = 1


def default_folder(path: Path, asked: dict[str, Any]) -> Path:
    """The folder in which a watch of ``path`` keeps its state."""
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    key = json.dumps([str(path.resolve()), asked], sort_keys=True)
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in path.resolve().name)[:60]
    return Path(home) / "stabilitylab" / "watch" / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


class KeptState:
    """The folder of one watch.

    Args:
        folder: created if needed.

    Raises:
        InputError: another watch uses the folder, or it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._told: dict[str, str] = {}  # id -> rule
        self._undelivered: dict[str, Alert] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock: IO[str] = (folder / ".lock").open("a+", encoding="utf-8")
            if fcntl is not None:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read()
            self._journal = (folder / "alerts.jsonl").open("ab", buffering=0)
        except BlockingIOError:
            self._lock.close()
            raise InputError(
                f"{folder} is the state of another watch that is still running: end it, or give --state another folder"
            ) from None
        except OSError as error:
            raise InputError(
                f"{folder} cannot hold the state of the watch ({error.strerror}): give --state another folder"
            ) from None

    def _read(self) -> None:
        file = self.folder / "alerts.jsonl"
        if not file.is_file():
            return
        content = file.read_bytes()
        if content and not content.endswith(b"\n"):  # cut short by a kill
            content = content[: content.rfind(b"\n") + 1]
            with file.open("r+b") as cut:
                cut.truncate(len(content))
        for line in content.splitlines():
            try:
                body = json.loads(line)
                if "delivered" in body:
                    self._undelivered.pop(body["delivered"], None)
                else:
                    posted, quiet = bool(body.pop("posted")), bool(body.pop("quiet"))
                    alert = Alert.from_json(body)
                    self._told[alert.id] = "" if quiet else alert.rule
                    if posted:
                        self._undelivered[alert.id] = alert
            except (ValueError, KeyError, TypeError):
                continue

    def is_new(self, alert: Alert, *, posted: bool = False, quiet: bool = False) -> bool:
        """Whether the alert has not been said; from then on it counts as said.

        Args:
            alert: about to be said.
            posted: whether a webhook will get it.
            quiet: whether it stays unsaid forever.
        """
        if alert.id in self._told:
            return False
        self._told[alert.id] = "" if quiet else alert.rule
        self._append({**alert.to_json(), "posted": posted, "quiet": quiet})
        return True

    def has_told(self, rules: Collection[str]) -> bool:
        """Whether an alert of one of these rules was ever said here."""
        return any(rule in rules for rule in self._told.values())

    @property
    def undelivered(self) -> list[Alert]:
        """Alerts of an earlier watch that a webhook has not taken."""
        return list(self._undelivered.values())

    def delivered(self, alert: Alert) -> None:
        """Note that a webhook has taken the alert, or never will."""
        self._append({"delivered": alert.id})

    def _append(self, body: dict[str, Any]) -> None:
        # A full disk: the alert is said all the same. A webhook that answers after the end is tried again.
        with contextlib.suppress(OSError, ValueError):
            self._journal.write((json.dumps(body) + "\n").encode())

    def load(self) -> dict[str, Any] | None:
        """The state of an earlier watch; None where there is no usable one."""
        try:
            state = json.loads((self.folder / "state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return state if isinstance(state, dict) and state.get("version") == VERSION else None

    def save(self, state: dict[str, Any]) -> bool:
        """Replace the state as a whole; False where the disk does not take it."""
        fresh = self.folder / "state.tmp"
        try:
            fresh.write_text(json.dumps({"version": VERSION, **state}), encoding="utf-8")
            fresh.replace(self.folder / "state.json")
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Let another watch use the folder."""
        self._journal.close()
        self._lock.close()
