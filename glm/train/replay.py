"""``glm replay``: an event again, from before it, with one thing changed.

    glm replay RUN --event 3 --before 20 --steps 60 --model.embedding.gradient-shrink 0.1

An event's number is its place among the run's episodes, as ``stabilitylab spikes RUN`` lists them. The run is taken up from
the newest kept state at or before ``before`` steps ahead of the onset (``flight/``, ``checkpoints/``, else the beginning),
trained unchanged up to there, and from there on with the change. Data, order and dropout are functions of seed and step, so
without a change the fork repeats the original bit for bit, and the command says whether it did.

A fork is a run folder under ``RUN/replays/event-N/``, named by what was changed, with everything measured at every step.
All forks of an event are compared in ``RUN/replays/event-N/report.html``.

Limits: a responder acts in the fork as it did in the run, but it can go back no further than where the fork began.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from glm.data.loader import Loader
from glm.data.shards import TokenData, open_data
from glm.errors import InputError
from glm.train import checkpoint as checkpoints
from glm.train.checkpoint import Checkpoint
from glm.train.config import TrainConfig, differences, from_json
from glm.train.engine import LocalEngine
from glm.train.loop import FLIGHT, Trainer
from glm.train.monitoring import MonitorCallback
from glm.train.replay_report import show, write_report
from stabilitylab.command_line import parse
from stabilitylab.runs import Run, load_run
from stabilitylab.runs.folder import RunFolder
from stabilitylab.spikes import Episode, episodes_of
from stabilitylab.telemetry import Event

UNCHANGED = "unchanged"
_COMPARED = ("train/-/loss", "train/-/gradient_norm", "precision/-/loss_scale")


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What is asked for.

    Attributes:
        run: the run whose event is replayed.
        event: the event's number, from 1.
        before: steps before the onset at which the change begins.
        steps: steps trained from there.
        data: folder made by ``glm shards``; None: where the run found it.
        out: the fork's folder; None: under the run's own.
        skip: steps whose batches are left out.
        config: the fork's configuration.
    """

    run: Path
    event: int
    before: int
    steps: int
    data: Path | None
    out: Path | None
    skip: tuple[int, ...]
    config: TrainConfig


def replay_command(arguments: Sequence[str]) -> int:
    """Parse ``RUN --event N [flags]``, replay, and print the comparison. Returns the exit code."""
    asked = _parse(arguments)
    fork = replay(asked, console=Console(stderr=True))
    runs = [fork]
    if asked.out is None:
        siblings = sorted(path for path in fork.path.parent.iterdir() if (path / "config.json").is_file())
        runs = [load_run(path) for path in siblings]
    original = load_run(asked.run)
    episode = _episode(original, asked.event)
    show(Console(), original, episode, runs)
    folder = fork.path if asked.out is not None else fork.path.parent
    print(f"report: {write_report(folder, original, episode, runs)}")
    return 0


def replay(asked: Replay, *, console: Console) -> Run:
    """Make the fork.

    Raises:
        InputError: there is no such event, its data or states are missing, or the changed model cannot take the state.
    """
    run = load_run(asked.run)
    original = _config(run)
    episode = _episode(run, asked.event)
    data = open_data(asked.data or _data_of(run))
    begin = max(0, episode.onset - asked.before)
    change = describe_change(original, asked.config, asked.skip)
    out = RunFolder(asked.out or asked.run / "replays" / f"event-{asked.event}" / _folder_name(change))
    if (out.path / "config.json").exists():
        raise InputError(
            f"{out.path} already holds this fork: remove it to make it again, or give another --out"
        )
    out.claim()
    try:
        start = _state_before(run, begin)
        console.print(
            f"event {asked.event}: {episode.kind} at step {episode.onset}; "
            f"from {'the beginning' if start is None else f'the state of step {start.step}'}, change at step {begin}"
        )
        state = _lead_in(original, data, start, begin)
        _train_fork(asked, data, state, out, begin, change)
    finally:
        out.release()
    fork = load_run(out.path)
    if change == UNCHANGED:
        console.print(compare_with_original(run, fork, begin))
    return fork


def describe_change(original: TrainConfig, changed: TrainConfig, skip: Sequence[int]) -> str:
    """What differs, as ``field=value`` joined by commas; "unchanged" if nothing does."""
    lines = differences(json.loads(original.to_json()), json.loads(changed.to_json()))
    words = [f"{line.partition(': ')[0]}={line.rpartition(' -> ')[2]}" for line in lines]
    if skip:
        words.append("skip=" + "+".join(str(step) for step in skip))
    return ",".join(words) or UNCHANGED


def compare_with_original(original: Run, fork: Run, begin: int) -> str:
    """Whether an unchanged fork repeats the run's losses, gradient norms and loss scales to the last bit."""
    steps = 0
    for name in _COMPARED:
        ours, theirs = fork.series(name), original.series(name)
        common = [step for step in ours.index.intersection(theirs.index) if step >= begin]
        for step in common:
            a, b = float(ours.loc[step]), float(theirs.loc[step])
            if a != b and not (math.isnan(a) and math.isnan(b)):
                return f"NOT identical to the original: {name} at step {step} is {a!r}, was {b!r}"
        steps = max(steps, len(common))
    return f"bit-identical to the original over {steps} steps"


def _parse(arguments: Sequence[str]) -> Replay:
    own = argparse.ArgumentParser(
        prog="glm replay",
        allow_abbrev=False,
        description="Replay an event from before it, with one thing changed; any flag of glm train changes it.",
    )
    own.add_argument("run", type=Path, help="run folder")
    own.add_argument(
        "--event",
        type=int,
        required=True,
        help="number of the episode, as `stabilitylab spikes RUN` lists them",
    )
    own.add_argument(
        "--before", type=int, default=20, help="steps before the onset at which the change begins (20)"
    )
    own.add_argument("--steps", type=int, default=60, help="steps to train from there (60)")
    own.add_argument("--data", type=Path, help="folder made by `glm shards`, if it has moved since")
    own.add_argument("--out", type=Path, help="the fork's folder; by default under RUN/replays")
    own.add_argument(
        "--skip-batches",
        type=int,
        nargs="+",
        default=[],
        metavar="STEP",
        help="leave the batches of these steps out",
    )
    own.exit_on_error = False
    try:
        words, rest = own.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise InputError(f"glm replay: {error}") from None
    if words.before < 0 or words.steps < 1:
        raise InputError("glm replay: --before is 0 or more steps, --steps at least 1")
    config = _config(load_run(words.run))
    changed: TrainConfig = parse(TrainConfig, rest, program="glm replay RUN --event N", default=config)
    return Replay(
        run=words.run,
        event=words.event,
        before=words.before,
        steps=words.steps,
        data=words.data,
        out=words.out,
        skip=tuple(sorted(words.skip_batches)),
        config=changed,
    )


def _config(run: Run) -> TrainConfig:
    file: Path = run.folder.config
    if not file.is_file():
        raise InputError(f"{run.path} has no config.json: only runs of `glm train` can be replayed")
    return from_json(file.read_text(encoding="utf-8"), source=file)


def _episode(run: Run, number: int) -> Episode:
    episodes = episodes_of(run.events)
    if not episodes:
        raise InputError(f"{run.path} has no events to replay")
    if not 1 <= number <= len(episodes):
        listed = ", ".join(f"{i} ({one.kind} at {one.onset})" for i, one in enumerate(episodes[:10], start=1))
        more = ", ..." if len(episodes) > 10 else ""
        raise InputError(f"{run.path} has no event {number}: choose one of {listed}{more}")
    return episodes[number - 1]


def _data_of(run: Run) -> Path:
    for event in reversed(run.events):
        if event.kind == "run-start" and "data" in event.data:
            return Path(event.data["data"])
    raise InputError(f"{run.path} does not say where its data lies: give --data")


def _state_before(run: Run, step: int) -> Checkpoint | None:
    """The newest whole state at or before ``step``; None where the beginning is the only one."""
    folders = (run.path / FLIGHT, run.folder.checkpoints)
    found = [one for folder in folders for one in checkpoints.list_checkpoints(folder) if one[0] <= step]
    for _, path in sorted(found, reverse=True):
        try:
            return checkpoints.load(path)
        except InputError:
            continue  # damaged: an older one gives the same steps, only later
    return None


def _trainer(config: TrainConfig, data: TokenData, callbacks: Sequence[MonitorCallback]) -> Trainer:
    loader = Loader(data, config.objective, config.sampling, length=config.model.length, seed=config.seed)
    return Trainer(config, LocalEngine(config), loader, callbacks=callbacks)


def _lead_in(config: TrainConfig, data: TokenData, start: Checkpoint | None, begin: int) -> Checkpoint:
    """The state of step ``begin``, trained from ``start`` as the original was."""
    # The detector goes along, so that the fork judges its steps by the same history; nothing is written.
    watch = MonitorCallback(None, dataclasses.replace(config.monitor, every=0, gradients_every=0, recorder=0))
    trainer = _trainer(config, data, (watch,))
    if start is not None:
        trainer.restore(start)
    return trainer.advance(begin)


def _train_fork(
    asked: Replay, data: TokenData, state: Checkpoint, out: RunFolder, begin: int, change: str
) -> None:
    monitor = dataclasses.replace(
        asked.config.monitor, every=1, gradients_every=1, recorder=0, tensorboard=False
    )
    config = dataclasses.replace(asked.config, monitor=monitor)
    watch = MonitorCallback(out, monitor)
    trainer = _trainer(config, data, (watch,))
    trainer.restore(state)
    trainer.intervention = trainer.intervention.leaving_out(asked.skip)
    out.config.write_text(config.to_json(), encoding="utf-8")
    trainer.tell(
        Event(step=begin, kind="rewind", data={"why": "fork", "of": str(asked.run), "change": change})
    )
    trainer.train(until=begin + asked.steps)


def _folder_name(change: str) -> str:
    """A name that every file system takes."""
    return "".join(c if c.isalnum() or c in "._=+,-" else "-" for c in change)[:120]
