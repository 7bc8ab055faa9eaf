"""A ``glm train`` of several processes under torchrun, seen from outside: its processes, its output, its folder.

    with Launched(data, out, settings) as run:
        run.launch()
        run.wait_for(7)          # rank 0 said that 7 updates are made
        os.kill(run.ranks()[1], signal.SIGKILL)

Linux only: it finds processes and tells them apart in /proc.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from torch.distributed.run import get_args_parser

from glm.train import checkpoint as checkpoints

_STEP = re.compile(r"step (\d+)/\d+ ")
_BACK = re.compile(r"step (\d+): training went on from here")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Size of the model and of the world.

    Attributes:
        tensor, pipeline, data: the axes.
        steps: updates of the whole run.
        timeout: how many seconds to wait for a rank that does not answer.
    """

    tensor: int = 2
    pipeline: int = 2
    data: int = 1
    steps: int = 100
    timeout: float = 20.0

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.data

    def flags(self) -> list[str]:
        """Flags of ``glm train``."""
        named = {
            "steps": self.steps,
            "precision": "fp16",
            "model.layers": 2,
            "model.hidden": 32,
            "model.heads": 2,
            "model.length": 64,
            "batch.rows": 4,
            "batch.micro-rows": 1,
            "checkpoint.every": 2,
            "checkpoint.keep": 3,
            "monitor.every": 4,
            "parallel.tensor": self.tensor,
            "parallel.pipeline": self.pipeline,
            "parallel.data": self.data,
            "parallel.timeout": self.timeout,
        }
        return [word for name, value in named.items() for word in (f"--{name}", str(value))]


@dataclass(frozen=True)
class Line:
    """A line of output, and its time."""

    moment: float
    text: str

    @property
    def step(self) -> int | None:
        """The updates made, where it tells them."""
        found = _STEP.match(self.text)
        return int(found[1]) if found else None

    @property
    def back_to(self) -> int | None:
        """The step of the checkpoint from which the run continues, where it tells that."""
        found = _BACK.match(self.text)
        return int(found[1]) if found else None


class Launched:
    """A run to launch again and again.

    Args:
        data: made by ``glm shards``.
        out: run folder.
        shape: model and world.
        restarts: how many torchrun may make.
    """

    def __init__(self, data: Path, out: Path, shape: Shape, *, restarts: int = 0) -> None:
        self.data, self.out, self.shape, self.restarts = data, out, shape, restarts
        self.lines: list[Line] = []
        self._said = threading.Condition()
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None

    def __enter__(self) -> Launched:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None and self._process.poll() is None:
            self.kill_everything()

    @property
    def launcher(self) -> subprocess.Popen[str]:
        assert self._process is not None, "launch() comes first"
        return self._process

    def launch(self, *more: str) -> None:
        """Start torchrun, with more flags; it continues the run in the folder, or begins it."""
        torchrun = ["experiments.benchmarks._torchrun", "--standalone"]
        torchrun += ["--nproc-per-node", str(self.shape.ranks)]
        torchrun += ["--max-restarts", str(self.restarts), "--monitor-interval", "0.2"]
        # A stopped process does not hear SIGTERM: torchrun waits so long before it kills; torch 2.9's always half a minute.
        if "--shutdown-timeout" in get_args_parser().format_help():
            torchrun += ["--shutdown-timeout", "5"]
        torchrun += ["-m", "experiments.benchmarks._told_training"]
        train = ["train", "glm-tiny", "--data", str(self.data), "--out", str(self.out), "--resume"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", *torchrun, *train, "--monitor.no-tensorboard", *self.shape.flags(), *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, args=(self._process,), daemon=True)
        self._reader.start()

    def finish(self, seconds: float = 240) -> int:
        """Wait for its end; the exit code. Raises RuntimeError if it does not end."""
        try:
            code = self.launcher.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill_everything()
            raise RuntimeError(f"hung: {self.text()[-3000:]}") from None
        assert self._reader is not None
        self._reader.join(seconds)
        return code

    def kill_everything(self) -> None:
        """Kill the launcher and all ranks at once."""
        ranks = self.ranks()
        for number in (self.launcher.pid, *ranks):
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        self.launcher.wait()
        self.wait_gone(ranks)

    def ranks(self) -> list[int]:
        """Process numbers of the living ranks, by rank."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                environment = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            ours = b"experiments.benchmarks._told_training" in words and str(self.out).encode() in words
            rank = [int(pair[5:]) for pair in environment if pair.startswith(b"RANK=")]
            if ours and rank:
                found.append((rank[0], int(entry.name)))
        return [number for _, number in sorted(found)]

    def newest(self) -> tuple[int, Path] | None:
        """The newest complete checkpoint."""
        return next(reversed(checkpoints.list_checkpoints(self.out / "checkpoints")), None)

    def last_step(self) -> int:
        """The last step in the output."""
        return next((line.step for line in reversed(self.lines) if line.step is not None), 0)

    def wait_for(
        self, wanted: Callable[[Line], bool], *, since: int = 0, seconds: float = 240
    ) -> tuple[int, Line]:
        """The first wanted line from number ``since`` on, and its number. Raises RuntimeError if it does not come."""
        until = time.monotonic() + seconds
        with self._said:
            while True:
                for number in range(since, len(self.lines)):
                    if wanted(self.lines[number]):
                        return number, self.lines[number]
                since = len(self.lines)
                if time.monotonic() > until or self.launcher.poll() is not None:
                    break
                self._said.wait(0.5)
        raise RuntimeError(f"what was waited for was not said: {self.text()[-3000:]}")

    def text(self) -> str:
        """All output."""
        return "\n".join(line.text for line in self.lines)

    def wait_gone(self, numbers: list[int], seconds: float = 120) -> None:
        """Wait until none of these processes runs. Raises RuntimeError if one does not end."""
        until = time.monotonic() + seconds
        while any(_runs(number) for number in numbers):
            if time.monotonic() > until:
                raise RuntimeError(f"ranks do not end: {self.text()[-3000:]}")
            time.sleep(0.02)

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout:
            for text in process.stdout:
                with self._said:
                    self.lines.append(Line(time.monotonic(), text.rstrip("\n")))
                    self._said.notify_all()


def _runs(number: int) -> bool:
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
