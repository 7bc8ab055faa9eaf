"""Changes that no update made: weights that moved between two steps, optimizer settings that jumped, moments that fell.

In ordinary training nothing moves a weight between the end of one optimizer step and the beginning of the next. So for two measured
steps in succession

    ||w before step t|| against ||w after step t - 1||      all elements: a row, a single weight, a NaN
    sample before t against sample after t - 1              one element in 512: a change of sign, which a norm does not show

must agree. In one step Adam's second moment v = beta2 v + (1 - beta2) g^2 falls to beta2 v at the lowest: where it falls further,
something else changed it. The settings of a parameter group (beta1, beta2, weight decay, epsilon, ...; not the rate, which is
recorded anyway) stay or move little (``optimizer_settings.py`` says which they are). A parameter's change counts only after
``CALM`` steps without one, since a regular change (weights normalised after every step) belongs to the loop.

The events are ``parameter-changed`` (site, factor of its norm), ``moments-changed`` (site, factor) and ``optimizer-changed``
(setting, before, after): at most one of each kind per step, with the first parameter that changed and the number of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from stabilitylab.probes.optimizer_settings import setting_names
from stabilitylab.statistics.updates import Update, take_before

FIELDS = ("outside2", "then2", "now2")
CALM = 4
LEAST = 1e-3  # relative change of a norm: formats and reductions stay far below
SETTING_FACTOR = 1.5
_RATES = ("lr", "rate", "initial", "step", "maximize", "capturable")
MOST = 16
SLACK = 0.8

EventData = tuple[str, Mapping[str, Any]]


class BetweenSteps:
    """The weights as the last step left them, until the next one begins."""

    def __init__(self) -> None:
        # For each parameter: its update (held, so that its id stays its own), the sample, and the norm.
        self._kept: dict[int, tuple[Update, Tensor, Tensor]] = {}
        self._fresh = False

    def arm(self, measured: bool) -> None:
        """Begin a step. The kept weights count only if the step right before kept them."""
        if not (measured and self._fresh):
            self._kept = {}
        self._fresh = False

    def held(self) -> list[Update]:
        """The updates whose result is kept."""
        return [update for update, *_ in self._kept.values()]

    def compare(self, updates: Sequence[Update]) -> tuple[list[int], Tensor] | None:
        """The places in ``updates`` of the kept ones, and [FIELDS] for each, from then to now, on the device; None without any to
        compare."""
        kept, self._kept = self._kept, {}
        places = [i for i, update in enumerate(updates) if id(update) in kept]
        if not places:
            return None
        now = [updates[i] for i in places]
        device = now[0].weight.device
        with torch.no_grad():
            then = [kept[id(update)] for update in now]
            apart = _joined([u.before for u in now], device) - _joined(
                [before for _, before, _ in then], device
            )
            outside2 = _sums_of_squares(apart, [u.sampled for u in now])
            norms = [
                torch.stack([n.to(device) for n in some]) for some in ([n for *_, n in then], _norms(now))
            ]
            return places, torch.stack(
                [outside2.double(), *(norm.double().square() for norm in norms)], dim=1
            )

    def keep(self, updates: Sequence[Update]) -> None:
        """Keep the result of the optimizer's step that is over, in the updates' own memory."""
        with torch.no_grad():
            take_before(list(updates))
            norms = _norms(updates)
            self._kept = {id(u): (u, u.before, norm) for u, norm in zip(updates, norms, strict=True)}
        self._fresh = True


def _sums_of_squares(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """The sum of squares of each part of ``x``; ``lengths`` gives the parts' lengths."""
    if x.device.type != "cpu":
        # The lengths stay on the host: moving them, or having them checked there, would wait for the device.
        return torch.stack(torch._foreach_norm(torch.split(x, [*lengths]))).square()
    return torch.segment_reduce(x.square(), "sum", lengths=torch.tensor(lengths))


def _joined(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.cat([part.to(device) for part in parts])


def _norms(updates: Sequence[Update]) -> list[Tensor]:
    weights = [update.weight.detach() for update in updates]
    kinds = {(weight.device, weight.dtype) for weight in weights}
    if len(kinds) == 1 and weights[0].dtype in (torch.float32, torch.float64):
        return list(torch._foreach_norm(weights))
    wide = (weight if weight.dtype == torch.float64 else weight.float() for weight in weights)
    return [torch.linalg.vector_norm(weight) for weight in wide]


class OutsideChanges:
    """Makes events from the comparisons, step by step; runs in the sink thread."""

    def __init__(self) -> None:
        self._calm: dict[tuple[str, str], int] = {}
        self._second: dict[str, float] = {}

    def events(
        self,
        names: Sequence[str],
        compared: NDArray[Any] | None,
        second: NDArray[Any],
        settings: Sequence[tuple[str, float, float]],
        beta2: float,
    ) -> list[EventData]:
        """What changed between the last step and this one.

        Args:
            names: the parameters' names.
            compared: [parameters, FIELDS], zeros where there was nothing to compare; None where the step before was not measured.
            second: squared norm of Adam's second moment, below zero where there is none.
            settings: the optimizer's settings that jumped: name, before, after.
            beta2: the least of all groups; 0.5 where none is known.
        """
        found: list[EventData] = [
            ("optimizer-changed", {"setting": setting, "before": before, "after": after})
            for setting, before, after in settings
        ]
        if compared is not None:
            moved: list[tuple[str, float]] = []
            fell: list[tuple[str, float]] = []
            for name, (outside2, then2, now2) in zip(names, compared.tolist(), strict=True):
                if self._is_news("weight", name, _has_moved(outside2, then2, now2)):
                    moved.append((name, math.sqrt(now2 / then2) if then2 > 0 else math.inf))
            for name, now in zip(names, second.tolist(), strict=True):
                then = self._second.get(name, -1.0)
                if self._is_news("moments", name, then > 0 and 0 <= now < (SLACK * beta2) ** 2 * then):
                    fell.append((name, math.sqrt(now / then)))
            found += _told("parameter-changed", moved, len(names)) + _told(
                "moments-changed", fell, len(names)
            )
        self._second = dict(zip(names, second.tolist(), strict=True))
        return found

    def _is_news(self, what: str, name: str, is_changed: bool) -> bool:
        calm = self._calm.get((what, name), 0)
        self._calm[what, name] = 0 if is_changed else calm + 1
        return is_changed and calm >= CALM


def _has_moved(outside2: float, then2: float, now2: float) -> bool:
    """Whether a weight has moved; one that was not finite before does not count."""
    if not math.isfinite(then2) or (then2 == now2 and outside2 == 0.0):
        return False
    if not math.isfinite(now2):
        return True
    apart = max(abs(math.sqrt(now2) - math.sqrt(then2)), math.sqrt(outside2))
    return not apart <= LEAST * math.sqrt(then2)


def _told(kind: str, changes: Sequence[tuple[str, float]], of: int) -> list[EventData]:
    """One event for the step: the first site in the optimizer's order, with the number of parameters that changed."""
    if not changes:
        return []
    (site, factor), sites = changes[0], [name for name, _ in changes[:MOST]]
    return [(kind, {"site": site, "factor": factor, "count": len(changes), "of": of, "sites": sites})]


def numeric_settings(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The numeric settings of all parameter groups by name, without rates and state: ``0.weight_decay``, ``0.beta2``."""
    settings = {name for name in setting_names(optimizer) if not any(word in name for word in _RATES)}
    found: dict[str, float] = {}
    for i, group in enumerate(optimizer.param_groups):
        for name, value in group.items():
            if name not in settings:
                continue
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                found[f"{i}.{name}"] = float(value)
            elif isinstance(value, (tuple, list)):
                stem = name.removesuffix("s")
                numbers = [(j, v) for j, v in enumerate(value, 1) if isinstance(v, (int, float))]
                found |= {f"{i}.{stem}{j}": float(v) for j, v in numbers}
    return found


def least_beta2(settings: Mapping[str, float]) -> float:
    """The least share of its second moment that an optimizer keeps; 0.5 where it does not say."""
    return min((value for name, value in settings.items() if name.endswith(".beta2")), default=0.5)


def jumps(before: Mapping[str, float], after: Mapping[str, float]) -> tuple[tuple[str, float, float], ...]:
    """Settings that have grown by half or more, or fallen below two thirds; for a beta, 1 - beta counts. A change that several
    groups share comes once."""
    found: dict[tuple[str, float, float], None] = {}
    for name, now in after.items():
        then = before.get(name, now)
        plain = name.partition(".")[2]
        a, b = (1 - then, 1 - now) if _keeps(plain) else (then, now)
        small, large = sorted((abs(a), abs(b)))
        if then != now and (a * b <= 0 or large >= SETTING_FACTOR * small):
            found.setdefault((plain, then, now))
    return tuple(found)


def _keeps(name: str) -> bool:
    """Whether a setting is the share that a moving average keeps."""
    return name.startswith("beta") or name in ("momentum", "alpha")
