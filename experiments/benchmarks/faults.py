"""Many faults in one run: does it end where the undisturbed run does?

It runs two trainings of several processes under torchrun, the same in everything, and really disturbs one of them at random steps:

| fault | what is done | what should follow |
| --- | --- | --- |
| one | SIGKILL of one rank | torchrun starts all again; they continue from the newest checkpoint |
| all | SIGKILL of all ranks at once | the same |
| writing | SIGKILL of one rank while a checkpoint is half-written | the same, from the checkpoint before |
| hang | SIGSTOP of one rank | the others give it up after ``parallel.timeout``, then the same |
| launcher | SIGKILL of torchrun alone | the ranks notice, save and end; a new launch continues |
| full | one rank's files may no longer grow (as on a full disk) | the run loses that checkpoint and tells so; training continues |
| damaged | SIGKILL of all ranks, a bit of the newest checkpoint flipped | training takes the one before, and tells so |
| missing | SIGKILL of launcher and ranks, a file of the newest checkpoint removed | a new launch does the same |

Verdicts: weights, moments and state of both runs are the same bits; so are the losses; and the valid telemetry has every step once.
Seconds count from the fault to the next step made, most of them four processes importing PyTorch on the cores there are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from experiments.benchmarks._launched import Launched, Shape
from experiments.data import bilingual
from glm.train import checkpoint as checkpoints
from stabilitylab.command_line import parse
from stabilitylab.runs import load_run

# In this order; a run of few faults has the first ones.
MIX = (
    *("one", "full", "writing", "damaged", "launcher", "hang", "all", "missing", "one", "writing"),
    *("one", "full", "writing", "damaged", "launcher", "hang", "all", "missing", "one", "one"),
)
# Steps between two faults, with those that pass during the second.
STEPS_EACH = 8
SIGNS = {"damaged": "does not match its checksum", "missing": "is missing"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Many faults in one run.

    Attributes:
        faults: number of faults.
        seed: seed of their order, steps and ranks.
        tensor: ranks that share each layer.
        pipeline: number of pipeline stages.
        data: number of replicas.
        shards: folder made by `glm shards`; by default the one that suites train on, made where it is missing.
        json: print one JSON object.
    """

    faults: int = 20
    seed: int = 0
    tensor: int = 2
    pipeline: int = 2
    data: int = 1
    shards: Path | None = None
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class Injury:
    """A fault and its outcome.

    Attributes:
        fault: of the module's table.
        rank: the disturbed one; None: all.
        step: updates made when it struck.
        recovery: "restart" by torchrun, "new launch", or "went on".
        seconds: from the fault to the next step.
        again: repeated steps.
    """

    fault: str
    rank: int | None
    step: int
    recovery: str
    seconds: float
    again: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of both runs."""

    injuries: list[Injury]
    verdicts: dict[str, bool]
    undisturbed_seconds: float
    hurt_seconds: float


def main(argv: Sequence[str]) -> int:
    settings: Settings = parse(Settings, argv, program="python -m experiments.benchmarks faults")
    shards = settings.shards or bilingual(Path("data") / "quick")
    faults = [MIX[i % len(MIX)] for i in range(settings.faults)]
    random.Random(settings.seed).shuffle(faults)
    axes = {name: getattr(settings, name) for name in ("tensor", "pipeline", "data")}
    shape = Shape(steps=STEPS_EACH * (len(faults) + 1), **axes)
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder:
        outcome = compare(shards, Path(folder), shape, faults, seed=settings.seed, console=console)
    if settings.json:
        print(
            json.dumps({"settings": dataclasses.asdict(settings), **dataclasses.asdict(outcome)}, default=str)
        )
    else:
        _show(outcome)
    return 0 if all(outcome.verdicts.values()) else 1


def compare(
    shards: Path,
    folder: Path,
    shape: Shape,
    faults: Sequence[str],
    *,
    seed: int,
    console: Console | None = None,
) -> Outcome:
    """Run both trainings.

    Raises:
        RuntimeError: one of them hung or failed; with its output.
    """
    began = time.monotonic()
    with Launched(shards, folder / "undisturbed", shape) as undisturbed:
        undisturbed.launch()
        if undisturbed.finish(600):
            raise RuntimeError(f"the undisturbed run failed: {undisturbed.text()[-3000:]}")
    between = time.monotonic()
    # On a slow machine a start may look like a hang.
    with Launched(shards, folder / "hurt", shape, restarts=3 * len(faults)) as hurt:
        hurt.launch()
        chance, injuries = random.Random(seed), []
        for fault in faults:
            injuries.append(_hurt(hurt, fault, chance))
            if console is not None:
                console.print(
                    f"{len(injuries)} of {len(faults)}: {injuries[-1]}", soft_wrap=True, highlight=False
                )
        if hurt.finish(600):
            raise RuntimeError(f"the hurt run failed: {hurt.text()[-3000:]}")
    return Outcome(
        injuries=injuries,
        verdicts=_verdicts(undisturbed, hurt, set(faults)),
        undisturbed_seconds=between - began,
        hurt_seconds=time.monotonic() - between,
    )


def _hurt(run: Launched, fault: str, chance: random.Random) -> Injury:
    """Do the fault at a random step, and wait until training has gone on."""
    made = run.last_step()
    # By then two checkpoints exist, and some steps must be repeated.
    at = max(made + chance.randint(2, 4), 6)
    since, _ = run.wait_for(lambda line: (line.step or 0) >= at, since=len(run.lines))
    ranks = run.ranks()
    rank = chance.randrange(len(ranks))
    moment = time.monotonic()
    recovery = "restart"
    if fault == "full":
        return _fill(run, ranks, rank, since, moment)
    if fault == "one":
        os.kill(ranks[rank], signal.SIGKILL)
    elif fault == "hang":
        os.kill(ranks[rank], signal.SIGSTOP)
    elif fault == "writing":
        moment = _kill_while_writing(run, ranks[rank])
    elif fault == "all":
        _kill(ranks)
    elif fault == "launcher":
        run.launcher.kill()
        run.launcher.wait()
        run.wait_gone(ranks)
        recovery = "new launch"
    elif fault == "damaged":
        _kill(ranks)
        run.wait_gone(ranks)
        _damage(run, remove=False)
    else:
        run.kill_everything()
        _damage(run, remove=True)
        recovery = "new launch"
    lost_from = run.last_step()
    since = len(run.lines)
    if recovery == "new launch":
        run.launch()
    back, line = run.wait_for(lambda line: line.back_to is not None, since=since)
    lost_from = max([lost_from, *(one.step or 0 for one in run.lines[since:back])])
    _, first = run.wait_for(lambda line: line.step is not None, since=back)
    everyone = fault in ("all", "damaged", "missing", "launcher")
    assert line.back_to is not None
    return Injury(
        fault=fault,
        rank=None if everyone else rank,
        step=lost_from,
        recovery=recovery,
        seconds=first.moment - moment,
        again=lost_from - line.back_to,
    )


def _kill(ranks: Sequence[int]) -> None:
    for number in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


def _kill_while_writing(run: Launched, number: int, seconds: float = 60) -> float:
    """Kill a rank while a checkpoint is half-written; returns when."""
    folder = run.out / "checkpoints"
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if any(name.endswith(".partial") for name in os.listdir(folder)):  # noqa: PTH208 - pathlib is slower
            os.kill(number, signal.SIGKILL)
            return time.monotonic()
    raise RuntimeError(f"no checkpoint was being written: {run.text()[-3000:]}")


def _fill(run: Launched, ranks: Sequence[int], rank: int, since: int, moment: float) -> Injury:
    """Stop a rank's files from growing, until it loses a checkpoint by that."""
    before, hard = resource.prlimit(ranks[rank], resource.RLIMIT_FSIZE)
    resource.prlimit(ranks[rank], resource.RLIMIT_FSIZE, (4096, hard))
    try:
        lost, line = run.wait_for(lambda line: "checkpoint lost" in line.text, since=since)
    finally:
        resource.prlimit(ranks[rank], resource.RLIMIT_FSIZE, (before, hard))
    step = run.last_step()
    _, after = run.wait_for(lambda line: line.step is not None, since=lost)
    return Injury(
        fault="full", rank=rank, step=step, recovery="went on", seconds=after.moment - line.moment, again=0
    )


def _damage(run: Launched, *, remove: bool) -> None:
    newest = run.newest()
    assert newest is not None
    file = min(newest[1].glob("model-*"))
    if remove:
        file.unlink()
        return
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def _verdicts(undisturbed: Launched, hurt: Launched, faults: set[str]) -> dict[str, bool]:
    (a, odd_a), (b, odd_b) = (checkpoints.load_newest(run.out / "checkpoints") for run in (undisturbed, hurt))
    own = {
        "callbacks",
        "responder",
        "intervention",
    }  # of observers, whose ring buffers are no numbers of the run
    pairs = [(a.model, b.model), (a.optimizer, b.optimizer)]
    losses = [load_run(run.out).series("train/-/loss") for run in (undisturbed, hurt)]
    once = list(range(undisturbed.shape.steps))
    lines = (hurt.out / "events.jsonl").read_text().splitlines()
    told = " ".join(str(e["data"]) for e in map(json.loads, lines) if e["kind"] == "recovered")
    return {
        "weights and moments bit-equal": all(
            x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x) for x, y in pairs
        ),
        "state equal": a.step == b.step
        and all(a.state[name] == b.state[name] for name in a.state.keys() - own),
        "losses equal": losses[0].tolist() == losses[1].tolist(),
        "each step once": all(list(series.index) == once for series in losses),
        "no checkpoint damaged at the end": not odd_a and not odd_b,
        "damage told of": all(sign in told for fault, sign in SIGNS.items() if fault in faults),
    }


def _show(outcome: Outcome) -> None:
    table = Table("fault", "rank", "at step", "recovery", "seconds", "steps again")
    for one in outcome.injuries:
        rank = "all" if one.rank is None else str(one.rank)
        table.add_row(one.fault, rank, str(one.step), one.recovery, f"{one.seconds:.1f}", str(one.again))
    console = Console()
    console.print(table)
    again = sum(one.again for one in outcome.injuries)
    console.print(
        f"undisturbed {outcome.undisturbed_seconds:.0f} s, hurt {outcome.hurt_seconds:.0f} s, {again} steps made again"
    )
    for verdict, holds in outcome.verdicts.items():
        console.print(f"{'yes' if holds else 'NO '}  {verdict}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
