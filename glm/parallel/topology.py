"""How ranks are laid out, which ranks communicate, and whether a model can be cut so.

rank = (stage d + replica) t + tensor rank,   world = t p d

Tensor ranks are neighbours, so that their group stays inside a node; a replica's stages are furthest apart. DeepSpeed's
PipeModelDataParallelTopology (axes pipe, data, model) and Megatron-LM have this order.

``checked`` refuses what cannot work before any process talks to another: it is a pure function of the configuration and the world
size, so every rank comes to the same verdict alone, and none waits for another.
"""

from __future__ import annotations

from dataclasses import dataclass

from glm.distributed.config import ParallelConfig
from glm.errors import InputError
from glm.model.config import ModelConfig
from glm.planning.layout import stage_layers


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Sizes of the three axes: t, p, d."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.tensor * self.pipeline * self.data

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(stage, replica, tensor rank) of a rank."""
        rest, tensor = divmod(rank, self.tensor)
        stage, replica = divmod(rest, self.data)
        return stage, replica, tensor

    def rank(self, stage: int, replica: int, tensor: int) -> int:
        """The rank at these coordinates."""
        return (stage * self.data + replica) * self.tensor + tensor

    def tensor_groups(self) -> list[list[int]]:
        """Ranks that hold parts of the same layers, for the same rows."""
        return [
            [self.rank(stage, replica, i) for i in range(self.tensor)]
            for stage in range(self.pipeline)
            for replica in range(self.data)
        ]


def _check_levers(parallel: ParallelConfig, model: ModelConfig) -> None:
    """Raises InputError for levers that several processes cannot run."""
    attention, tensor = model.attention, parallel.tensor
    if model.feed_forward.experts.count and (tensor > 1 or parallel.pipeline > 1 or parallel.zero > 1):
        raise InputError(
            "model.feed_forward.experts are whole in every process: choose parallel.data alone with parallel.zero 0 or 1"
        )
    alone = {"model.spectral": model.spectral}
    if attention.qk_clip and (tensor > 1 or parallel.pipeline > 1 or parallel.zero):
        raise InputError(
            "model.attention.qk_clip scales whole matrices that every process has: choose parallel.zero 0 and parallel.data alone"
        )
    uncut = {
        "model.attention.key_heads": model.key_heads != model.heads,
        f"qk_norm or v_norm with norm_kind {model.norm_kind}": model.norm_kind != "layer"
        and (attention.qk_norm or attention.v_norm),
    }
    for lever, is_on in alone.items():
        if is_on:
            raise InputError(f"{lever} works in one process: leave it out, or leave out parallel.*")
    for lever, is_on in uncut.items():
        if is_on and tensor > 1:
            raise InputError(
                f"{lever} is not cut over tensor ranks: choose parallel.tensor 1 (and parallel.data)"
            )


def checked(config: ParallelConfig, model: ModelConfig) -> Topology:
    """The topology of a configuration. Raises InputError naming what it does not divide."""
    t, p = config.tensor, config.pipeline
    if model.vocabulary is None:
        raise InputError("model.vocabulary is not set: it must be known before the model is cut")
    for name, size in (
        ("model.heads", model.heads),
        ("model.feed_forward.inner", model.feed_forward.width(model.hidden)),
        ("model.vocabulary", model.vocabulary),
    ):
        if size % t:
            more = f"; {-(-size // t) * t} would do" if name != "model.heads" else ""
            raise InputError(f"parallel.tensor {t} does not divide {name} {size}: change one of them{more}")
    _check_levers(config, model)
    if p > model.layers or min(stage_layers(model.layers, p)) < 1:
        raise InputError(
            f"parallel.pipeline {p} leaves a stage without a layer: model.layers is {model.layers}; use fewer stages"
        )
    return Topology(tensor=t, pipeline=p, data=config.data)
