"""Checkpoints: whole or absent, checked on reading, limited in number.

A checkpoint is a folder ``checkpoints/step-00000100`` (100 = updates made so far):

    model.safetensors       the fp32 weights, under the model's own names
    optimizer.safetensors   moments, under "<moment>/<parameter>"
    state.json              step, data position, loss scaler, schedules, detector, ...
    manifest.json           size and SHA-256 of each of the above

Several processes write ``model-00003.safetensors`` and so on, each some of the tensors, every tensor whole and under the same name:
so a checkpoint does not depend on how many processes there were, and any number can read it.

``glm.train.async_checkpoint`` writes it beside its place, flushes it to disk and renames it, so a kill leaves either all of it or a
``.partial`` folder that the next save removes. Reading verifies every byte, takes the previous checkpoint where the newest is
damaged, tells the caller so, and never executes anything in a checkpoint.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from glm.errors import InputError

FORMAT = 1
_PARTIAL, _DAMAGED = ".partial", ".damaged"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint's content.

    Attributes:
        step: updates made before it.
        model: fp32 weights by parameter name.
        optimizer: moments by ``<moment>/<parameter name>``.
        state: everything else, as JSON.
    """

    step: int
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Any]

    def copied(self) -> Checkpoint:
        """A copy of the tensors, which no later update changes."""
        return replace(
            self,
            model={name: tensor.detach().clone() for name, tensor in self.model.items()},
            optimizer={name: tensor.detach().clone() for name, tensor in self.optimizer.items()},
            state=copy.deepcopy(dict(self.state)),
        )


def path_of(folder: Path, step: int) -> Path:
    """Path of the checkpoint after ``step`` updates in a run's ``checkpoints`` folder."""
    return folder / f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """All complete checkpoints as (step, path), oldest first. Does not check their bytes."""
    if not folder.is_dir():
        return []
    found = []
    for path in folder.iterdir():
        number = path.name.removeprefix("step-")
        if path.name != number and number.isdigit() and path.is_dir():
            found.append((int(number), path))
    return sorted(found)


def begin(folder: Path, step: int) -> tuple[Path, Path]:
    """A checkpoint's future path, and a new folder to write it in. Removes what a kill left half-written."""
    folder.mkdir(parents=True, exist_ok=True)
    target = path_of(folder, step)
    partial = target.with_name(target.name + _PARTIAL)
    for left_over in folder.glob("*" + _PARTIAL):
        shutil.rmtree(left_over)
    partial.mkdir()
    return target, partial


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Write and flush one file of a checkpoint; returns its entry in the manifest.

    Raises:
        OSError: the disk is full.
    """
    try:
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        # safetensors reports a full disk as its own error, with the operating system's words inside.
        raise OSError(_errno_in(str(error)), str(error), str(path)) from None
    _flush(path)
    return _digest(path)


def state_text(checkpoint: Checkpoint) -> str:
    """The text of ``state.json``."""
    # A run's state holds only JSON; Python's json writes non-finite numbers and reads them back.
    return json.dumps({"step": checkpoint.step, **checkpoint.state}, indent=1)


def finish(partial: Path, target: Path, state_json: str, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Add the state and the manifest to the tensors, and rename the folder into its place."""
    state = partial / "state.json"
    state.write_text(state_json)
    manifest = partial / "manifest.json"
    entries = {**files, state.name: _digest(state)}
    manifest.write_text(json.dumps({"format": FORMAT, "files": entries}, indent=1))
    for path in (state, manifest):
        _flush(path)
    for old in (target, target.with_name(target.name + _DAMAGED)):
        if old.exists():
            shutil.rmtree(old)
    partial.rename(target)
    _flush(target.parent)


@contextmanager
def whole_or_absent(partial: Path, target: Path) -> Iterator[None]:
    """After a failure leave nothing half-written, and say which checkpoint it was."""
    try:
        yield
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        error.filename = error.filename or str(target)
        raise


def drop_oldest(folder: Path, *, keep: int) -> None:
    """Remove all but the newest ``keep``."""
    for _, path in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(path)


def drop_after(folder: Path, step: int) -> None:
    """Remove the checkpoints of an abandoned history: all after ``step``."""
    for number, path in list_checkpoints(folder):
        if number > step:
            shutil.rmtree(path)


def set_aside_after(folder: Path, step: int) -> None:
    """Rename checkpoints after ``step``, which are damaged, so that they do not count among those kept. Each stays until training
    has made and saved its step again.
    """
    for number, path in list_checkpoints(folder):
        if number > step:
            aside = path.with_name(path.name + _DAMAGED)
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint and verify it.

    Raises:
        InputError: it lacks a file, was cut short or altered, or has a format that we do not know.
    """
    verify(path)
    state, names = read_state(path)
    try:
        tensors: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
        for name in names:
            tensors[_kind(name)] |= load_file(path / name)
    except SafetensorError as error:
        raise _unreadable(path, error) from None
    return Checkpoint(step=state.pop("step"), state=state, **tensors)


def read_state(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The state of a verified checkpoint, with "step", and the names of its tensor files."""
    try:
        state = json.loads((path / "state.json").read_text())
        files = json.loads((path / "manifest.json").read_text())["files"]
        int(state["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(path, error) from None
    return state, sorted(name for name in files if name.endswith(".safetensors"))


def _kind(name: str) -> str:
    return "model" if name.startswith("model") else "optimizer"


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"checkpoint {path} cannot be read ({error}): remove it to use an older one")


def verify(path: Path) -> None:
    """Check every file of a checkpoint against its manifest. Raises InputError with the name of the first that differs."""
    manifest = path / "manifest.json"
    if not manifest.is_file():
        raise InputError(f"checkpoint {path} has no manifest.json: it is not a checkpoint, or is damaged")
    try:
        content = json.loads(manifest.read_text())
        files, written = content["files"], content["format"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"checkpoint {path} is damaged: manifest.json cannot be read") from None
    if written != FORMAT:
        raise InputError(f"checkpoint {path} is of format {written}, this version reads {FORMAT}")
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            raise InputError(f"checkpoint {path} is damaged: {name} is missing")
        if file.stat().st_size != expected["bytes"]:
            raise InputError(
                f"checkpoint {path} is damaged: {name} has {file.stat().st_size} bytes of {expected['bytes']}"
            )
        if _digest(file) != expected:
            raise InputError(f"checkpoint {path} is damaged: {name} does not match its checksum")


def load_newest(folder: Path) -> tuple[Checkpoint, list[str]]:
    """The newest checkpoint that is whole, and one line about each newer one that is not.

    Raises:
        InputError: there is none.
    """
    path, problems = find_newest(folder)
    return load(path), problems


def find_newest(folder: Path) -> tuple[Path, list[str]]:
    """The newest checkpoint that is whole, and one line about each newer one that is not.

    Raises:
        InputError: there is none.
    """
    problems: list[str] = []
    for _, path in reversed(list_checkpoints(folder)):
        try:
            verify(path)
            read_state(path)
            return path, problems
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError(
            f"{folder} holds no undamaged checkpoint: {problems[0]}; start again into another folder"
        )
    raise InputError(f"{folder} holds no checkpoint to resume from: leave out --resume to start a new run")


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _errno_in(message: str) -> int:
    """The number in the "(os error 28)" of a Rust error; EIO where there is none."""
    _, _, tail = message.partition("os error ")
    digits = "".join(_leading_digits(tail))
    return int(digits) if digits else 5


def _leading_digits(text: str) -> Iterator[str]:
    for character in text:
        if not character.isdigit():
            return
        yield character
