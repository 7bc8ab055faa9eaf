"""Chooses the follower for a path."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stabilitylab.errors import InputError
from stabilitylab.logs.locate import LocatedLog
from stabilitylab.watching.followers import DocumentFollower, Follower, TextFollower, growing_text
from stabilitylab.watching.options import Options
from stabilitylab.watching.stores import (
    MlflowFilesFollower,
    RunFollower,
    SqliteFollower,
    TensorBoardFollower,
    WandbFollower,
)


@dataclass(slots=True)
class Followed:
    """What a watch follows."""

    found: LocatedLog
    follower: Follower
    prefix: str = ""


def follower_of(
    found: LocatedLog,
    path: Path,
    options: Options,
    state: dict[str, Any] | None = None,
    kind: str | None = None,
) -> Follower | None:
    """A follower of the log at ``path``; None: it holds nothing yet.

    Args:
        found: the log's files there.
        path: as given.
        options: the watch's options.
        state: an earlier follower's state.
        kind: that follower's class; the state of another class is useless.

    Raises:
        InputError: the log cannot be understood.
    """
    file = found.files[-1]
    if found.kind == "Aim":
        raise InputError(
            f"{path} is an Aim repository, which is read but not watched: stabilitylab spikes {path}"
        )
    if found.kind == "run folder":
        return RunFollower(file, options.loss, state)
    if found.kind == "TensorBoard":
        return TensorBoardFollower(path, state)
    if found.kind == "MLflow":
        return MlflowFilesFollower(file, state)
    if found.kind == "W&B":
        return WandbFollower(path if path.is_dir() else file, list(found.files), state)
    if found.kind == "SQLite":
        return SqliteFollower(file, state)
    if not file.stat().st_size:
        return None
    if reading := growing_text(file, options.pattern):
        return TextFollower(file, reading, options.pattern, state if kind in (None, "TextFollower") else None)
    given = {"loss": options.loss, "step": options.step, "pattern": options.pattern}
    return DocumentFollower(file, given, state if kind in (None, "DocumentFollower") else None)
