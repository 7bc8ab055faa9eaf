"""The engine that spans processes: tensor, pipeline and data parallelism behind the loop's interface.

An update has the local engine's (``glm.train.engine``) four parts:

    forward_backward   DeepSpeed's PipelineEngine runs one-forward-one-backward over this replica's micro-batches, and
                       multiplies each loss by scale / targets of the whole batch, so gradients need only be summed
    gradients          summed over replicas and reduced to this rank's shares (``glm.parallel.optimizer``); in ZeRO's stages 2 and 3
                       while backward goes (``glm.parallel.zero``)
    update             clip by the norm over all ranks, AdamW on the shares, weights gathered again
    save, load_newest  whole tensors, written by all ranks (``glm.parallel.checkpoint``)

The engine cuts DeepSpeed's schedule off after the last backward pass and replaces its reduction and its optimizer step, since the
monitor reads gradients between the two. DeepSpeed's copy of the model stays in the policy's precision, so its own fp16 wrapper,
which refuses CPUs without half-precision units, never comes in.

A rank builds its replica's rows only (``own_rows``); of the others' it learns only how many targets all have. Replicas get
micro-batches as evenly as possible.

Limits: ZeRO-2 and 3 are for one pipeline stage. So that ranks begin alike, each draws its whole part of the model once before ZeRO
spreads it.
"""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from glm.distributed.process_group import LaunchedProcesses
from glm.errors import InputError
from glm.model.dropout import row_keys
from glm.model.experts import expert_loads, share_loads
from glm.model.weight_followers import follow_all
from glm.parallel import checkpoint as sharded
from glm.parallel.groups import Groups
from glm.parallel.optimizer import ShardedAdamW
from glm.parallel.partition import shares
from glm.parallel.sharded_init import build, shapes_of
from glm.parallel.topology import checked
from glm.precision import LossScaler, PrecisionPolicy
from glm.train.async_checkpoint import CheckpointWriter
from glm.train.checkpoint import Checkpoint
from glm.train.config import TrainConfig
from glm.train.emulation import Emulation
from glm.train.engine import Updates, Whole, check_targets, count_targets, rate_factors_of
from glm.train.qk_clip import clip_queries_and_keys
from glm.train.update_rules import state_names

try:
    import deepspeed
except ImportError:
    raise InputError(
        "training over several processes needs DeepSpeed: pip install 'stabilitylab[distributed]'"
    ) from None
from deepspeed.runtime.pipe.schedule import (
    BackwardPass,
    OptimizerStep,
    ReduceGrads,
    ReduceTiedGrads,
    TrainSchedule,
)
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

from glm.parallel.stages import MicroBatch, Stages
from glm.parallel.zero import Spreading

# Modules whose output, or with ":input" whose input, is one tensor rank's part.
TENSOR_SHARDED = (
    "layers.*.attention",
    "layers.*.attention.scores",
    "layers.*.attention.query_norm",
    "layers.*.attention.key_norm",
    "layers.*.attention.query_key_value",
    "layers.*.attention.output:input",
    "layers.*.feed_forward.up",
    "layers.*.feed_forward.down:input",
)


class Rows(Protocol):
    """A batch as this engine reads it (``glm.data.batch.Batch``)."""

    @property
    def tokens_BT(self) -> Tensor:  # noqa: N802
        """[B, T]."""

    @property
    def targets_BT(self) -> Tensor:  # noqa: N802
        """[B, T]."""

    @property
    def segments_BT(self) -> Tensor:  # noqa: N802
        """[B, T]."""

    @property
    def context_BT(self) -> Tensor:  # noqa: N802
        """[B, T]."""

    @property
    def positions(self) -> Tensor:
        """[B, T] or [B, T, 2]."""


def _largest(scores: Tensor) -> Tensor:
    """The largest of all processes, element by element."""
    dist.all_reduce(scores, dist.ReduceOp.MAX)
    return scores


def _summed(counts: Tensor) -> Tensor:
    """The sum over all processes, element by element."""
    dist.all_reduce(counts)
    return counts


def _even_part(rows: int, replicas: int) -> int:
    """The most rows of a micro-batch that divide an update's and leave every replica one, where there are as many."""
    return max(size for size in range(1, max(1, rows // replicas) + 1) if rows % size == 0)


def _join_deepspeed() -> None:
    """Let DeepSpeed use the existing groups, without its many messages and without compiling an operator."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed compiles its all-reduce in shared memory on first use, under a lock that a killed process leaves behind for good.
    # Only that all-reduce asks for this table, which DeepSpeed 0.19 fills on first use by calling a compiler, a tenth of a second
    # in each process.
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    with redirect_stdout(io.StringIO()):
        deepspeed.init_distributed(dist.get_backend(), verbose=False)


class _Schedule(TrainSchedule):  # type: ignore[misc]
    """One-forward-one-backward, without the steps after it."""

    def steps(self) -> Iterator[list[Any]]:
        for commands in super().steps():
            yield [c for c in commands if not isinstance(c, (OptimizerStep, ReduceGrads, ReduceTiedGrads))]


class ParallelEngine(Updates):
    """A model over the processes of the default group.

    Args:
        config: the run's configuration, its vocabulary filled in.
        device: where this rank computes.

    Raises:
        InputError: the topology does not fit the model.
    """

    def __init__(self, config: TrainConfig, device: torch.device | str = "cpu") -> None:
        self.topology = checked(config.parallel, config.model)
        self.device = torch.device(device)
        self.processes = LaunchedProcesses(self.device)
        self.rank = dist.get_rank()
        self.seed = config.seed
        self.micro_rows = config.batch.micro_rows or _even_part(config.batch.rows, self.topology.data)
        self.stage, self.replica, self.tensor_rank = self.topology.coordinates(self.rank)
        self.policy = PrecisionPolicy(precision=config.precision)
        self.scaler = LossScaler(config.loss_scale) if self.policy.scales_loss else None
        groups = Groups(self.topology, self.rank, timedelta(seconds=config.parallel.timeout))

        self.zero = config.parallel.zero
        self._rules = config.optimizer
        self.shares = shares(shapes_of(config.model), config.model, self.topology, zero=self.zero)
        self.model = build(
            config.model,
            stage=self.stage,
            stages=self.topology.pipeline,
            tensor=groups.tensor,
            seed=config.seed,
        ).to(self.device)
        self.optimizer = ShardedAdamW(
            self.model,
            config.optimizer,
            self.policy,
            shares=self.shares,
            rank=self.rank,
            groups=groups.holders(self.shares.values()),
            zero=self.zero,
            peak=config.schedule.peak,
            factors=rate_factors_of(self.model),
        )
        if config.model.attention.qk_clip:
            threshold = config.model.attention.qk_clip
            self.optimizer.after_update = lambda: clip_queries_and_keys(
                self.model, self.optimizer.masters(), threshold, across=_largest
            )
        self._emulation = Emulation(self.model, config.emulate, config.seed) if config.emulate.is_on else None
        axes = PipeModelDataParallelTopology(
            num_pp=self.topology.pipeline, num_mp=self.topology.tensor, num_dp=self.topology.data
        )
        _join_deepspeed()
        with redirect_stdout(io.StringIO()):
            self._stages = Stages(self.model, config.model, axes, tensor=groups.tensor)
        # DeepSpeed needs these values; they decide nothing here, since it neither steps nor scales.
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "steps_per_print": 2**31,
            "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
        }
        self._pipeline, *_ = deepspeed.initialize(
            model=self._stages, optimizer=self.optimizer, config=settings
        )
        instructions = type(self._pipeline)._INSTRUCTION_MAP
        self._pipeline._INSTRUCTION_MAP = {**instructions, BackwardPass: self._backward}
        self._spreading = Spreading(self.optimizer, config.model) if self.zero >= 2 else None
        if self._spreading is not None:
            self._stages.feed.around = self._spreading.around

    @property
    def sharded(self) -> tuple[str, ...]:
        if self.topology.tensor == 1:
            return ()
        # ZeRO scatters every parameter, cut or not.
        parts = [name for name, share in self.shares.items() if share.cut is not None and share.copied]
        return (*TENSOR_SHARDED, *parts)

    @property
    def scattered(self) -> tuple[str, ...]:
        return ("*",) if self.zero else ()

    @property
    def shard(self) -> int:
        return self.tensor_rank

    def repeats(self, parameter: str) -> bool:
        # ZeRO's later stages accumulate the shares, each on one rank.
        return self.zero < 2 and self.tensor_rank > 0 and self.shares[parameter].alike > 1

    def own_rows(self, rows: int) -> range:
        count, d = math.ceil(rows / self.micro_rows), self.topology.data
        begin, end = (
            self.micro_rows * (count * replica // d) for replica in (self.replica, self.replica + 1)
        )
        return range(min(begin, rows), min(end, rows))

    def whole(self, batch: Rows, rows: int) -> Whole:
        counts = self.stage == 0 and self.tensor_rank == 0
        targets = torch.tensor([count_targets(batch) if counts else 0], device=self.device)
        dist.all_reduce(targets)
        return Whole(rows, int(targets))

    def forward_backward(self, batch: Rows, step: int, whole: Whole | None = None) -> float:
        own = self.own_rows(whole.rows if whole is not None else batch.tokens_BT.shape[0])
        tensors = [batch.tokens_BT, batch.targets_BT, batch.positions, batch.segments_BT, batch.context_BT]
        if whole is None:
            whole = Whole(batch.tokens_BT.shape[0], count_targets(batch))
            tensors = [tensor[own.start : own.stop] for tensor in tensors]
        check_targets(whole.targets, step)
        tensors = [tensor.to(self.device) for tensor in tensors]
        keys_B = row_keys(self.seed, step, own)
        micro_batches: list[MicroBatch] = [
            tuple(tensor[i : i + self.micro_rows] for tensor in (*tensors, keys_B))
            for i in range(0, len(own), self.micro_rows)
        ]
        feed = self._stages.feed
        if (emulation := self._emulation) is not None:
            # A replica's micro-batches are those of one process, so their stochastic rounding draws the same numbers.
            feed.begun = lambda number: emulation.begin(step, own.start + number * self.micro_rows)
        feed.begin(micro_batches, scale=self.loss_scale / whole.targets)
        if micro_batches:
            pipeline = self._pipeline
            pipeline.set_dataiterator(iter([(one[0], one[1]) for one in micro_batches]))
            pipeline.module.train()
            pipeline.total_loss, pipeline.total_additional_losses, pipeline._compute_loss = None, None, True
            pipeline._exec_schedule(
                _Schedule(
                    micro_batches=len(micro_batches), stages=self.topology.pipeline, stage_id=self.stage
                )
            )
        if self._spreading is not None:
            most = math.ceil(math.ceil(whole.rows / self.micro_rows) / self.topology.data)
            for _ in range(most - len(micro_batches)):
                self._spreading.idle()
        sums = torch.zeros(
            2, dtype=torch.float64, device=self.device
        )  # of the targets' losses, of their z-losses
        if feed.losses and self.tensor_rank == 0:
            sums += torch.stack(feed.losses).double().sum(0)
        dist.all_reduce(sums)
        self.optimizer.loss, of_z = (sums / whole.targets).tolist()
        if self.model.config.feed_forward.experts.count:
            self.auxiliary = {"auxiliary_loss": of_z}
        elif self.model.config.z_loss:
            self.auxiliary = {"z_loss": of_z}
        return self.optimizer.loss

    def update(self, learning_rate: float, *, clip: float) -> bool:
        if not self.model.config.feed_forward.experts.count:
            return super().update(learning_rate, clip=clip)
        share_loads(self.model, _summed)
        loads = expert_loads(self.model)
        applied = super().update(learning_rate, clip=clip)
        follow_all(self.model, applied=applied)
        self.optimizer.guards.told |= loads
        return applied

    def _backward(self, pipeline: Any, buffer_id: int) -> None:
        pipeline._exec_backward_pass(buffer_id)
        self.optimizer.accumulate()

    def set_embedding_gradient_shrink(self, alpha: float) -> None:
        if hasattr(self.model, "embedding"):
            self.model.embedding.gradient_shrink = alpha

    # ---------------------------------------------------------------------------------------------------- state

    def tensors(self) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """This rank's shares, and the tensors that are alike on every rank."""
        return {**self.optimizer.masters(), **dict(self.model.named_buffers())}, self.optimizer.moments()

    def load_tensors(self, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        """Take back shares of this rank."""
        self.optimizer.load(masters=model, moments=optimizer)
        for name, buffer in self.model.named_buffers():
            buffer.copy_(model[name])

    def begin_save(self, folder: Path, checkpoint: Checkpoint, *, background: bool) -> CheckpointWriter:
        return sharded.begin_save(folder, checkpoint, self.shares, self.processes, background=background)

    def load_newest(self, folder: Path) -> tuple[Checkpoint, list[str]]:
        dimensions = {name: len(share.shape) for name, share in self.shares.items()}
        names = {name: state_names(self._rules, name, count) for name, count in dimensions.items()}
        copies = {name: buffer.shape for name, buffer in self.model.named_buffers()}
        return sharded.load_newest(folder, self.shares, self.processes, names, copies)
