"""What the optimizer does with the gradients: how far each parameter moves, and whether Adam's scale fits.

Weights are sampled in the optimizer's step pre-hook and compared in its post-hook (``statistics.updates``).
Adam's moments are read from the optimizer's state where it holds ``exp_avg`` and ``exp_avg_sq``; other
optimizers have the first three statistics only.

Family ``update``, site = parameter path:

| statistic | meaning | unit | source |
| --- | --- | --- | --- |
| rms | RMS of the change of the weights, of a sample of at least 256 (all, if fewer) | weight | updates.py |
| weight_rms | RMS of the weights before the step, of the same sample | weight | updates.py |
| ratio | rms / weight_rms | 1 | updates.py |
| rms_t | sqrt(mean(g^2 / max(v, eps^2))): well above 1 when v lags behind g^2 | 1 | StableAdamW, arXiv:2304.13013 |
| first_moment_l2 | Euclidean norm of exp_avg | gradient | Adam, arXiv:1412.6980 |
| second_moment_l2 | Euclidean norm of exp_avg_sq | gradient^2 | Adam, arXiv:1412.6980 |
| below_epsilon_fraction | share of elements with v < eps^2: eps, not v, sets their step | 1 | arXiv:2304.13013 |

Changes that no update made (``outside_changes.py``) are events ``parameter-changed``, ``moments-changed`` and
``optimizer-changed``.

v is free of its initial bias, v / (1 - beta2^t), and g the gradient that the optimizer saw (clipped).
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stabilitylab.probes.base import Context, Found, KeyTable, Readings
from stabilitylab.probes.gradients import local_part
from stabilitylab.probes.outside_changes import FIELDS as OUTSIDE
from stabilitylab.probes.outside_changes import BetweenSteps, OutsideChanges, jumps, least_beta2, settings_of
from stabilitylab.statistics import native
from stabilitylab.statistics.buffer import Slots
from stabilitylab.statistics.gathering import Gathered
from stabilitylab.statistics.summary import measurable
from stabilitylab.statistics.updates import COLUMN, FIELDS, Moments, Update, take_before

WITHOUT_MOMENTS = ("rms", "weight_rms", "ratio")
STATISTICS = (
    *WITHOUT_MOMENTS,
    "rms_t",
    "first_moment_l2",
    "second_moment_l2",
    "below_epsilon_fraction",
)


@dataclass(slots=True)
class _Entry:
    """A parameter, the part of it that is here, and where its numbers go."""

    name: str
    parameter: Tensor
    update: Update
    slots: Slots


class UpdateProbe:
    """Statistics of every parameter's update; see the module's docstring."""

    name = "updates"

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._updates: dict[int, _Entry] = {}
        self._held: dict[int, Tensor] = {}  # gradients, during a step
        self._full = KeyTable("update", STATISTICS)
        self._short = KeyTable("update", WITHOUT_MOMENTS)
        self._ready = False
        self._between, self._changes = BetweenSteps(), OutsideChanges()
        self._settings: dict[str, float] = {}
        self._jumps: tuple[tuple[str, float, float], ...] = ()
        self._compared = False

    def attach(self, context: Context) -> None:
        """Name the optimizer's tensors."""
        self._context = context
        self.name_parameters()

    def name_parameters(self) -> None:
        """Take the context's parameters, some of which may be new."""
        self._names = {id(p): name for name, p in self._context.parameters.items()}

    def arm(self, measured: bool) -> None:
        """Put the optimizer's hooks in place, or take them away."""
        self._release()
        self._between.arm(measured)
        self._compared, self._jumps = False, ()
        optimizer = self._context.optimizer
        if optimizer is None or measured == bool(self._handles):
            return
        if not measured:
            self.detach()
            return
        self._handles = [
            optimizer.register_step_pre_hook(self._context.guarded(self.name, self._before)),
            optimizer.register_step_post_hook(self._context.guarded(self.name, self._after)),
        ]

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
        for p, _ in self._listed(optimizer):
            entry, here = self._updates.get(id(p)), local_part(p.detach())[0]
            if entry is None or entry.parameter is not p or entry.slots.device != here.device:
                entry = self._updates[id(p)] = self._entry(p)
            elif not entry.update.is_of(here):
                # The parameter has been given other memory (p.data = ...), or another format.
                entry.update = Update(here)
            if entry.update.sampled:
                chosen.append(entry)
            # Some optimizers (heavyball's) let go of each gradient once they have used it.
            if p.grad is not None:
                self._held[id(p)] = p.grad
        with torch.no_grad():
            take_before([entry.update for entry in chosen])
        self._look_between(chosen, settings_of(optimizer.param_groups))
        self._ready = True

    def _look_between(self, chosen: Sequence[_Entry], settings: dict[str, float]) -> None:
        """Compare weights and settings with what the last step left."""
        self._jumps, self._settings = jumps(self._settings, settings), settings
        compared = self._between.compare([entry.update for entry in chosen])
        self._compared = compared is not None
        if compared is None:
            return
        places, rows = compared
        row_of = dict(zip(places, rows, strict=True))
        for i, entry in enumerate(chosen):
            own = self._context.buffer.view(entry.slots)[len(FIELDS) :]
            own.copy_(row_of[i]) if i in row_of else own.zero_()

    def _entry(self, p: Tensor) -> _Entry:
        name, (here, is_shard) = self._names[id(p)], local_part(p.detach())
        is_shard = is_shard or self._context.is_scattered(name)
        # All fields are sums, and what is the same on every rank counts once.
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
        # Once: several optimizers', or ZeRO's, is put together when it is asked for.
        states = optimizer.state
        seen: list[Update] = []
        for p, group in self._listed(optimizer):
            entry = self._updates.get(id(p))
            given = p.grad if p.grad is not None else self._held.get(id(p))
            if entry is None or given is None or not entry.update.sampled:
                continue
            update, slots = entry.update, entry.slots
            if not update.follow(local_part(p.detach())[0]):
                continue
            gradient, moments = local_part(given)[0], _moments(states.get(p, {}), group)
            if slots.device.type == "cpu" and update.prepare(gradient, moments, buffer.address(slots)):
                jobs.append(update.address)
            else:
                with torch.no_grad():
                    buffer.view(slots)[: len(FIELDS)].copy_(update.after(gradient, moments))
            slots.stamp = buffer.stamp
            seen.append(update)
        library = native.kernel()
        if jobs and library is not None:
            addresses = (ctypes.c_void_p * len(jobs))(*jobs)
            library.stabilitylab_after(ctypes.addressof(addresses), len(jobs), torch.get_num_threads())
        self._between.keep(seen)
        self._release()

    def gradients(
        self, gradients: Mapping[str, Tensor], norms: Mapping[str, Tensor | float], scale: float | Slots
    ) -> None:
        """Not this probe's business."""

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
        """The optimizer's step was left out, as where a gradient is not finite: perhaps since a weight is not."""
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
        second = rows[:, COLUMN["second2"]] if has_stepped else np.full(len(rows), -1.0)
        outside = rows[:, len(FIELDS) :] if compared else None
        events = tuple(self._changes.events(gathered.sites, outside, second, settings, beta2))
        if not has_stepped:
            return Readings((), np.empty(0), events)
        values, with_moments = statistics(rows), rows[:, COLUMN["first2"]] >= 0
        full, short = (
            tuple(name for name, has in zip(gathered.sites, with_moments, strict=True) if has == wanted)
            for wanted in (True, False)
        )
        keys = self._full.keys(full) + self._short.keys(short) if short else self._full.keys(full)
        parts = [values[with_moments].ravel(), values[~with_moments, : len(WITHOUT_MOMENTS)].ravel()]
        return Readings(keys, np.concatenate(parts), events)

    def companions(self, gathered: Gathered, numbers: Mapping[str, float]) -> dict[str, float]:
        """RMS of the change of all weights over the learning rate, each parameter's sample standing for all of
        it; for the detector, which is not to take a rise of the rate for one of the gradient."""
        rate, rows = numbers.get("learning_rate", 0.0), gathered.rows()
        count, sampled, squares = (rows[:, COLUMN[name]] for name in ("count", "sampled", "update2"))
        if not rate > 0 or not len(rows) or not gathered.extra[-1]:
            return {}
        rms = np.sqrt(np.sum(squares * count / sampled) / count.sum())
        return {"update/-/rms_over_rate": float(rms / rate)}

    def detach(self) -> None:
        """Remove the optimizer's hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._release()


def statistics(rows: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The table's statistics [parameters, STATISTICS] from the summed-up updates [parameters, FIELDS]."""
    column = {field: rows[:, i] for field, i in COLUMN.items()}
    with np.errstate(divide="ignore", invalid="ignore"):
        rms = np.sqrt(column["update2"] / column["sampled"])
        weight_rms = np.sqrt(column["weight2"] / column["sampled"])
        values = [
            rms,
            weight_rms,
            rms / weight_rms,
            np.sqrt(column["ratio2"] / column["count"]),
            np.sqrt(column["first2"]),
            np.sqrt(column["second2"]),
            column["below"] / column["count"],
        ]
    return np.stack(values, axis=1)


def _moments(state: Mapping[str, Any], group: Mapping[str, Any]) -> Moments | None:
    """Adam's moments from a parameter's optimizer state; None if there are none."""
    if "exp_avg" not in state:  # heavyball keeps it one level further down
        nested = (inner for inner in state.values() if isinstance(inner, Mapping) and "exp_avg" in inner)
        state = {**state, **next(nested, {})}
    first, second, betas = state.get("exp_avg"), state.get("exp_avg_sq"), group.get("betas")
    if not (isinstance(first, Tensor) and isinstance(second, Tensor) and betas):
        return None
    # torch keeps the step count with the parameter, fused optimizers with the group.
    step, correction = state.get("step", group.get("step")), 1.0
    if isinstance(step, Tensor):
        # A step counter on an accelerator stays there: reading it would wait for the device.
        correction = 1.0 - betas[1] ** (float(step) if step.device.type == "cpu" else step)
    elif step is not None:
        correction = 1.0 - betas[1] ** step
    first, second = local_part(first)[0], local_part(second)[0]
    return Moments(first=first, second=second, correction=correction, epsilon=float(group.get("eps", 1e-8)))
