"""How a rule's directions u change before they move the weights.

    cautious         u <- u [u g > 0] / max(mean [u g > 0], 1e-3)                      Liang et al., 2411.16085, algorithm 1
    update norm      u <- u min(1, B / |u|),  B mean + k deviations of the last 128    Levanter's ClipUpdateNorm
    decay            w <- w - d w, d = rate l (coupled), rate / peak l (independent: Wortsman et al., 2309.14322, section 3.2.2),
                     or rate (rate / peak) l (AdamC: Defazio, 2506.02285, equation 2; no norm follows the output projection, which
                     keeps AdamW's)
    cautious decay   of those only w with u w > 0, which the update makes smaller      Chen et al., 2510.12402

Sums over a tensor go through ``total``, so that a rank with only a share of it learns the whole's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glm.train.update_rules import RULES, OptimizerConfig, State, Tensors

# Sums of a share of each tensor, by name -> of the whole tensor.
Total = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


def directions_of(
    parts: Sequence[tuple[Sequence[nn.Parameter], Mapping[str, Any]]],
    names: Mapping[nn.Parameter, str],
    states: Mapping[Any, State],
    rows: Mapping[str, tuple[int, ...]],
    factor: float,
    t: int,
    config: OptimizerConfig,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """u and the clipped gradient of every weight, by name.

    Args:
        parts: weights with gradients, and the settings of their group.
        names, states: of the weights.
        rows: of the matrices that make up some weights, by name.
        factor: of the clip; multiplies gradients in place.
        t: number of the update, from 1.
        config: constants.
    """
    directions: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    for weights, group in parts:
        own_names = [names[p] for p in weights]
        own = [p.grad for p in weights if p.grad is not None]  # each has one
        if factor != 1.0:
            torch._foreach_mul_(own, factor)
        tensors = Tensors(
            gradients=own, states=[states[p] for p in weights], rows=[rows.get(name) for name in own_names]
        )
        found = RULES[group["rule"]].directions(tensors, t, config)
        directions |= dict(zip(own_names, found, strict=True))
        gradients |= dict(zip(own_names, own, strict=True))
    return directions, gradients


def decay_share(config: OptimizerConfig, rate: float, peak: float, decay: float, *, leads_out: bool) -> float:
    """d: the share that an update takes off a weight of the group.

    Args:
        config: kind of decay.
        rate: learning rate of this update, without the group's factor.
        peak: highest rate of the schedule.
        decay: of the group.
        leads_out: the group is the output projection.
    """
    if config.decay == "independent":
        return rate / peak * decay
    if config.decay == "adamc" and not leads_out:
        return rate * (rate / peak) * decay
    return rate * decay


def make_cautious(
    directions: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    total: Total,
) -> None:
    """Keep only the elements of each direction that point the gradient's way, in place.

    Args:
        sizes: elements of the whole tensors.
    """
    masks = {name: (u * gradients[name] > 0).to(u.dtype) for name, u in directions.items()}
    kept = total({name: mask.sum() for name, mask in masks.items()})
    for name, u in directions.items():
        u.mul_(masks[name]).div_((kept[name] / sizes[name]).clamp_min(1e-3).to(u.dtype))


def take_off(weight: Tensor, direction: Tensor, *, rate: float, decay: float, cautious: bool) -> None:
    """w <- w - decay w - rate u, in place."""
    if decay and cautious:
        weight.sub_(torch.where(direction * weight > 0, weight, 0.0), alpha=decay)
    elif decay:
        weight.mul_(1 - decay)
    weight.sub_(direction, alpha=rate)


class PastValues:
    """The last values of a quantity, on its device; their mean and deviation without waiting for it.

    Args:
        size: how many.
    """

    def __init__(self, size: int = 128) -> None:
        self.size = size
        self._values: list[Tensor | float] = []

    def __len__(self) -> int:
        return len(self._values)

    def add(self, value: Tensor) -> None:
        self._values = [*self._values, value][-self.size :]

    def bound(self, deviations: float) -> Tensor:
        """mean + deviations * standard deviation, of at least two values."""
        device = next((v.device for v in self._values if isinstance(v, Tensor)), None)
        past = torch.stack([_scalar(v, device) for v in self._values])
        return past.mean() + deviations * past.std()

    def state(self) -> list[float]:
        return [float(value) for value in self._values]

    def load(self, values: list[float]) -> None:
        self._values = [*values]


def _scalar(value: Tensor | float, device: torch.device | None) -> Tensor:
    """In float64, filled on its device: copying it there would wait for the device."""
    if isinstance(value, Tensor):
        return value.double()
    return torch.full((), value, dtype=torch.float64, device=device)


# So many updates' norms must be known before they bound one.
LEAST = 16


def bound_update(
    directions: Mapping[str, Tensor], past: PastValues, deviations: float, total: Total
) -> Tensor:
    """Clip the norm of the whole update by its own past, in place; returns the factor, a scalar. Never waits for the device."""
    squares = total({name: u.double().square().sum() for name, u in directions.items()})
    norm = torch.stack(list(squares.values())).sum().sqrt()
    share = torch.ones_like(norm)
    if len(past) >= LEAST:
        bound = past.bound(deviations)
        share = (bound / norm.clamp_min(1e-300)).clamp_max(1.0)
        torch._foreach_mul_(list(directions.values()), share.float())
        norm = torch.minimum(norm, bound)
    past.add(norm)
    return share
