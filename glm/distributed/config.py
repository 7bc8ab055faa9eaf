"""How a run is spread over processes. One process is the local engine's."""

from __future__ import annotations

from dataclasses import dataclass

from glm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sizes of the axes of parallelism; their product is the number of processes.

    Attributes:
        tensor: ranks that share each layer (tensor parallelism).
        pipeline: number of pipeline stages.
        data: replicas, each with rows of its own (data parallelism).
        zero: what the replicas share out instead of each holding it whole (ZeRO): 0 nothing, 1 masters and moments, 2 gradients
            too, 3 weights too. 2 and 3 are for one pipeline stage.
        timeout: seconds to wait for a rank that does not answer.
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    zero: int = 1
    timeout: float = 600.0

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "data"):
            if getattr(self, name) < 1:
                raise InputError(f"parallel.{name} must be at least 1, got {getattr(self, name)}")
        if self.zero not in range(4):
            raise InputError(f"parallel.zero must be 0, 1, 2 or 3, got {self.zero}")
        if self.zero >= 2 and self.pipeline > 1:
            raise InputError(
                f"parallel.zero {self.zero} does not go with parallel.pipeline {self.pipeline}, which adds up the gradients of "
                "micro-batches in flight: use parallel.zero 1, or parallel.pipeline 1"
            )
        if not self.timeout > 0:
            raise InputError(f"parallel.timeout is a time in seconds above 0, got {self.timeout}")

    @property
    def ranks(self) -> int:
        """Number of processes."""
        return self.tensor * self.pipeline * self.data
