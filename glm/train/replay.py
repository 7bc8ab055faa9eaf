"""``glm replay`` trains an event again, from before it, with one thing changed.

    glm replay RUN --event 3 --before 20 --steps 60 --model.embedding.gradient-shrink 0.1

    glm replay RUN --event 3 --hold 'layers.*.attention' --hold-steps 5
    glm replay RUN --event 3 --only embedding
    glm replay RUN --event 3 --skip-batches 412 413
    glm replay RUN --event 3 --rate-factor 0.3
    glm replay RUN --event 3 --optimizer.clip 0.3
    glm replay RUN --event 3 --renew-second-moments '*'

(``glm.train.replay_forks`` says what each does, and trains many forks in one process.) An event's number is its place among the
run's episodes, as ``stabilitylab spikes RUN`` lists them. The command starts from the newest kept state at or before ``before``
steps ahead of the onset (``flight/``, ``checkpoints/``, else the beginning), trains unchanged up to there, and from there on with
the change. Data, order and dropout are functions of seed and step, so without a change the fork repeats the original bit for bit,
on the kind of device that trained the run, and the command says whether it did.

A fork is a run folder under ``RUN/replays/event-N/``, named after its change, with everything measured at every step.
``RUN/replays/event-N/report.html`` compares all forks of an event.

Limits: a responder acts in the fork as in the run, but can go back no further than the fork's beginning.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from glm.data.shards import TokenData, open_data
from glm.errors import InputError
from glm.train.checkpoint import Checkpoint
from glm.train.config import TrainConfig, differences
from glm.train.event_options import event_parser, parsed
from glm.train.monitoring import MonitorCallback
from glm.train.replay_forks import (
    Change,
    config_of,
    data_of,
    episode_of,
    lead_in,
    state_before,
    trainer_of,
)
from glm.train.replay_report import LATER, LOSS, show, verdict_of, write_report
from glm.train.reproducibility import device_of, machine_of, otherwise, threads, threads_of
from glm.train.unused_settings import refuse_idle
from stabilitylab.command_line import parse
from stabilitylab.runs import Run, load_run
from stabilitylab.runs.folder import RunFolder
from stabilitylab.spikes import Episode
from stabilitylab.spikes.treatment_outcomes import OUTCOME, treatment_of
from stabilitylab.telemetry import Event

UNCHANGED = "unchanged"
_LONGEST = 110
_COMPARED = ("train/-/loss", "train/-/gradient_norm", "precision/-/loss_scale")


@dataclass(frozen=True, kw_only=True)
class Replay:
    """The command's arguments.

    Attributes:
        run: the run whose event to replay.
        event: the event's number, from 1.
        before: steps before the onset at which the change begins.
        steps: steps to train from there.
        data: folder made by ``glm shards``; None: where the run found it.
        out: the fork's folder; None: under the run's own.
        device: device to train on; None: the kind of device that trained the run.
        change: what the fork does differently.
    """

    run: Path
    event: int
    before: int
    steps: int
    data: Path | None
    out: Path | None
    change: Change
    device: str | None = None


def replay_command(arguments: Sequence[str]) -> int:
    """Parse ``RUN --event N [flags]``, replay, and print the comparison. Returns the exit code."""
    asked = _parse(arguments)
    fork = replay(asked, console=Console(stderr=True))
    runs = [fork]
    if asked.out is None:
        siblings = sorted(path for path in fork.path.parent.iterdir() if (path / "config.json").is_file())
        runs = [load_run(path) for path in siblings]
    original = load_run(asked.run)
    episode = episode_of(original, asked.event)
    show(Console(), original, episode, runs)
    folder = fork.path if asked.out is not None else fork.path.parent
    print(f"report: {write_report(folder, original, episode, runs)}")
    return 0


def replay(asked: Replay, *, console: Console) -> Run:
    """Train the fork.

    Raises:
        InputError: there is no such event, its data or states are missing, or the changed model cannot take the state.
    """
    run = load_run(asked.run)
    original = config_of(run)
    episode = episode_of(run, asked.event)
    data = open_data(asked.data or data_of(run))
    begin = max(0, episode.onset - asked.before)
    change = describe_change(original, asked.change)
    out = RunFolder(asked.out or asked.run / "replays" / f"event-{asked.event}" / _folder_name(change))
    if (out.path / "config.json").exists():
        raise InputError(
            f"{out.path} already holds this fork: remove it to make it again, or give another --out"
        )
    out.claim()
    try:
        start = state_before(run, begin)
        console.print(
            f"event {asked.event}: {episode.kind} at step {episode.onset}; "
            f"from {'the beginning' if start is None else f'the state of step {start.step}'}, change at step {begin}"
        )
        device = device_of(run, asked.device)
        with threads(threads_of(run)):
            state = lead_in(original, data, start, begin, device=device)
            _train_fork(asked, data, state, out, change, device)
        _record_outcome(run, episode, out, change)
    finally:
        out.release()
    fork = load_run(out.path)
    if change == UNCHANGED:
        console.print(compare_with_original(run, fork, begin))
    return fork


def describe_change(original: TrainConfig, change: Change) -> str:
    """The differences as ``field=value`` joined by commas; "unchanged" if there are none."""
    lines = differences(json.loads(original.to_json()), json.loads((change.config or original).to_json()))
    words = [f"{line.partition(': ')[0]}={line.rpartition(' -> ')[2]}" for line in lines] + change.words
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
                said = otherwise(original, machine_of(fork))
                why = f": the fork has {said}" if said else ""
                return f"NOT identical to the original: {name} at step {step} is {a!r}, was {b!r}{why}"
        steps = max(steps, len(common))
    return f"bit-identical to the original over {steps} steps"


def _parse(arguments: Sequence[str]) -> Replay:
    own = event_parser(
        "glm replay",
        "Replay an event from before it, with one thing changed; any flag of glm train changes it.",
    )
    own.add_argument(
        "--before", type=int, default=20, help="steps before the onset at which the change begins (20)"
    )
    own.add_argument("--steps", type=int, default=60, help="steps to train from there (60)")
    own.add_argument("--out", type=Path, help="the fork's folder; by default under RUN/replays")
    own.add_argument(
        "--skip-batches",
        type=int,
        nargs="+",
        default=[],
        metavar="STEP",
        help="leave the batches of these steps out",
    )
    for flag, meaning in (
        ("--hold", "withhold the update of the parameters or modules that match; may be repeated"),
        ("--only", "update only those; may be repeated"),
        ("--renew-second-moments", "let their second moments be what the next gradient alone makes them"),
    ):
        own.add_argument(flag, action="append", default=[], metavar="GLOB", help=meaning)
    own.add_argument(
        "--hold-steps", type=int, metavar="K", help="updates for which --hold and --only last (all)"
    )
    own.add_argument(
        "--rate-factor", type=float, default=1.0, metavar="F", help="multiply the scheduled rate"
    )
    words, rest = parsed(own, arguments, all_known=False)
    if words.before < 0 or words.steps < 1:
        raise InputError("glm replay: --before is 0 or more steps, --steps at least 1")
    change = Change(
        skip=tuple(sorted(words.skip_batches)),
        hold=tuple(words.hold),
        only=tuple(words.only),
        hold_steps=words.hold_steps,
        rate_factor=words.rate_factor,
        renew_second_moments=tuple(words.renew_second_moments),
    )
    config = config_of(load_run(words.run))
    changed: TrainConfig = parse(TrainConfig, rest, program="glm replay RUN --event N", default=config)
    refuse_idle(rest, changed)
    return Replay(
        run=words.run,
        event=words.event,
        before=words.before,
        steps=words.steps,
        data=words.data,
        out=words.out,
        device=words.device,
        change=dataclasses.replace(change, config=changed),
    )


def _train_fork(
    asked: Replay, data: TokenData, state: Checkpoint, out: RunFolder, told: str, device: torch.device
) -> None:
    assert asked.change.config is not None
    monitor = dataclasses.replace(
        asked.change.config.monitor, every=1, gradients_every=1, recorder=0, tensorboard=False
    )
    config = dataclasses.replace(asked.change.config, monitor=monitor)
    trainer = trainer_of(config, data, (MonitorCallback(out, monitor),), device=device)
    trainer.restore(state)
    asked.change.apply(trainer)
    out.config.write_text(config.to_json(), encoding="utf-8")
    trainer.tell(
        Event(step=state.step, kind="rewind", data={"why": "fork", "of": str(asked.run), "change": told})
    )
    trainer.train(until=state.step + asked.steps)


def _record_outcome(original: Run, episode: Episode, out: RunFolder, change: str) -> None:
    """Record in the fork whether its change helped, for the advice on later events (``treatment_outcomes.py``); not where the fork
    ends within ten steps of the onset, too soon to tell.
    """
    fork = load_run(out.path)
    loss = fork.series(LOSS)
    if change == UNCHANGED or not len(loss) or int(loss.index.max()) < episode.onset + LATER:
        return
    verdict = verdict_of(original, episode, fork)
    told = {"kind": episode.kind, "signal": episode.signal, "onset": episode.onset}
    data = {"of": "replay", "treatment": treatment_of(change.split(",")), "event": told, "change": change}
    judged = {"verdict": verdict, "helped": verdict == "prevented"}
    out.append_events([Event(step=episode.onset, kind=OUTCOME, data={**data, **judged})])


def _folder_name(change: str) -> str:
    """A name that every file system accepts and no other change has."""
    name = "".join(c if c.isalnum() or c in "._=+,-" else "-" for c in change)
    if name == change and len(name) <= _LONGEST:
        return name
    return f"{name[:_LONGEST]}-{hashlib.sha256(change.encode()).hexdigest()[:6]}"
