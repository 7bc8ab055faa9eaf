"""One layout of a model over GPUs, and how its layers divide into pipeline stages.

GPU = (stage, replica, tensor rank), tensor rank fastest: a tensor group stays inside a node where it can, a replica's stages are
furthest apart. GLM-130B has 70 layers because its two embedding ends each count as one: (70 + 2) / 8 = 9 a stage.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A topology with the choices that go with it.

    Attributes:
        tensor, pipeline, data: t, p, d.
        micro: rows of a micro-batch on one replica.
        recompute: the backward pass computes layers' activations again.
        zero: ZeRO stage: 1 shards the optimizer over replicas, 2 gradients too, 3 weights too.
        chunks: v, pieces of a stage's layers that Megatron-LM's interleaved schedule runs in turn; it also sends activations
            between stages in t parts, one by each tensor rank. 1: one forward, one backward, as DeepSpeed's pipeline and ours.
    """

    tensor: int
    pipeline: int
    data: int
    micro: int = 1
    recompute: bool = True
    zero: int = 1
    chunks: int = 1

    @property
    def gpus(self) -> int:
        return self.tensor * self.pipeline * self.data

    def micro_batches(self, rows: int) -> int:
        """m: micro-batches a replica sees in an update of ``rows``."""
        return rows // (self.data * self.micro)


def stage_layers(layers: int, stages: int) -> list[int]:
    """Layers of each pipeline stage.

    Equal where the stages divide the layers. Else both ends count as a layer, and the remainder goes to the stages in the middle,
    which carry no end.
    """
    if layers % stages == 0:
        return [layers // stages] * stages
    each, over = divmod(layers + 2, stages)
    counts = [each] * stages
    counts[0] -= 1
    counts[-1] -= 1
    first = (stages - over) // 2
    for stage in range(first, first + over):
        counts[stage] += 1
    return counts


def bubble(stages: int, micro_batches: int, chunks: int = 1) -> float:
    """Share of time in which a stage waits for the pipeline to fill and drain: (p - 1) / (m + p - 1).

    With v chunks a stage waits for a chunk: (p - 1) / (v m + p - 1) (Narayanan et al., 2104.04473, section 2.2).

    Source: GPipe (1811.06965, section 2.3); one-forward-one-backward (PipeDream-Flush, 2006.09503) has the same bubble and holds
    fewer activations. GLM-130B: p = 8, m = 176: 3.8 %.
    """
    return (stages - 1) / (chunks * micro_batches + stages - 1)
