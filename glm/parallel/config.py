"""How a run is spread over processes. One process is the local engine's."""

from __future__ import annotations

from dataclasses import dataclass

from glm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sizes of the axes; their product is the number of processes.

    Attributes:
        tensor: ranks over which each layer is cut.
        pipeline: stages.
        data: replicas, each with rows of its own; masters and moments are spread over them (ZeRO-1).
        timeout: seconds after which a rank that does not answer is given up.
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    timeout: float = 600.0

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "data"):
            if getattr(self, name) < 1:
                raise InputError(f"parallel.{name} must be at least 1, got {getattr(self, name)}")
        if not self.timeout > 0:
            raise InputError(f"parallel.timeout is a time in seconds above 0, got {self.timeout}")

    @property
    def ranks(self) -> int:
        """Number of processes."""
        return self.tensor * self.pipeline * self.data
