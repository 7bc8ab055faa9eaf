"""Many forks of one state: what would have happened had one thing been different.

    forks = ReplayForks.of_event(run, 1, before=20)       # or ReplayForks(config, data, trainer.state())
    control = forks.train(Change(), steps=60)
    without = forks.train(Change(hold=("layers.0.attention",)), steps=60)

Data, order and dropout are functions of seed and step, so a fork without a change repeats the original bit for bit, however many
forks this process trained before; whatever differs comes from the change.

A ``Change`` is a configuration, or one of these:

    skip                   leave the batches of some steps out
    hold, only             withhold the update of parameters that a glob matches, or of all that none matches, for ``hold_steps``
    rate_factor            multiply the scheduled rate
    renew_second_moments   let v be what the next gradient alone makes it: an update of size one where v was stale

Held parameters keep master, weight and moments to the last bit, and do not decay; the global norm and the clipping factor are those
of all gradients, so in the fork's first step the other parameters move exactly as they did.

Limit: the local engine only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import torch

from glm.data.loader import Loader
from glm.data.shards import TokenData, open_data
from glm.errors import InputError
from glm.train import checkpoint as checkpoints
from glm.train.checkpoint import Checkpoint
from glm.train.config import TrainConfig, from_json
from glm.train.engine import LocalEngine
from glm.train.events import Callback, StepInfo
from glm.train.loop import FLIGHT, Trainer
from glm.train.monitoring import MonitorCallback
from stabilitylab.runs import Run, load_run
from stabilitylab.spikes import Episode, episodes_of
from stabilitylab.spikes.log_scan import listed_episodes
from stabilitylab.telemetry import LOSS, Event

_SHOWN = 40


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a fork does differently; nothing by default.

    Attributes:
        config: its configuration; None: the original's.
        skip: steps whose batches to leave out.
        hold: globs of parameters, or of modules, not to update.
        only: globs of the only ones to update.
        hold_steps: number of updates under ``hold`` and ``only``; None: all of the fork's.
        rate_factor: on the scheduled learning rate.
        renew_second_moments: globs of parameters whose second moments start afresh at the fork.
    """

    config: TrainConfig | None = None
    skip: tuple[int, ...] = ()
    hold: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    hold_steps: int | None = None
    rate_factor: float = 1.0
    renew_second_moments: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.hold_steps is not None and self.hold_steps < 1:
            raise InputError(f"--hold-steps counts updates: at least 1, got {self.hold_steps}")
        if self.hold_steps is not None and not (self.hold or self.only):
            raise InputError("--hold-steps says how long --hold or --only last: give one of them")
        if not self.rate_factor > 0:
            raise InputError(f"--rate-factor must be above 0, got {self.rate_factor}")

    @property
    def words(self) -> list[str]:
        """``name=value`` for each field, beside the configuration, that changes anything."""
        found = [
            f"{name}={'+'.join(map(str, value))}"
            for name, value in (
                ("skip", self.skip),
                ("hold", self.hold),
                ("only", self.only),
                ("renew-second-moments", self.renew_second_moments),
            )
            if value
        ]
        if self.hold_steps is not None:
            found.append(f"hold-steps={self.hold_steps}")
        if self.rate_factor != 1.0:
            found.append(f"rate-factor={self.rate_factor:g}")
        return found

    def apply(self, trainer: Trainer) -> None:
        """Make the next steps of ``trainer`` the fork's. Raises InputError where a glob matches no parameter."""
        names = list(trainer.engine.tensors()[0])
        held = set(matching(self.hold, names, "--hold"))
        if self.only:
            held |= set(names) - set(matching(self.only, names, "--only"))
        intervention = trainer.intervention
        if self.skip:
            intervention = intervention.leaving_out(self.skip)
        trainer.intervention = dataclasses.replace(
            intervention,
            rate_factor=intervention.rate_factor * self.rate_factor,
            held=tuple(name for name in names if name in held),
            held_until=None if self.hold_steps is None else trainer.step + self.hold_steps,
        )
        renewed = matching(self.renew_second_moments, names, "--renew-second-moments")
        trainer.engine.renew_second_moments(frozenset(renewed))


def matching(globs: Sequence[str], names: Sequence[str], flag: str) -> list[str]:
    """The parameters that any glob matches, by their own name or by that of a module around them.

    Raises:
        InputError: a glob matches none.
    """
    found: dict[str, None] = {}
    for glob in globs:
        hits = [name for name in names if any(fnmatchcase(path, glob) for path in _paths(name))]
        if not hits:
            raise InputError(f"{flag} {glob!r} matches no parameter of the model: it has {groups_of(names)}")
        found.update(dict.fromkeys(hits))
    return [name for name in names if name in found]


def _paths(name: str) -> Iterable[str]:
    """A parameter and the modules around it: a.b.weight, a.b, a."""
    parts = name.split(".")
    return (".".join(parts[:length]) for length in range(len(parts), 0, -1))


def groups_of(names: Iterable[str]) -> str:
    """The modules that have parameters, each once for all layers: ``embedding, layers.*.attention.output, ...``."""
    modules = (name.rpartition(".")[0] or name for name in names)
    groups = dict.fromkeys(
        ".".join("*" if part.isdigit() else part for part in path.split(".")) for path in modules
    )
    shown = list(groups)[:_SHOWN]
    return ", ".join(shown) + (", ..." if len(groups) > _SHOWN else "")


@dataclass(frozen=True, kw_only=True)
class ReplayFork:
    """A change's outcome.

    Attributes:
        change: what the fork did differently.
        steps: every update.
        events: what the detector noticed, and what a responder did.
        state: after the last update.
    """

    change: Change
    steps: tuple[StepInfo, ...]
    events: tuple[Event, ...]
    state: Checkpoint = field(repr=False)

    @property
    def losses(self) -> list[float]:
        """One per step, nats."""
        return [info.loss for info in self.steps]

    @property
    def episodes(self) -> list[Episode]:
        """The detector's episodes."""
        return episodes_of(self.events)


class ReplayForks:
    """Trains forks of one state in this process, one after the other. Writes nothing.

    Args:
        config: the original's, its vocabulary filled in.
        data: the training data.
        state: where forks begin; copied.
        device: where the model lives.
    """

    def __init__(
        self, config: TrainConfig, data: TokenData, state: Checkpoint, *, device: torch.device | str = "cpu"
    ) -> None:
        self.config, self.data, self.state, self.device = config, data, state.copied(), device

    @classmethod
    def of_event(
        cls,
        run: Path,
        event: int,
        *,
        before: int = 20,
        data: Path | None = None,
        device: torch.device | str = "cpu",
    ) -> ReplayForks:
        """Forks of a run of ``glm train`` from ``before`` steps ahead of an event's onset; events count from 1.

        Raises:
            InputError: the run has no such event, or its data are no longer in their place.
        """
        original = load_run(run)
        begin = max(0, episode_of(original, event).onset - before)
        config = config_of(original)
        opened = open_data(data or data_of(original))
        return cls(config, opened, state_at(original, config, opened, begin, device=device), device=device)

    def train(self, change: Change, *, steps: int, callbacks: Sequence[Callback] = ()) -> ReplayFork:
        """Train ``steps`` updates with a change; ``callbacks`` watch as in a run.

        Raises:
            InputError: a glob of the change matches nothing, or its configuration belongs to another model.
        """
        config = change.config or self.config
        watch = _Watch(config)
        trainer = trainer_of(config, self.data, (watch, *callbacks), device=self.device)
        # Restoring never writes to the state: ``load_tensors`` copies out of it.
        trainer.restore(self.state)
        change.apply(trainer)
        trainer.train(until=self.state.step + steps)
        return ReplayFork(
            change=change,
            steps=tuple(watch.steps),
            events=tuple(watch.noticed),
            state=trainer.state().copied(),
        )


class _Watch(MonitorCallback):
    """The detector alone, which goes on from the state's, and the list of its events."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(None, dataclasses.replace(config.monitor, every=0, gradients_every=0, recorder=0))
        self.steps: list[StepInfo] = []
        self.noticed: list[Event] = []

    @property
    def state_name(self) -> str:
        return MonitorCallback.__name__

    def step_end(self, info: StepInfo) -> Sequence[Event]:
        noticed = super().step_end(info)
        self.steps.append(info)
        self.noticed += noticed
        return noticed

    def event(self, event: Event) -> None:
        if event.kind in ("response", "rewind"):
            self.noticed.append(event)
        super().event(event)


# ------------------------------------------------------------------------------------------- what a run left behind


def config_of(run: Run) -> TrainConfig:
    """The configuration of a run of ``glm train``."""
    file: Path = run.folder.config
    if not file.is_file():
        raise InputError(f"{run.path} has no config.json: only runs of `glm train` can be replayed")
    return from_json(file.read_text(encoding="utf-8"), source=file)


def episode_of(run: Run, number: int) -> Episode:
    """The episode that ``stabilitylab spikes`` lists under ``number``, from 1: recorded, or found in the log alone."""
    episodes = listed_episodes(run.path) if len(run.series(LOSS)) else episodes_of(run.events)
    if not episodes:
        raise InputError(f"{run.path} has no event {number}: it has none")
    if not 1 <= number <= len(episodes):
        listed = ", ".join(f"{i} ({one.kind} at {one.onset})" for i, one in enumerate(episodes[:10], start=1))
        more = ", ..." if len(episodes) > 10 else ""
        raise InputError(f"{run.path} has no event {number}: choose one of {listed}{more}")
    return episodes[number - 1]


def data_of(run: Run) -> Path:
    """Where the run found its data."""
    for event in reversed(run.events):
        if event.kind == "run-start" and "data" in event.data:
            return Path(event.data["data"])
    raise InputError(f"{run.path} does not say where its data lies: give --data")


def state_before(
    run: Run, step: int, *, damaged: Callable[[InputError], object] = lambda error: None
) -> Checkpoint | None:
    """The newest whole state at or before ``step``; None where there is only the beginning.

    Args:
        damaged: called with the error of each newer one that cannot be read.
    """
    folders = (run.path / FLIGHT, run.folder.checkpoints)
    found = [one for folder in folders for one in checkpoints.list_checkpoints(folder) if one[0] <= step]
    for _, path in sorted(found, reverse=True):
        try:
            return checkpoints.load(path)
        except InputError as error:
            damaged(error)  # an older one gives the same steps, only later
    return None


def state_at(
    run: Run, config: TrainConfig, data: TokenData, step: int, *, device: torch.device | str = "cpu"
) -> Checkpoint:
    """The state of ``step``, trained as in the original from the newest kept state before it."""
    return lead_in(config, data, state_before(run, step), step, device=device)


def lead_in(
    config: TrainConfig,
    data: TokenData,
    start: Checkpoint | None,
    step: int,
    *,
    device: torch.device | str = "cpu",
) -> Checkpoint:
    """Train from ``start``, or the beginning, to ``step``. The detector watches; nothing is written."""
    watch = MonitorCallback(None, dataclasses.replace(config.monitor, every=0, gradients_every=0, recorder=0))
    trainer = trainer_of(config, data, (watch,), device=device)
    if start is not None:
        trainer.restore(start)
    return trainer.advance(step)


def trainer_of(
    config: TrainConfig, data: TokenData, callbacks: Sequence[Callback], *, device: torch.device | str = "cpu"
) -> Trainer:
    """A trainer without a folder, on the local engine."""
    loader = Loader(data, config.objective, config.sampling, length=config.model.length, seed=config.seed)
    return Trainer(config, LocalEngine(config, device), loader, callbacks=callbacks)
