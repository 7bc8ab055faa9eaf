"""What a probe is: it listens to one kind of number while armed, and hands over a step's readings when asked.

The life of a probe under the monitor:

    attach(context)                      once: find the sites in the model
    for each step:
        arm(measured)                    before the forward pass: whether this step is measured
        ... hooks write to the buffer ...
        gradients(...)                   reduced and unscaled, not yet clipped: of all, or of each optimizer in its turn
        collect() -> found               after the optimizer's step: what was found, still on the device
        finish(gathered) -> readings     later, when the numbers are on the host, in another thread
    detach()                             every handle is removed

A probe with an attribute ``is_costly`` keeps its cadence under a recorder, which has every step measured by the others.

Two methods are optional. ``name_parameters()``, of a probe that goes by parameters: called when some have joined
``context.parameters``. ``companions(gathered, numbers)``: of a measured step, numbers of the whole model that the detector judges
beside the step's own ``numbers``, by metric name (``attention/-/score_max``).

Nothing a probe does may change what the model computes: no random numbers, no in-place change, no other kernel.
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

from stabilitylab.probes.compiled import forget_graphs, frames, is_compiled
from stabilitylab.statistics.buffer import Buffer, Slots
from stabilitylab.statistics.gathering import Gathered
from stabilitylab.statistics.transfer import Seen
from stabilitylab.telemetry import Key


@dataclass(frozen=True)
class Readings:
    """One probe's numbers of one step. ``keys`` is the same object as long as the set of metrics is unchanged."""

    keys: tuple[Key, ...]
    values: NDArray[np.float64]
    # What deserves an event of its own: kind and data.
    events: tuple[tuple[str, Mapping[str, Any]], ...] = ()


@dataclass(kw_only=True)
class Found:
    """What a probe found in a step, still on the device: of each site, the slots that hold its numbers.

    Args:
        sites: names.
        slots: of each site the same number of slots; None for what it has not.
        scale: a factor on the numbers, as a number or where the buffer has it.
        extra: what else ``finish`` needs, plain data.
    """

    sites: tuple[str, ...]
    slots: list[tuple[Slots | None, ...]]
    scale: float | Slots = 1.0
    extra: Any = None


class Placing:
    """Turns ``Found`` into ``Seen``; remembers the last one, since most steps find the same.

    Args:
        split: whether this rank has some of a site's heads or channels only.
        shard: which of them.
    """

    def __init__(self, split: Callable[[str], bool], shard: int) -> None:
        self._split, self._shard = split, shard
        self._last: tuple[Found, int, Seen] | None = None

    def seen(self, found: Found, buffer: Buffer) -> Seen:
        """Where in the packet the numbers will lie."""
        if self._last is not None:
            last, generation, seen = self._last
            same = last is found or (
                last.slots == found.slots
                and (last.sites, last.scale, last.extra) == (found.sites, found.scale, found.extra)
            )
            if same and generation == buffer.generation:
                return seen
        seen = Seen(
            sites=found.sites,
            places=tuple(tuple(s if s is None else buffer.place(s) for s in slots) for slots in found.slots),
            split=tuple(self._split(site) for site in found.sites),
            shard=self._shard,
            scale=buffer.place(found.scale) if isinstance(found.scale, Slots) else found.scale,
            extra=found.extra,
        )
        self._last = found, buffer.generation, seen
        return seen


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
        sharded: globs; of parameters, modules and inputs (``path:input``) that one of them matches, each rank
            holds a shard, some of the heads, some of the channels.
        scattered: globs; of parameters that one of them matches, no two ranks hold the same elements.
        loss_scale: the factor on the loss in the step that ends, as a number or where the buffer has it.
        failed: told of a probe, by name, whose hook raised.
        compiled: the model runs under ``torch.compile``: hooks are traced once and must stay.
        traced: a hook was traced by the compiler all the same.
        order: sites in the order in which the first measured forward pass came to them; attention's scores as
            ``attention/<path>``.
        is_ordering: whether ``passed`` still takes them down.
        muted: a pass is made that is not the training's: hooks look away.
    """

    model: nn.Module
    parameters: Mapping[str, Tensor]
    optimizer: torch.optim.Optimizer | None
    buffer: Buffer
    patterns: Sequence[str] = ("*",)
    sharded: Sequence[str] = ()
    scattered: Sequence[str] = ()
    loss_scale: float | Slots = 1.0
    failed: Callable[[str, Exception], None] | None = None
    compiled: bool = False
    traced: bool = False
    order: dict[str, None] = field(default_factory=dict)
    is_ordering: bool = True
    muted: bool = False
    _frames: int = 0

    def passed(self, site: str) -> None:
        """The forward pass has come to a site: noted while the order of execution is being learned."""
        if self.is_ordering:
            self.order.setdefault(site)

    def follow_compiler(self) -> None:
        """Between steps: learn that the model has been compiled after the monitor was attached, or under another name."""
        if self.compiled:
            return
        before, self._frames = self._frames, frames()
        if self.traced or (self._frames != before and is_compiled(self.model)):
            self.compiled = True
            forget_graphs(self.model)

    def guarded(self, probe: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        """The hook, with the training protected from its failure: that is reported instead of raised."""

        def protected(*args: Any, **kwargs: Any) -> Any:
            if self.muted:
                return None
            try:
                return hook(*args, **kwargs)
            except Exception as error:
                if self.failed is None:
                    raise
                self.failed(probe, error)

        return protected

    def is_sharded(self, path: str) -> bool:
        """Whether other ranks hold other parts of this parameter, of this module's output or input."""
        return any(fnmatchcase(path, pattern) for pattern in self.sharded)

    def is_scattered(self, path: str) -> bool:
        """Whether every element of this parameter is on one rank only, as under ZeRO."""
        return any(fnmatchcase(path, pattern) for pattern in self.scattered)

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
        """Take the gradients by parameter name, each ``scale`` times the true one; called on measured steps, of several optimizers
        once each.

        ``norms`` are true L2 norms of parameters whose gradients themselves are gone.
        """

    def collect(self) -> Found | None:
        """What was found in the step that ends; None for nothing."""

    def finish(self, gathered: Gathered) -> Readings:
        """Readings from what was found. Runs in the delivery thread: it must not touch what ``collect`` does."""

    def detach(self) -> None:
        """Remove every handle."""
