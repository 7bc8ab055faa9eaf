"""Changes that no update made: weights that moved between two steps, settings of the optimizer that jumped, moments that fell.

Between the end of one optimizer step and the beginning of the next nothing moves a weight in ordinary training. So of two measured
steps that follow each other

    ||w before step t|| against ||w after step t - 1||      all elements: a row, a single weight, a NaN
    sample before t against sample after t - 1              one element in 512: what a norm does not see, a change of sign

must agree. Adam's second moment v = beta2 v + (1 - beta2) g^2 falls by beta2 at most, so one that falls by more was changed, and
the settings of a parameter group (beta1, beta2, weight decay, epsilon, ...; the rate is recorded anyway) stay or move by little. A
parameter's change is told after ``CALM`` steps without one: what a loop does regularly (weights normalised after every step) is its
habit.

Told as events ``parameter-changed`` (site, factor of its norm), ``moments-changed`` (site, factor) and ``optimizer-changed``
(setting, before, after): one of each kind a step, with the number of parameters that changed and the first of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from stabilitylab.statistics.updates import Update, take_before

FIELDS = ("outside2", "then2", "now2")
CALM = 4
LEAST = 1e-3  # relative change of a norm: what formats and reductions may do lies far below
SETTING_FACTOR = 1.5
_RATES = ("lr", "rate", "initial", "step", "maximize", "capturable")
HALVED = 0.5**2  # of the squared norm of second moments
MOST = 16
SLACK = 0.8

EventData = tuple[str, Mapping[str, Any]]


class BetweenSteps:
    """Where the last step left the weights, until the next one begins."""

    def __init__(self) -> None:
        # Of each parameter: what is sampled (held, so that its id stays its own), the sample, and the norm.
        self._kept: dict[int, tuple[Update, Tensor, Tensor]] = {}
        self._fresh = False

    def arm(self, measured: bool) -> None:
        """A step begins. What was kept counts if the step before kept it, and nothing came between."""
        if not (measured and self._fresh):
            self._kept = {}
        self._fresh = False

    def held(self) -> list[Update]:
        """Whose result is remembered."""
        return [update for update, *_ in self._kept.values()]

    def compare(self, updates: Sequence[Update]) -> tuple[list[int], Tensor] | None:
        """Places in ``updates`` of those that were kept, and for each [FIELDS] from then to now, on the device; None if there is
        nothing to compare with."""
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
        """The optimizer's step is over: remember its result. The updates' memory is taken for it."""
        with torch.no_grad():
            take_before(list(updates))
            norms = _norms(updates)
            self._kept = {id(u): (u, u.before, norm) for u, norm in zip(updates, norms, strict=True)}
        self._fresh = True


def _sums_of_squares(x: Tensor, lengths: Sequence[int]) -> Tensor:
    """Of each of the parts of ``x`` that have these lengths."""
    if x.device.type != "cpu":
        # The lengths stay on the host: to bring them over, or to have them checked there, would wait for the device.
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
    """Makes events of what was compared, step by step; runs in the delivery thread."""

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
            names: of the parameters.
            compared: [parameters, FIELDS], zeros where there is nothing to compare with; None where the step before was
                not measured.
            second: squared norm of Adam's second moment, below zero where there is none.
            settings: of the optimizer, that jumped: name, before, after.
            beta2: the least of all groups', 0.5 where none is known.
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
    """Whether a weight is not where it was; what was not finite before is no news."""
    if not math.isfinite(then2) or (then2 == now2 and outside2 == 0.0):
        return False
    if not math.isfinite(now2):
        return True
    apart = max(abs(math.sqrt(now2) - math.sqrt(then2)), math.sqrt(outside2))
    return not apart <= LEAST * math.sqrt(then2)


def _told(kind: str, changes: Sequence[tuple[str, float]], of: int) -> list[EventData]:
    """One event a step, of the first site in the optimizer's order, with how many others did the same."""
    if not changes:
        return []
    (site, factor), sites = changes[0], [name for name, _ in changes[:MOST]]
    return [(kind, {"site": site, "factor": factor, "count": len(changes), "of": of, "sites": sites})]


def settings_of(groups: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The numbers of all parameter groups by name, rates and counters left out: ``0.weight_decay``, ``0.beta2``."""
    found: dict[str, float] = {}
    for i, group in enumerate(groups):
        for name, value in group.items():
            if name == "params" or any(word in name for word in _RATES):
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
    """Settings that are half as large again as they were, or less than two thirds; of a beta, 1 - beta counts. One that several
    groups share is told once."""
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
