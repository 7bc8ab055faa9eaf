"""What a probe is: it listens to one kind of number while armed, and hands over a step's readings when asked.

The life of a probe under the monitor:

    attach(context)                      once: find the sites in the model
    for each step:
        arm(measured)                    before the forward pass: whether this step is measured
        ... hooks write to the buffer ...
        gradients(...)                   once: gradients are reduced and unscaled, not yet clipped
        finish = collect()               after the optimizer's step: what was seen, still on the device
        finish(host) -> readings         later, when the buffer's numbers are on the host, in another thread
    detach()                             every handle is removed

Nothing a probe does may change what the model computes: no random numbers, no in-place change, no other
kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stabilitylab.statistics.buffer import Buffer
from stabilitylab.statistics.transfer import Host, Slots
from stabilitylab.telemetry import Key


@dataclass(frozen=True)
class Readings:
    """One probe's numbers of one step. ``keys`` is the same object as long as the set of metrics is
    unchanged."""

    keys: tuple[Key, ...]
    values: NDArray[np.float64]
    # What deserves an event of its own: kind and data.
    events: tuple[tuple[str, Mapping[str, Any]], ...] = ()


# Turns a step's numbers on the host into readings. Runs in the delivery thread: it must not touch the probe's
# state.
Finish = Callable[[Host], Readings]


def number(value: float | Slots, host: Host) -> float:
    """A number that is known, or that came with the buffer."""
    return value if isinstance(value, float) else float(host[value][0])


class KeyTable:
    """Remembers the keys of the last set of sites, so that equal sets give the same tuple."""

    def __init__(self, family: str, statistics: Sequence[str]) -> None:
        self._family, self._statistics = family, tuple(statistics)
        self._sites: tuple[str, ...] | None = None
        self._keys: tuple[Key, ...] = ()

    def keys(self, sites: tuple[str, ...]) -> tuple[Key, ...]:
        """Site by site, the statistics in order."""
        if sites != self._sites:
            self._keys = tuple(Key(self._family, site, s) for site in sites for s in self._statistics)
            self._sites = sites
        return self._keys


@dataclass(kw_only=True)
class Context:
    """What the monitor lends to its probes.

    Args:
        model: the module watched, unwrapped.
        parameters: the trainable tensors by name: whose ``.grad`` is read and which the optimizer updates.
        optimizer: may be None.
        buffer: where numbers go during a step.
        patterns: globs; a site is watched if one of them matches its module path.
        loss_scale: the factor on the loss in the step that ends, as a number or where the buffer has it.
        failed: told of a probe, by name, whose hook raised.
        compiled: the model runs under ``torch.compile``: hooks are traced once and must stay.
    """

    model: nn.Module
    parameters: Mapping[str, Tensor]
    optimizer: torch.optim.Optimizer | None
    buffer: Buffer
    patterns: Sequence[str] = field(default=("*",))
    loss_scale: float | Slots = 1.0
    failed: Callable[[str, Exception], None] | None = None
    compiled: bool = False

    def guarded(self, probe: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        """The hook, with the training protected from its failure: that is reported instead of raised."""

        def protected(*args: Any, **kwargs: Any) -> Any:
            try:
                return hook(*args, **kwargs)
            except Exception as error:
                if self.failed is None:
                    raise
                self.failed(probe, error)

        return protected

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
        self, gradients: Mapping[str, Tensor], norms: Mapping[str, Tensor | float], scale: float | Slots
    ) -> None:
        """Take the gradients by parameter name, each ``scale`` times the true one; called on measured steps.

        ``norms`` are true L2 norms of parameters whose gradients themselves are gone.
        """

    def collect(self) -> Finish | None:
        """What turns the step's numbers, once on the host, into readings; None if nothing was seen."""

    def detach(self) -> None:
        """Remove every handle."""
