"""Everything that determines a run's numbers, in one frozen value.

``config.json`` of a run folder is exactly this. The locations of the data and of the run are not part of it: both may move. The
command line is generated from it (``--model.norm deepnorm``, ``--precision fp16``).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import cattrs
import tyro
from cattrs.preconf.json import make_converter

from glm.data.config import DataConfig, ObjectiveConfig
from glm.distributed.config import ParallelConfig
from glm.errors import InputError
from glm.model.config import ModelConfig
from glm.precision.loss_scale import LossScaleConfig
from glm.train.emulation import EmulationConfig
from glm.train.heldout import HeldoutConfig
from glm.train.rate_schedule import ScheduleConfig
from glm.train.update_rules import OptimizerConfig
from glm.train.weight_rounding import MasterRounding
from stabilitylab.spikes import ResponderConfig


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How many rows an update sees, and how they pass through the model.

    Attributes:
        rows: rows (of ``model.length`` tokens) per update, after any ramp.
        micro_rows: rows per forward pass; an update accumulates the gradients of rows / micro_rows of them. None: all rows in one.
        ramp_from: rows of the first update; grows linearly to ``rows``. None: no ramp.
        ramp_samples: rows seen until the ramp ends.
    """

    rows: int = 8
    micro_rows: int | None = None
    ramp_from: int | None = None
    ramp_samples: int = 0

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise InputError(f"batch.rows must be at least 1, got {self.rows}")
        micro = self.micro
        if micro < 1 or self.rows % micro:
            raise InputError(f"batch.micro_rows must divide batch.rows ({self.rows}), got {micro}")
        if self.ramp_from is not None and not 0 < self.ramp_from <= self.rows:
            raise InputError(
                f"batch.ramp_from must be between 1 and batch.rows ({self.rows}), got {self.ramp_from}"
            )

    @property
    def micro(self) -> int:
        return self.rows if self.micro_rows is None else self.micro_rows

    def rows_at(self, samples: int) -> int:
        """Rows of the update that begins after ``samples`` rows, a multiple of the micro-batch."""
        if self.ramp_from is None or samples >= self.ramp_samples:
            return self.rows
        grown = self.ramp_from + (self.rows - self.ramp_from) * samples / self.ramp_samples
        return max(self.micro, int(grown) // self.micro * self.micro)


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """What to watch while training.

    Attributes:
        every: steps between full measurements of activations, attention and updates; 0: only the step's own values.
        gradients_every: steps between gradient statistics.
        sites: glob of the module and parameter paths to watch.
        tensorboard: write TensorBoard files beside the Parquet ones.
        weights_every: steps between measurements of the weights themselves (norms, largest singular values, angles); 0: never.
        curvature_every: steps between measurements of how much higher a learning rate the run would tolerate, each one more forward
            and backward pass; 0: never. AdamW, fp32, one process only.
        formats_every: steps between measurements of what low-bit formats would cost every linear layer, which
            ``stabilitylab forecast`` extrapolates; 0: never.
        recorder: measure every step, hold this many of the last steps in memory, and write them in full when something breaks;
            0: off.
    """

    every: int = 10
    gradients_every: int = 1
    sites: str = "*"
    tensorboard: bool = True
    recorder: int = 0
    weights_every: int = 0
    curvature_every: int = 0
    formats_every: int = 0

    def __post_init__(self) -> None:
        counted = (
            "every",
            "gradients_every",
            "recorder",
            "weights_every",
            "curvature_every",
            "formats_every",
        )
        for name in counted:
            if getattr(self, name) < 0:
                raise InputError(f"monitor.{name} counts steps: 0 (off) or more, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save states and how many to keep.

    Attributes:
        every: updates between checkpoints; the last state is always saved. 0: only the last.
        keep: number of newest checkpoints that stay.
        asynchronous: write from a copy while training continues; the copy takes up to 12 bytes a parameter until it is written.
        ring: number of recent states to hold in memory, each 12 bytes a parameter. When something breaks, the loop writes one from
            before it to ``flight/``, for ``glm replay``. 0: none. With a responder the ring holds as many as rolling back takes.
        ring_every: steps between these states; the responder's ring sets its own.
        ring_keep: number of newest states that stay in ``flight/``.
    """

    every: int = 100
    keep: int = 2
    asynchronous: bool = True
    ring: int = 4
    ring_every: int = 25
    ring_keep: int = 8

    def __post_init__(self) -> None:
        if self.every < 0:
            raise InputError(f"checkpoint.every counts updates: 0 (only the last) or more, got {self.every}")
        if self.keep < 1:
            raise InputError(f"checkpoint.keep must be at least 1, got {self.keep}")
        if self.ring < 0 or self.ring_every < 1 or self.ring_keep < 1:
            raise InputError(
                "checkpoint.ring counts states (0 or more); checkpoint.ring_every and checkpoint.ring_keep are at least 1"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A run of ``steps`` updates.

    Attributes:
        steps: updates to make; also the length of the learning-rate schedule.
        seed: seed of the initial weights, the data order and dropout.
        precision: compute format; masters and moments are fp32 in each.
        stop_when_lost: end the run after this many steps in a row that are lost: the loss is 1 nat above the first step's or not
            finite, or the loss scale overflows at its minimum. 0: never.
        bf16_weights: what to keep of a weight with precision bf16: an fp32 master, or bf16 alone, rounded stochastically or with
            Kahan's compensation.
        emulate: formats to which to round the operands of linear layers.
        compile: compile the layers with torch.compile: minutes before the first step, less time in each. Local engine only.
        preset: the name this configuration began from, for the reader.
    """

    preset: Annotated[str, tyro.conf.Suppress, tyro.conf.Fixed] = ""  # a command says it in its first word
    steps: int = 200
    seed: int = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    stop_when_lost: int = 0
    bf16_weights: MasterRounding = "masters"
    compile: bool = False
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    sampling: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    emulate: EmulationConfig = field(default_factory=EmulationConfig)
    loss_scale: LossScaleConfig = field(default_factory=LossScaleConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    responder: ResponderConfig = field(default_factory=ResponderConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    heldout: HeldoutConfig = field(default_factory=HeldoutConfig)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"steps must be at least 1, got {self.steps}")
        if self.stop_when_lost < 0:
            raise InputError(f"stop_when_lost counts steps: 0 (never) or more, got {self.stop_when_lost}")
        if not 0 <= self.seed < 2**31:
            raise InputError(f"seed must be in [0, 2^31), got {self.seed}")
        if self.monitor.curvature_every and (self.precision != "fp32" or self.parallel.ranks > 1):
            raise InputError(
                "monitor.curvature_every takes the difference of two gradients: it needs --precision fp32 and one process"
            )
        if self.compile and self.parallel.ranks > 1:
            raise InputError("compile works in one process only: leave it out, or leave out parallel.*")
        if self.heldout.rows and self.parallel.ranks > 1:
            raise InputError("heldout.rows works in one process only: leave it out, or leave out parallel.*")
        check_rules(self.optimizer, self.parallel)
        if self.bf16_weights != "masters" and (self.precision != "bf16" or self.parallel.ranks > 1):
            raise InputError(
                f"bf16_weights {self.bf16_weights} is for precision bf16 in one process: choose masters, or precision bf16"
            )
        if self.emulate.is_on:
            check_emulation(self)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, default=str)


def check_emulation(config: TrainConfig) -> None:
    """Raises InputError for settings that emulated products do not go with."""
    parallel = config.parallel
    if config.compile:
        raise InputError(
            "emulate rounds operands that torch.compile fuses away: leave out compile, or emulate.*"
        )
    if parallel.tensor > 1 or parallel.pipeline > 1 or parallel.zero > 1:
        raise InputError(
            "emulate takes a format's scales from whole matrices: choose parallel.data alone with parallel.zero 0 or 1, or leave "
            "out emulate.*"
        )
    if config.model.feed_forward.experts.count:
        raise InputError("emulate rounds linear layers, which experts are not: leave out one of them")


def check_rules(optimizer: OptimizerConfig, parallel: ParallelConfig) -> None:
    """Raises InputError where the ranks' shares are not enough for the optimizer."""
    if parallel.ranks == 1:
        return
    shared = parallel.tensor > 1 or parallel.zero > 0
    if optimizer.kind == "soap" or (optimizer.needs_whole_matrices and shared):
        raise InputError(
            f"optimizer.kind {optimizer.kind} needs whole matrices: choose "
            + ("muon with " if optimizer.kind == "soap" else "")
            + "parallel.zero 0 and parallel.tensor 1, or optimizer.kind adamw"
        )
    if optimizer.guard.spam == "stable" or (optimizer.guard.adagc and parallel.pipeline > 1):
        raise InputError(
            "optimizer.guard.spam stable and, over pipeline stages, guard.adagc need a tensor's past in one process: choose "
            "guard.spam spam, or leave out parallel.*"
        )


# What a resumed run may change: how long, how often it is looked at and saved, what is done about spikes, and how many processes it
# has.
MAY_CHANGE = frozenset(
    {"steps", "stop_when_lost", "monitor", "checkpoint", "responder", "preset", "parallel", "heldout"}
)

_converter = make_converter(forbid_extra_keys=True)
_converter.register_structure_hook(Path, lambda value, _: Path(value))


def from_json(text: str, *, source: Path) -> TrainConfig:
    """Read a ``config.json``. Raises InputError naming ``source`` and the field that does not fit."""
    try:
        return _converter.structure(json.loads(text), TrainConfig)
    except json.JSONDecodeError as error:
        raise InputError(f"{source} is not JSON ({error}): the run folder is damaged") from None
    except cattrs.BaseValidationError as error:
        reasons = "; ".join(cattrs.transform_error(error))
        raise InputError(f"{source} does not fit this version: {reasons}") from None


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Fields in which two configurations (as nested dictionaries) differ, as ``field: old -> new``."""
    found: list[str] = []
    for name in dict.fromkeys([*old, *new]):
        a, b = old.get(name), new.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found.append(f"{prefix}{name}: {a} -> {b}")
    return found
