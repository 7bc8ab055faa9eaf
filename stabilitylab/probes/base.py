"""The probe protocol: while armed, a probe records one kind of number, and returns a step's readings when asked.

The life of a probe under the monitor:

    attach(context)                      once: find the sites in the model
    for each step:
        arm(measured)                    before the forward pass: whether this step is measured
        ... hooks write to the buffer ...
        gradients(...)                   reduced and unscaled, not yet clipped: of all, or of each optimizer in turn
        collect() -> found               after the optimizer's step: the numbers, still on the device
        finish(gathered) -> readings     later, when the numbers are on the host, in another thread
    detach()                             removes every handle

A probe with an attribute ``is_costly`` keeps its cadence under a flight recorder, where all others measure every step.

Two methods are optional. The monitor calls ``name_parameters()`` when parameters have joined ``context.parameters``.
``companions(gathered, numbers)`` gives, for a measured step, numbers of the whole model by metric name (``attention/-/score_max``),
which the detector judges beside the step's own ``numbers``.

A probe must not change what the model computes: it draws no random numbers, changes nothing in place and selects no other kernel.
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
    """One probe's numbers of one step. ``keys`` stays the same object while the set of metrics is unchanged."""

    keys: tuple[Key, ...]
    values: NDArray[np.float64]
    # Findings that deserve an event: kind and data.
    events: tuple[tuple[str, Mapping[str, Any]], ...] = ()


@dataclass(kw_only=True)
class Found:
    """A probe's findings in a step, still on the device: for each site, the slots that hold its numbers.

    Args:
        sites: their names.
        slots: the same number of slots for each site; None for a number that it lacks.
        scale: a factor on the numbers, as a number or its slots in the buffer.
        extra: plain data that ``finish`` needs besides.
    """

    sites: tuple[str, ...]
    slots: list[tuple[Slots | None, ...]]
    scale: float | Slots = 1.0
    extra: Any = None


class Placing:
    """Turns ``Found`` into ``Seen``; remembers the last one, since most steps have the same.

    Args:
        split: says whether this rank has only some of a site's heads or channels.
        shard: which of them it has.
    """

    def __init__(self, split: Callable[[str], bool], shard: int) -> None:
        self._split, self._shard = split, shard
        self._last: tuple[Found, int, Seen] | None = None

    def seen(self, found: Found, buffer: Buffer) -> Seen:
        """The places of the numbers in the packet."""
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
    """Remembers the keys of the last set of sites, so that an equal set returns the same tuple."""

    def __init__(self, family: str, statistics: Sequence[str]) -> None:
        self._family, self._statistics = family, tuple(statistics)
        self._sites: tuple[str, ...] | None = None
        self._keys: tuple[Key, ...] = ()

    def keys(self, sites: tuple[str, ...]) -> tuple[Key, ...]:
        """The keys, site by site, the statistics in order."""
        if sites != self._sites:
            self._keys = tuple(Key(self._family, site, s) for site in sites for s in self._statistics)
            self._sites = sites
        return self._keys


@dataclass(kw_only=True)
class Context:
    """What the monitor shares with its probes.

    Args:
        model: the module watched, unwrapped.
        parameters: the trainable tensors by name: the monitor reads their ``.grad``, and the optimizer updates them.
        optimizer: may be None.
        buffer: holds the numbers during a step.
        patterns: globs; the probes watch a site if one matches its module path.
        sharded: globs of the parameters, modules and inputs (``path:input``) of which each rank holds a shard: some heads or some
            channels.
        scattered: globs of the parameters of which no two ranks hold the same elements.
        loss_scale: the factor on the loss in the step that ends, as a number or its slots in the buffer.
        failed: the context calls it with the name of a probe whose hook raised.
        compiled: whether the model runs under ``torch.compile``, which traces hooks once, so that they must stay.
        traced: whether the compiler traced a hook all the same.
        order: sites in the order of the first measured forward pass; attention's scores as ``attention/<path>``.
        is_ordering: whether ``passed`` still records the order.
        muted: whether a pass outside training runs, which hooks ignore.
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
        """Note that the forward pass has reached a site, as long as the context records the order of execution."""
        if self.is_ordering:
            self.order.setdefault(site)

    def follow_compiler(self) -> None:
        """Check, between steps, whether the model was compiled after the monitor was attached, or under another name."""
        if self.compiled:
            return
        before, self._frames = self._frames, frames()
        if self.traced or (self._frames != before and is_compiled(self.model)):
            self.compiled = True
            forget_graphs(self.model)

    def guarded(self, probe: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        """The hook, which reports a failure instead of raising it into training."""

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
        """Whether other ranks hold other parts of this parameter, or of this module's output or input."""
        return any(fnmatchcase(path, pattern) for pattern in self.sharded)

    def is_scattered(self, path: str) -> bool:
        """Whether each element of this parameter is on one rank only, as under ZeRO."""
        return any(fnmatchcase(path, pattern) for pattern in self.scattered)

    def wanted(self, path: str) -> bool:
        """Whether the user asked for this module or parameter path."""
        return any(fnmatchcase(path, pattern) for pattern in self.patterns)


class Probe(Protocol):
    """A probe; the module's docstring shows the order of calls."""

    name: str

    def attach(self, context: Context) -> None:
        """Find the sites. Called once, before any other method."""

    def arm(self, measured: bool) -> None:
        """Prepare for a step that begins, measured or not."""

    def gradients(
        self, gradients: Mapping[str, Tensor], norms: Mapping[str, Tensor | float], scale: float | Slots
    ) -> None:
        """Take the gradients by parameter name, each ``scale`` times the true one; called on measured steps, once for each
        optimizer.

        ``norms`` are true L2 norms for parameters whose gradients themselves are gone.
        """

    def collect(self) -> Found | None:
        """The numbers of the step that ends; None for none."""

    def finish(self, gathered: Gathered) -> Readings:
        """Make readings from the numbers. Runs in the sink thread: it must not touch what ``collect`` touches."""

    def detach(self) -> None:
        """Remove every handle."""
