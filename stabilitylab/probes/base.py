"""What a probe is: it listens to one kind of number while armed, and hands over a step's readings when asked.

The life of a probe under the monitor:

    attach(context)                      once: find the sites in the model
    for each step:
        arm(measured)                    before the forward pass: whether this step is measured
        ... hooks write to the buffer ...
        gradients(...)                   once: gradients are reduced and unscaled, not yet clipped
        read() -> readings               after the optimizer's step and the buffer's transfer
    detach()                             every handle is removed

Nothing a probe does may change what the model computes: no random numbers, no in-place change, no other
kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stabilitylab.statistics.buffer import Buffer
from stabilitylab.telemetry import Key


@dataclass(frozen=True)
class Readings:
    """One probe's numbers of one step. ``keys`` is the same object as long as the set of metrics is
    unchanged."""

    keys: tuple[Key, ...]
    values: NDArray[np.float64]


NOTHING = Readings((), np.empty(0))


@dataclass(frozen=True, kw_only=True)
class Context:
    """What the monitor lends to its probes.

    Args:
        model: the module watched, unwrapped.
        parameters: the trainable tensors by name: whose ``.grad`` is read and which the optimizer updates.
        optimizer: may be None.
        buffer: where numbers go during a step.
        patterns: globs; a site is watched if one of them matches its module path.
    """

    model: nn.Module
    parameters: Mapping[str, Tensor]
    optimizer: torch.optim.Optimizer | None
    buffer: Buffer
    patterns: Sequence[str] = field(default=("*",))

    def wanted(self, path: str) -> bool:
        """Whether the user asked for this module or parameter path."""
        return any(fnmatchcase(path, pattern) for pattern in self.patterns)


class Probe(Protocol):
    """See the module's docstring for the order of calls."""

    name: str

    def attach(self, context: Context) -> None:
        """Find the sites. Called once, before any other method."""

    def arm(self, measured: bool) -> None:
        """Say whether the step that begins is measured."""

    def gradients(
        self, gradients: Mapping[str, Tensor], norms: Mapping[str, Tensor | float], scale: float
    ) -> None:
        """Take the gradients by parameter name, each ``scale`` times the true one; called on measured steps.

        ``norms`` are true L2 norms of parameters whose gradients themselves are gone.
        """

    def read(self) -> Readings:
        """The step's numbers, from the buffer's host side. Called after a measured step."""

    def detach(self) -> None:
        """Remove every handle."""
