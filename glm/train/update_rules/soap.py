"""SOAP: Adam in the eigenbasis of Shampoo's preconditioners (Vyas et al., 2409.11321, algorithm 3).

    L = b L + (1 - b) G G',  R = b R + (1 - b) G' G                 b = beta2
    Q_L, Q_R   their eigenvectors, largest first; every ``REFRESH`` updates one step of power iteration and QR
    m = b1 m + (1 - b1) G,   v = b2 v + (1 - b2) (Q_L' G Q_R)^2
    u = Q_L [ (Q_L' m Q_R) / (1 - b1^s) / (sqrt(v / (1 - b2^s)) + eps) ] Q_R'

As in its authors' code the first gradient only makes the bases, so s = t - 1, and the refresh of a basis comes after the update
that uses the old one. m is in the weights' own basis, v in the eigenbasis, whose columns each refresh sorts anew.

Limits: hidden matrices only; two bases and two preconditioners are 2 (m^2 + n^2) numbers beside the moments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from glm.train.update_rules.config import OptimizerConfig
from glm.train.update_rules.rule import State, Tensors, UpdateRule

REFRESH = 10


def _state(weight: Tensor) -> State:
    *_, m, n = weight.shape
    batch = weight.shape[:-2]
    return {
        "exp_avg": torch.zeros_like(weight),
        "exp_avg_sq": torch.zeros_like(weight),
        "left": weight.new_zeros((*batch, m, m)),
        "right": weight.new_zeros((*batch, n, n)),
        "left_basis": weight.new_zeros((*batch, m, m)),
        "right_basis": weight.new_zeros((*batch, n, n)),
    }


def soap(tensors: Tensors, t: int, config: OptimizerConfig) -> list[Tensor]:
    """u of SOAP for weights that are matrices; advances moments, preconditioners and bases."""
    return [
        _direction(gradient, state, t, config)
        for gradient, state in zip(tensors.gradients, tensors.states, strict=True)
    ]


def _direction(gradient: Tensor, state: State, t: int, config: OptimizerConfig) -> Tensor:
    first, second = state["exp_avg"], state["exp_avg_sq"]
    # There is no basis yet either where the loop withheld this weight's first updates.
    if t == 1 or not bool(state["left_basis"].any()):
        _take_in(gradient, state, config.beta2)
        for side in ("left", "right"):
            state[f"{side}_basis"].copy_(torch.linalg.eigh(state[side])[1].flip(-1))
        return torch.zeros_like(gradient)
    Q_L, Q_R = state["left_basis"], state["right_basis"]
    first.lerp_(gradient, 1 - config.beta1)
    second.lerp_((Q_L.mT @ gradient @ Q_R).square(), 1 - config.beta2)
    mean = (Q_L.mT @ first @ Q_R) / (1 - config.beta1 ** (t - 1))
    size = (second / (1 - config.beta2 ** (t - 1))).sqrt().add_(config.epsilon)
    direction = Q_L @ (mean / size) @ Q_R.mT
    _take_in(gradient, state, config.beta2)
    if (t - 1) % REFRESH == 0:
        _refresh(state)
    return direction


def _take_in(gradient: Tensor, state: State, beta: float) -> None:
    state["left"].lerp_(gradient @ gradient.mT, 1 - beta)
    state["right"].lerp_(gradient.mT @ gradient, 1 - beta)


def _refresh(state: State) -> None:
    for side, dim in (("left", -2), ("right", -1)):
        basis = state[f"{side}_basis"]
        powered = state[side] @ basis
        order = (basis * powered).sum(-2).argsort(-1, descending=True)
        second = state["exp_avg_sq"]
        along = (order[..., :, None] if dim == -2 else order[..., None, :]).expand_as(second)
        second.copy_(second.gather(dim, along))
        sorted_columns = powered.gather(-1, order[..., None, :].expand_as(powered))
        basis.copy_(torch.linalg.qr(sorted_columns)[0])


SOAP = UpdateRule(
    names=("exp_avg", "exp_avg_sq", "left", "right", "left_basis", "right_basis"),
    directions=soap,
    make=_state,
)
