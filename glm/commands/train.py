"""``glm train``: a preset with any field overridden, into a run folder, resumable.

A run folder belongs to one configuration: the command refuses a second run into it, and ``--resume`` continues only with the same
values of everything that determines the run's numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console

from glm.commands.train_help import help_text
from glm.data.loader import Loader
from glm.data.shards import TokenData, open_data
from glm.device import chosen_device
from glm.distributed.launch import joined, speaks
from glm.distributed.process_group import EverywhereError, EverywhereOSError, ProcessGroup
from glm.errors import InputError
from glm.parallel.topology import checked
from glm.planning.device_memory import check_fits
from glm.presets import PRESETS
from glm.train import checkpoint as checkpoints
from glm.train.config import MAY_CHANGE, TrainConfig, differences, from_json
from glm.train.engine import Engine, LocalEngine
from glm.train.events import Callback
from glm.train.loop import Trainer
from glm.train.lost_run import EndsWhenLost
from glm.train.monitoring import MonitorCallback
from glm.train.progress import ProgressCallback
from glm.train.unused_settings import idle_settings, refuse_idle
from stabilitylab.command_line import parse
from stabilitylab.command_line.whole_file import whole_file
from stabilitylab.runs.folder import RunFolder
from stabilitylab.sinks.trackers import names_of
from stabilitylab.telemetry import Event

SECONDS_TO_SPEAK = 5.0
_HELP_WIDTH = 100  # characters; tyro begins a second column some way beyond


@dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """Train a preset; any field can be overridden.

    Attributes:
        data: folder made by `glm shards`.
        out: run folder; made if it does not exist.
        resume: continue the run in `out` from its newest checkpoint.
        device: "cpu", "cuda", ...; by default cuda where there is one.
        trackers: experiment trackers to send numbers to as well, separated by commas: wandb, mlflow, trackio.
    """

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    data: Path
    out: Path
    resume: bool = False
    device: str | None = None
    trackers: str = ""


def train_configs() -> dict[str, TrainConfig]:
    """Every preset as a full configuration."""
    return {name: preset_config(name) for name in PRESETS}


def preset_config(name: str) -> TrainConfig:
    """The configuration that a preset's name stands for. Raises InputError with the names there are."""
    if name not in PRESETS:
        raise InputError(f"there is no preset {name!r}: choose one of {', '.join(PRESETS)}")
    preset = PRESETS[name]
    objective = dataclasses.replace(TrainConfig().objective, kind=preset.objective)
    return TrainConfig(preset=name, model=preset.model, objective=objective, optimizer=preset.optimizer)


def train_command(arguments: Sequence[str]) -> int:
    """Parse ``PRESET [flags]`` and train. Returns the exit code."""
    if speaks():
        return _train_command(arguments)
    # One of several processes speaks; the others would say the same, and the launcher stops them when it has spoken. Before
    # training begins there is nothing to save; training has a signal handler of its own.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(2))
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            return _train_command(arguments)
    except (EverywhereError, EverywhereOSError, SystemExit) as stop:
        code = stop.code if isinstance(stop, SystemExit) else 2
        if code == 2:
            # The launcher ends all processes as soon as one has ended: that must be the one that speaks.
            time.sleep(SECONDS_TO_SPEAK)
        return int(code or 0)


def _train_command(arguments: Sequence[str]) -> int:
    command = parse_command(arguments)
    refuse_idle(arguments, command.config)
    complete = train(command, console=Console(stderr=True))
    print(f"{'complete' if complete else 'interrupted, continue with --resume'}: {command.out}")
    return 0


def parse_command(arguments: Sequence[str]) -> TrainCommand:
    """``PRESET [flags]`` as a command. Raises InputError, or SystemExit as ``parse`` does."""
    if not arguments or arguments[0].startswith("-"):
        names = "\n".join(f"  {name:15} {preset.summary}" for name, preset in PRESETS.items())
        if arguments and arguments[0] in ("-h", "--help"):
            print(
                f"usage: glm train PRESET --data DIR --out RUN [flags]\n\npresets (each takes --help):\n{names}"
            )
            raise SystemExit(0)
        raise InputError(f"glm train needs a preset first: one of {', '.join(PRESETS)}")
    name, *rest = arguments
    default = TrainCommand(config=preset_config(name), data=tyro.MISSING, out=tyro.MISSING)
    program = f"glm train {name}"
    if asked := [place for place, word in enumerate(rest) if word in ("-h", "--help")]:
        group = next((word for word in rest[asked[0] + 1 :] if not word.startswith("-")), None)
        page = io.StringIO()
        with redirect_stdout(page), contextlib.suppress(SystemExit), _one_column():
            parse(TrainCommand, ["--help"], program=program, default=default)
        print(help_text(page.getvalue(), program, group))
        raise SystemExit(0)
    parsed: TrainCommand = parse(TrainCommand, rest, program=program, default=default)
    return parsed


@contextmanager
def _one_column() -> Iterator[None]:
    """For this block report a terminal so narrow that tyro puts no groups of flags beside each other."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(min(shutil.get_terminal_size().columns, _HELP_WIDTH))
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def train(command: TrainCommand, *, console: Console) -> bool:
    """Train or continue the command's run. Returns whether the run is complete.

    Raises:
        InputError: the data, the folder, the configuration or the checkpoint does not fit.
    """
    device, trackers = chosen_device(command.device), names_of(command.trackers)
    with joined(command.config.parallel, device, command.config.to_json()) as processes:
        with processes.together():
            data = open_data(command.data)
            config = with_vocabulary(command.config, data)
            if config.parallel.ranks > 1:
                checked(config.parallel, config.model)
            else:
                check_fits(config.model, config.precision, device)
        run = RunFolder(command.out)
        resumes = False
        try:
            with processes.together():
                if processes.leads:
                    run.claim()
                    resumes = _prepare(run, config, resume=command.resume, console=console)
            resumes = processes.from_first(resumes)
            return _train_claimed(
                config, data, run, device, processes, resumes=resumes, console=console, trackers=trackers
            )
        finally:
            run.release()


def _train_claimed(
    config: TrainConfig,
    data: TokenData,
    run: RunFolder,
    device: torch.device,
    processes: ProcessGroup,
    *,
    resumes: bool,
    console: Console,
    trackers: Sequence[str],
) -> bool:
    loader = Loader(data, config.objective, config.sampling, length=config.model.length, seed=config.seed)
    leading = processes.from_first(loader.fingerprint)
    with processes.together():
        if loader.fingerprint != leading:
            raise InputError(
                f"{data.path} holds other data on another machine ({loader.fingerprint}, on rank 0 {leading}): "
                "give all ranks the same"
            )
    callbacks: list[Callback] = [MonitorCallback(run, config.monitor, trackers=trackers)]
    if config.stop_when_lost:
        callbacks.append(EndsWhenLost(config.stop_when_lost))
    if processes.leads:
        callbacks.append(ProgressCallback(console))
    trainer = Trainer(config, _engine(config, device, processes), loader, run=run, callbacks=callbacks)
    if resumes:
        _restore(trainer, run)
    if processes.leads:
        # People use a run where its data may be missing: it keeps the tokenizer.
        shutil.copyfile(data.path / "tokenizer.model", run.path / "tokenizer.model")
    with _stops_on_signals(trainer, console):
        return trainer.train()


def _engine(config: TrainConfig, device: torch.device, processes: ProcessGroup) -> Engine:
    if config.parallel.ranks == 1:
        return LocalEngine(config, device)
    with processes.together():
        # Imported here: DeepSpeed takes a second, and one process does not need it.
        from glm.parallel.engine import ParallelEngine
    return ParallelEngine(config, device)


def with_vocabulary(config: TrainConfig, data: TokenData) -> TrainConfig:
    """The configuration with the vocabulary of the data's tokenizer, where the preset leaves it open."""
    model = config.model
    if model.vocabulary is None:
        return dataclasses.replace(config, model=dataclasses.replace(model, vocabulary=data.vocabulary))
    if model.vocabulary < data.vocabulary:
        raise InputError(
            f"model.vocabulary is {model.vocabulary} but the data's tokenizer has {data.vocabulary} pieces: "
            "leave --model.vocabulary out, or make it at least as large"
        )
    return config


def _prepare(run: RunFolder, config: TrainConfig, *, resume: bool, console: Console) -> bool:
    """Write or check ``config.json``. Returns whether there is a state to resume."""
    file: Path = run.config
    if not file.is_file():
        _write_config(file, config)
        return False
    states = checkpoints.list_checkpoints(run.checkpoints)
    if not resume:
        raise InputError(
            f"{run.path} already holds a run: add --resume to continue it, or choose another --out"
        )
    old = from_json(file.read_text(encoding="utf-8"), source=file)
    # A value that nothing reads determines nothing; older runs may have recorded one.
    idle = idle_settings(old).keys() & idle_settings(config).keys()
    changed = [
        line
        for line in differences(json.loads(old.to_json()), json.loads(config.to_json()))
        if (name := line.partition(":")[0]).partition(".")[0] not in MAY_CHANGE and name not in idle
    ]
    if changed:
        raise InputError(
            f"{run.path} was trained with other settings ({'; '.join(changed[:3])}"
            f"{', ...' if len(changed) > 3 else ''}): resume with the same ones, or choose another --out"
        )
    _write_config(file, config)
    if states:
        _tell_of_a_jump(old, config, step=max(step for step, _ in states), console=console)
    return bool(states)


def _tell_of_a_jump(old: TrainConfig, new: TrainConfig, *, step: int, console: Console) -> None:
    """Warn where a changed schedule gives another rate at the step where training continues: a sudden change makes spikes."""
    before, now = (one.schedule.learning_rate(step, one.steps) for one in (old, new))
    if before > 0 and not 2 / 3 < now / before < 1.5:
        console.print(
            f"the rate jumps at step {step}: the schedule over {new.steps} steps gives {now:.3g} where the one over "
            f"{old.steps} gave {before:.3g}; --schedule.decay-steps {old.steps} keeps the old one",
            highlight=False,
        )


def _write_config(file: Path, config: TrainConfig) -> None:
    with whole_file(file) as partial:
        partial.write_text(config.to_json(), encoding="utf-8")


def _restore(trainer: Trainer, run: RunFolder) -> None:
    state, problems = trainer.engine.load_newest(run.checkpoints)
    trainer.restore(state)
    if trainer.processes.leads:
        checkpoints.set_aside_after(run.checkpoints, trainer.step)
    for problem in problems:
        trainer.tell(Event(step=trainer.step, kind="recovered", data={"problem": problem}))
    trainer.tell(Event(step=trainer.step, kind="rewind", data={"why": "resumed from a checkpoint"}))


@contextmanager
def _stops_on_signals(trainer: Trainer, console: Console) -> Iterator[None]:
    """The first SIGINT or SIGTERM lets the step end, saves and returns; a second SIGINT breaks off at once.

    Does nothing outside the main thread: Python delivers signals to that thread, whose owner answers them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        if trainer.stop_requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        trainer.stop_requested = True
        console.print(f"{signal.Signals(number).name}: saving after this step", style="yellow")

    before: dict[int, Any] = {
        number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
