"""Finds the log's files at a path, by their first bytes and by the names that trainers and trackers give their folders."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from stabilitylab.errors import InputError
from stabilitylab.logs.aim_store import aim_repository
from stabilitylab.logs.source import LogFile
from stabilitylab.logs.swanlab import SWANLAB
from stabilitylab.logs.trackers import SQLITE, WANDB, mlflow_runs

# The name of a folder's one log, by the trainer that writes it.
_NAMED = (
    *(
        "metrics.csv",
        "results.csv",
        "logging.jsonl",
        "trainer_log.jsonl",
        "vis_data/scalars.json",
        "scalars.json",
    ),
    *(
        "mlflow.db",
        "main.log",
        "log.txt",
        "train.log",
        "train_inner.log",
        "metrics.jsonl",
        "wandb-history.jsonl",
        "log_history.json",
    ),
)


@dataclass(frozen=True, slots=True)
class LocatedLog:
    """What lies at a path.

    Attributes:
        kind: "file", "run folder", "MLflow", "W&B", "swanlab", "Aim", "versions" (Lightning's, YOLO's exp, exp2...), "TensorBoard"
            or "SQLite".
        files: the files of that kind; for "file" the one file, for "run folder" and "MLflow" the folder.
    """

    kind: str
    files: tuple[Path, ...]


def locate(path: Path) -> LocatedLog:
    """The files that are the log at ``path``.

    Raises:
        InputError: it is a folder without a known log.
    """
    if path.is_dir():
        return in_folder(path)
    head = LogFile(path).head()
    if is_tensorboard(path, head):
        return LocatedLog("TensorBoard", (path,))
    if head.startswith(SQLITE):
        return LocatedLog("SQLite", (path,))
    if head.startswith(WANDB):
        return LocatedLog("W&B", (path,))
    if head.startswith(SWANLAB):
        return LocatedLog("swanlab", (path,))
    return LocatedLog("file", (path,))


def in_folder(path: Path) -> LocatedLog:
    """The log in a folder. Raises InputError as ``locate`` does."""
    if (path / "telemetry").is_dir() or (path / "events.jsonl").is_file():
        return LocatedLog("run folder", (path,))
    state = path / "trainer_state.json"
    if not state.is_file():
        # The latest checkpoint holds the whole history before it.
        found = sorted(path.glob("checkpoint-*/trainer_state.json"), key=_checkpoint)
        state = found[-1] if found else state
    if state.is_file():
        return LocatedLog("file", (state,))
    if mlflow_runs(path):
        return LocatedLog("MLflow", (path,))
    offline = sorted(
        {*path.glob("*.wandb"), *path.glob("*run-*/*.wandb"), *path.glob("wandb/*run-*/*.wandb")}
    )
    offline = [file for file in offline if file.stat().st_size and not file.parent.is_symlink()]
    if offline:
        return LocatedLog("W&B", tuple(offline))
    offline = sorted(
        {*path.glob("*.swanlab"), *path.glob("run-*/*.swanlab"), *path.glob("swanlog/run-*/*.swanlab")}
    )
    if offline:
        return LocatedLog("swanlab", tuple(offline))
    if (repository := aim_repository(path)) is not None:
        return LocatedLog("Aim", (repository,))
    versions = sorted(path.rglob("version_*/metrics.csv"), key=_checkpoint)
    if versions:
        return LocatedLog("versions", tuple(versions))
    for name in _NAMED:
        found = [path / name] if (path / name).is_file() else sorted(path.glob(f"*/{name}"), key=_number)
        if found and name.endswith(".db"):
            return LocatedLog("SQLite", (found[-1],))
        if found:
            return LocatedLog("versions" if len(found) > 1 else "file", tuple(found))
    events = sorted(file for file in path.rglob("*tfevents*") if file.is_file())
    if events:
        return LocatedLog("TensorBoard", tuple(events))
    alone = [
        f for f in path.iterdir() if f.suffix in (".csv", ".tsv", ".jsonl", ".log", ".txt", ".db", ".parquet")
    ]
    if len(alone) == 1:
        return LocatedLog("SQLite" if alone[0].suffix == ".db" else "file", (alone[0],))
    raise InputError(
        f"{path} is neither a run folder nor one of a trainer or tracker known here (docs/logs.md): give a log file"
    )


def version_of(file: Path) -> str:
    """The name of one of several runs: the folder of its log."""
    return (file.parent.parent if file.parent.name == "vis_data" else file.parent).name


def is_tensorboard(path: Path, head: bytes) -> bool:
    """Whether these bytes are TensorBoard events."""
    return "tfevents" in path.name or (len(head) > 24 and b"brain.Event:" in head[:64])


def _number(file: Path) -> tuple[int, int, str]:
    """A sort key for exp, exp2, ..., exp10."""
    name = version_of(file)
    found = re.search(r"(?<!\d)(\d{1,4})$", name)
    return len(file.parts), int(found[1]) if found else -1, name


def _checkpoint(file: Path) -> tuple[int, str]:
    found = re.search(r"(\d+)$", file.parent.name)
    return (int(found[1]) if found else -1), str(file)
