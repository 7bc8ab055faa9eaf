"""Runs two ranks of ``glm train`` on bad input from outside, case after case; writes what each says and how it ends, as JSON.

    python -m tests.glm.parallel.refusals FOLDER DATA

Importing takes seconds, so this process imports once and forks the ranks. Not a test itself; see ``test_refusals.py``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import glm.cli
from glm.commands import train as commands
from glm.distributed import launch as start
from glm.distributed.process_group import SingleProcess
from glm.train import checkpoint as checkpoints
from glm.train.async_checkpoint import CheckpointWriter
from tests.glm.parallel.ranks import prepare
from tests.ports import free_port

RANKS = 2


def command(data: Path, out: Path, *more: str) -> list[str]:
    small = "--model.layers 1 --model.hidden 32 --model.heads 2 --model.length 64 --batch.rows 2 --batch.micro-rows 1"
    words = ["train", "glm-tiny", "--data", str(data), "--out", str(out), *small.split(), "--steps", "2"]
    return [*words, "--monitor.every", "0", "--monitor.no-tensorboard", "--parallel.data", "2", *more]


def in_two(out: Path, work: Callable[[int], int], port: int) -> list[dict[str, object]]:
    """Exit code of each rank, and what it said on both streams."""
    out.mkdir(parents=True)
    children = []
    for rank in range(RANKS):
        child = os.fork()
        if child == 0:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_PORT": port}
            os.environ.update({k: str(v) for k, v in place.items()}, MASTER_ADDR="127.0.0.1")
            file = os.open(out / str(rank), os.O_CREAT | os.O_WRONLY)
            os.dup2(file, 1)
            os.dup2(file, 2)
            code = 1
            try:
                code = work(rank)
            except SystemExit as stop:
                code = int(stop.code or 0)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return [{"code": code, "said": (out / str(rank)).read_text()} for rank, code in enumerate(codes)]


def main(folder: Path, data: Path) -> int:
    prepare(command(data, folder))
    # There is no launcher here to end the other ranks.
    commands.SECONDS_TO_SPEAK = 0.1

    def other_version(rank: int) -> int:
        if rank == 1:
            start._version = lambda: "9.9.9"  # as on another installation
        return glm.cli.main(command(data, folder / "version"))

    model, odd = folder / "model", folder / "odd"
    cases: dict[str, Callable[[int], int]] = {
        "trained": lambda rank: glm.cli.main(command(data, model)),
        "resumed": lambda rank: glm.cli.main(command(data, model, "--resume", "--steps", "3")),
        "topology": lambda rank: glm.cli.main(command(data, folder / "t", "--parallel.data", "3")),
        "heads": lambda rank: glm.cli.main(
            command(
                data, folder / "h", "--model.heads", "1", "--parallel.data", "1", "--parallel.tensor", "2"
            )
        ),
        "flag": lambda rank: glm.cli.main(command(data, folder / "f", "--model.layrs", "2")),
        "configuration": lambda rank: glm.cli.main(command(data, folder / "c", "--seed", str(rank))),
        "version": other_version,
        "data": lambda rank: glm.cli.main(command(folder / "none", folder / "d")),
        "run": lambda rank: glm.cli.main(command(data, model)),
        "settings": lambda rank: glm.cli.main(command(data, model, "--resume", "--model.norm", "pre")),
        "checkpoint": lambda rank: glm.cli.main(command(data, odd, "--resume")),
        "damaged": lambda rank: glm.cli.main(command(data, folder / "damaged", "--resume")),
        "port": lambda rank: glm.cli.main(command(data, folder / "p", "--parallel.timeout", "2")),
    }
    found = {}
    for name, work in cases.items():
        if name == "checkpoint":
            _of_another_model(model, odd)
        if name == "damaged":
            shutil.copytree(model, folder / name)
            for file in (folder / name / "checkpoints").glob("*/state.json"):
                file.write_text("{}")
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1] if name == "port" else free_port()
            found[name] = in_two(folder / "said" / name, work, port)
    print(json.dumps(found))
    return 0


def _of_another_model(run: Path, out: Path) -> None:
    """The run's folder with a checkpoint of a model that has one channel more in a layer."""
    shutil.copytree(run, out)
    ((step, path),) = checkpoints.list_checkpoints(out / "checkpoints")[-1:]
    whole = checkpoints.load(path)
    shutil.rmtree(out / "checkpoints")
    wide = {n: torch.cat([t, t[:1]]) if n.endswith("up.weight") else t for n, t in whole.model.items()}
    assert step == whole.step
    save(out / "checkpoints", dataclasses.replace(whole, model=wide))


def save(folder: Path, checkpoint: checkpoints.Checkpoint) -> None:
    files = {"model.safetensors": checkpoint.model, "optimizer.safetensors": checkpoint.optimizer}
    CheckpointWriter(folder, checkpoint, files, SingleProcess(), background=False).publish(keep=1)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
