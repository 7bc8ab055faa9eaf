"""What the optimizer does with the gradients: how far each parameter moves, and whether Adam's second moment keeps up with them.

The probe samples the weights in the optimizer's step pre-hook and compares them in its post-hook (``statistics.updates``). It reads
Adam's moments from the optimizer's state where that holds some (``second_moments.py``); other optimizers have the first three
statistics only. Where v is no mean of g^2 it leaves out those that compare v with g^2 or epsilon.

Family ``update``, site = parameter path:

| statistic | meaning | unit | source |
| --- | --- | --- | --- |
| rms | RMS of the change of the weights, over a sample of at least 256 (all, if fewer) | weight | updates.py |
| weight_rms | RMS of the weights before the step, over the same sample | weight | updates.py |
| ratio | rms / weight_rms | 1 | updates.py |
| rms_t | sqrt(mean(g^2 / max(v, eps^2))): well above 1 when v lags behind g^2 | 1 | StableAdamW, arXiv:2304.13013 |
| first_moment_l2 | Euclidean norm of exp_avg | gradient | Adam, arXiv:1412.6980 |
| second_moment_l2 | Euclidean norm of exp_avg_sq | gradient^2 | Adam, arXiv:1412.6980 |
| below_epsilon_fraction | share of elements with v < eps^2: eps, not v, sets their step | 1 | arXiv:2304.13013 |

Changes that no update made (``outside_changes.py``) are events ``parameter-changed``, ``moments-changed`` and
``optimizer-changed``.

In ``rms_t`` and ``below_epsilon_fraction`` v is free of its initial bias: v / (1 - beta2^t) where the optimizer keeps the bias. g
is the gradient that the optimizer saw (clipped); where it clips inside its step without changing ``.grad``, the unclipped one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stabilitylab.probes.base import Found, KeyTable, Readings
from stabilitylab.probes.gradients import local_part
from stabilitylab.probes.hooking import HookingProbe
from stabilitylab.probes.outside_changes import FIELDS as OUTSIDE
from stabilitylab.probes.outside_changes import (
    BetweenSteps,
    OutsideChanges,
    jumps,
    least_beta2,
    numeric_settings,
)
from stabilitylab.probes.second_moments import SecondMoments
from stabilitylab.statistics import native
from stabilitylab.statistics.buffer import Slots
from stabilitylab.statistics.gathering import Gathered
from stabilitylab.statistics.summary import measurable
from stabilitylab.statistics.updates import COLUMN, FIELDS, Stepped, Update, after_all, take_before
from stabilitylab.telemetry import Key

WITHOUT_MOMENTS = ("rms", "weight_rms", "ratio")
WITH_ANOTHER_V = (*WITHOUT_MOMENTS, "first_moment_l2", "second_moment_l2")
STATISTICS = (*WITH_ANOTHER_V, "rms_t", "below_epsilon_fraction")
_COUNTS = (len(STATISTICS), len(WITH_ANOTHER_V), len(WITHOUT_MOMENTS))


@dataclass(slots=True)
class _Entry:
    """A parameter, this rank's part of it, and the slots for its numbers."""

    name: str
    parameter: Tensor
    update: Update
    slots: Slots


class UpdateProbe(HookingProbe):
    """Statistics of every parameter's update; see the module's docstring."""

    name = "updates"
    stays_in_graphs = False

    def __init__(self) -> None:
        super().__init__()
        self._updates: dict[int, _Entry] = {}
        self._held: dict[int, Tensor] = {}  # gradients, during a step
        # The keys of parameters with moments, with another v, without moments, and of all together.
        self._joined: tuple[list[tuple[Key, ...]], tuple[Key, ...]] | None = None
        self._tables = [KeyTable("update", some) for some in (STATISTICS, WITH_ANOTHER_V, WITHOUT_MOMENTS)]
        self._ready = False
        self._between, self._changes = BetweenSteps(), OutsideChanges()
        self._moments = SecondMoments()
        self._settings: dict[str, float] = {}
        self._jumps: tuple[tuple[str, float, float], ...] = ()
        self._compared = False

    def _find(self) -> None:
        self.name_parameters()

    def name_parameters(self) -> None:
        """Take the context's parameters, some of which may be new."""
        self._names = {id(p): name for name, p in self._context.parameters.items()}

    def _begin(self, measured: bool) -> None:
        self._release()
        self._between.arm(measured)
        self._compared, self._jumps = False, ()

    def _hook(self) -> None:
        self._around_step(self._before, self._after)

    def _listed(self, optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, Mapping[str, Any]]]:
        """The optimizer's tensors that the user asked for, with their groups."""
        return [(p, group) for group in optimizer.param_groups for p in group["params"] if self._wanted(p)]

    def _wanted(self, p: Tensor) -> bool:
        name = self._names.get(id(p))
        return (
            name is not None
            and p.layout is torch.strided
            and p.is_floating_point()
            and measurable(p)
            and p.requires_grad
            and self._context.wanted(name)
        )

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._ready:
            return
        chosen: list[_Entry] = []
        states = optimizer.state if any(map(self._moments.is_learning, optimizer.param_groups)) else None
        for p, group in self._listed(optimizer):
            entry, here = self._updates.get(id(p)), local_part(p.detach())[0]
            if entry is None or entry.parameter is not p or entry.slots.device != here.device:
                entry = self._updates[id(p)] = self._entry(p)
            elif not entry.update.is_of(here):
                # The parameter got other memory (p.data = ...), or another format.
                entry.update = Update(here)
            if entry.update.sampled:
                chosen.append(entry)
            # Some optimizers (heavyball's) drop each gradient once they have used it.
            if p.grad is not None:
                self._held[id(p)] = p.grad
                if states is not None:
                    self._moments.before(p, states.get(p, {}), group)
        with torch.no_grad():
            take_before([entry.update for entry in chosen])
        self._look_between(chosen, numeric_settings(optimizer))
        self._ready = True

    def _look_between(self, chosen: Sequence[_Entry], settings: dict[str, float]) -> None:
        """Compare weights and settings with what the last step left."""
        self._jumps, self._settings = jumps(self._settings, settings), settings
        compared = self._between.compare([entry.update for entry in chosen])
        self._compared = compared is not None
        if compared is None:
            return
        places, rows = compared
        own = [self._context.buffer.view(entry.slots)[len(FIELDS) :] for entry in chosen]
        with torch.no_grad():
            torch._foreach_copy_([own[place] for place in places], list(rows.unbind()))
            known = set(places)
            if others := [one for i, one in enumerate(own) if i not in known]:
                torch._foreach_zero_(others)

    def _entry(self, p: Tensor) -> _Entry:
        name, (here, is_shard) = self._names[id(p)], local_part(p.detach())
        is_shard = is_shard or self._context.is_scattered(name)
        # All fields are sums, and values equal on every rank count once.
        region = "sums" if is_shard else "shard_sums" if self._context.is_sharded(name) else "replicated"
        slots = self._context.buffer.reserve(region, len(FIELDS) + len(OUTSIDE), here.device)
        return _Entry(name, p, Update(here), slots)

    def _release(self) -> None:
        self._ready = False
        self._held.clear()
        for entry in self._updates.values():
            entry.update.lend(None)

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not self._ready:
            return
        buffer, jobs = self._context.buffer, []
        # Read once: several optimizers, or ZeRO, build the state at each access.
        states = optimizer.state
        seen: list[Update] = []
        # Numbers that the kernel does not compute, and their slots.
        others: list[Stepped] = []
        views: list[Tensor] = []
        for p, group in self._listed(optimizer):
            entry = self._updates.get(id(p))
            given = p.grad if p.grad is not None else self._held.get(id(p))
            if entry is None or given is None or not entry.update.sampled:
                continue
            update, slots = entry.update, entry.slots
            if not update.follow(local_part(p.detach())[0]):
                continue
            gradient: Tensor | None = local_part(given)[0]
            moments = self._moments.read(p, gradient, states.get(p, {}), group)
            if moments is not None and not moments.is_of_gradients:
                gradient = None
            if moments is not None and moments.is_decoded:
                # At once: decoded moments of a whole model would take the memory that their codes save.
                with torch.no_grad():
                    buffer.view(slots)[: len(FIELDS)].copy_(update.after(gradient, moments))
            elif slots.device.type == "cpu" and update.prepare(gradient, moments, buffer.address(slots)):
                jobs.append(update.address)
            else:
                others.append((update, gradient, moments))
                views.append(buffer.view(slots)[: len(FIELDS)])
            slots.stamp = buffer.stamp
            seen.append(update)
        with torch.no_grad():
            if others:
                torch._foreach_copy_(views, after_all(others))
        library = native.kernel()
        if jobs and library is not None:
            addresses = (ctypes.c_void_p * len(jobs))(*jobs)
            library.stabilitylab_after(ctypes.addressof(addresses), len(jobs), torch.get_num_threads())
        self._between.keep(seen)
        self._moments.done()
        self._release()

    def collect(self) -> Found | None:
        """Every parameter that was updated."""
        stamp = self._context.buffer.stamp
        seen = [e for e in self._updates.values() if e.slots.stamp == stamp]
        if not seen:
            return self._left_out()
        return Found(
            sites=tuple(e.name for e in seen),
            slots=[(e.slots,) for e in seen],
            extra=(self._compared, self._jumps, least_beta2(self._settings), True),
        )

    def _left_out(self) -> Found | None:
        """The updates of a step that the scaler left out, as for a non-finite gradient, perhaps from a non-finite weight."""
        entries = {id(entry.update): entry for entry in self._updates.values()}
        chosen = [entries[id(update)] for update in self._between.held() if id(update) in entries]
        if not chosen:
            return None
        updates = [entry.update for entry in chosen]
        with torch.no_grad():
            take_before(updates)
        self._look_between(chosen, self._settings)
        self._between.keep(updates)
        self._release()
        return Found(
            sites=tuple(entry.name for entry in chosen),
            slots=[(entry.slots,) for entry in chosen],
            extra=(self._compared, (), least_beta2(self._settings), False),
        )

    def finish(self, gathered: Gathered) -> Readings:
        """The table's statistics."""
        rows = gathered.rows()
        compared, settings, beta2, has_stepped = gathered.extra
        # A v in a rotating basis, say, may fall at will.
        is_another = np.isnan(rows[:, COLUMN["ratio2"]])
        second = np.where(is_another | (not has_stepped), -1.0, rows[:, COLUMN["second2"]])
        outside = rows[:, len(FIELDS) :] if compared else None
        events = tuple(self._changes.events(gathered.sites, outside, second, settings, beta2))
        if not has_stepped:
            return Readings((), np.empty(0), events)
        values = statistics(rows)
        has_moments = rows[:, COLUMN["first2"]] >= 0
        kinds = (has_moments & ~is_another, has_moments & is_another, ~has_moments)
        keys, parts = [], []
        for table, count, rows_of in zip(self._tables, _COUNTS, kinds, strict=True):
            if rows_of.any():
                names = tuple(name for name, has in zip(gathered.sites, rows_of, strict=True) if has)
                keys.append(table.keys(names))
                parts.append(values[rows_of, :count].ravel())
        if self._joined is None or [*map(id, keys)] != [*map(id, self._joined[0])]:
            self._joined = keys, keys[0] if len(keys) == 1 else tuple(key for some in keys for key in some)
        return Readings(self._joined[1], np.concatenate(parts), events)

    def companions(self, gathered: Gathered, numbers: Mapping[str, float]) -> dict[str, float]:
        """RMS of the change of all weights over the learning rate, each parameter's sample standing for all of it. It is for the
        detector, which must not take a rise of the rate for one of the gradient."""
        rate, rows = numbers.get("learning_rate", 0.0), gathered.rows()
        count, sampled, squares = (rows[:, COLUMN[name]] for name in ("count", "sampled", "update2"))
        if not rate > 0 or not len(rows) or not gathered.extra[-1]:
            return {}
        rms = np.sqrt(np.sum(squares * count / sampled) / count.sum())
        return {"update/-/rms_over_rate": float(rms / rate)}

    def detach(self) -> None:
        """Remove the optimizer's hooks."""
        super().detach()
        self._release()


def statistics(rows: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The table's statistics [parameters, STATISTICS] from the summed updates [parameters, FIELDS]."""
    column = {field: rows[:, i] for field, i in COLUMN.items()}
    with np.errstate(divide="ignore", invalid="ignore"):
        rms = np.sqrt(column["update2"] / column["sampled"])
        weight_rms = np.sqrt(column["weight2"] / column["sampled"])
        values = [
            rms,
            weight_rms,
            rms / weight_rms,
            np.sqrt(column["first2"]),
            np.sqrt(column["second2"]),
            np.sqrt(column["ratio2"] / column["count"]),
            column["below"] / column["count"],
        ]
    return np.stack(values, axis=1)
