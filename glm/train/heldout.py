"""The loss on rows outside training, the same for every run of an objective: it compares arms at the end.

    heldout loss = mean over the targets of the first rows of the held-out split, in evaluation, without z-loss

The rows follow from the data, the objective (without its tasks) and their length alone, not from the seed: runs that differ in
seeds, levers or rates see the same rows, so the rows' effect on the loss cancels in the difference.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

from glm.data.batch import Batch
from glm.data.config import ObjectiveConfig
from glm.data.loader import Loader
from glm.data.shards import TokenData
from glm.errors import InputError

AT_A_TIME = 16


@dataclass(frozen=True, kw_only=True)
class HeldoutConfig:
    """How to judge a run's last weights.

    Attributes:
        rows: number of rows, from the beginning of the held-out split; 0: off.
    """

    rows: int = 0

    def __post_init__(self) -> None:
        if self.rows < 0:
            raise InputError(f"heldout.rows counts rows: 0 (off) or more, got {self.rows}")


def heldout_rows(data: TokenData, objective: ObjectiveConfig, *, length: int, rows: int) -> Batch:
    """The fixed rows. Raises InputError where the data hold out too little text."""
    plain = dataclasses.replace(objective, multitask_share=0.0)
    return Loader(data, plain, length=length, seed=0, split="heldout").batch(0, rows)


@torch.no_grad()
def heldout_loss(model: Any, batch: Batch) -> float:
    """Mean loss a target, nats; infinite where it is not finite.

    Args:
        model: a ``glm.model.Transformer``; afterwards in training mode.
        batch: the rows.
    """
    device = next(model.parameters()).device
    total, targets = 0.0, int((batch.targets_BT >= 0).sum())
    model.eval()
    try:
        for first in range(0, batch.tokens_BT.shape[0], AT_A_TIME):
            rows = slice(first, first + AT_A_TIME)
            parts = (batch.tokens_BT, batch.targets_BT, batch.positions, batch.segments_BT, batch.context_BT)
            loss, of_z, _ = model.loss_parts(*(part[rows].to(device) for part in parts))
            total += float(loss - of_z)  # the z-loss is a term of training, not of the likelihood
    finally:
        model.train()
    return total / targets if targets and math.isfinite(total) else math.inf
