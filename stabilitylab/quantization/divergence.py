"""How far a quantized model's output is from the original model's.

For a model that predicts tokens, per target t with distributions p (the model's own) and q (the quantized one's):

    loss increase    -log q[t] + log p[t]                 what users see; of either sign in a single token
    divergence       sum_v p[v] (log p[v] - log q[v])     Kullback-Leibler: its expectation where p is right, never negative

For an encoder it is the squared relative error of the output, sum |y_q - y|^2 / sum |y|^2. Divergence and squared error are both
quadratic in a small disturbance, so those of independent disturbances add up. A plan relies on that, and is made from them: loss
increases have noise of either sign, and a plan made from those would choose the lucky ones.

Shapes: N targets, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from stabilitylab.models import TextModel, Window
from stabilitylab.models.text_model import rows_at_once


@dataclass(kw_only=True)
class Divergence:
    """Sums over some text.

    Attributes:
        harm: of divergences in nats, or of squared errors.
        loss: of loss increases in nats; stays 0 for encoders.
        count: targets; for encoders the sum of squares of the output.
    """

    harm: float = 0.0
    loss: float = 0.0
    count: float = 0.0

    def add(self, other: Divergence) -> None:
        """Add another text's sums."""
        self.harm += other.harm
        self.loss += other.loss
        self.count += other.count

    @property
    def mean(self) -> float:
        """Divergence per target, or squared relative error."""
        return self.harm / self.count if self.count else 0.0

    @property
    def mean_loss(self) -> float:
        """Loss increase per target."""
        return self.loss / self.count if self.count else 0.0


class ReferenceOutput:
    """The model's own output on one window, to compare others with.

    Args:
        model: says whether there is a loss.
        window: the input.
        output: the unchanged model's.
    """

    def __init__(self, model: TextModel, window: Window, output: Tensor) -> None:
        self._targets_N: Tensor | None = None
        if not model.predicts or window.targets_BT is None:
            self._own = output.float()
            self.loss_sum = 0.0
            return
        self._chosen_BT = window.targets_BT >= 0
        self._targets_N = window.targets_BT[self._chosen_BT]
        self._own = torch.log_softmax(output[self._chosen_BT].float(), -1)
        self.loss_sum = float(-_at(self._own, self._targets_N).double().sum())

    def harm(self, output: Tensor) -> Divergence:
        """How far another output of the same window is off."""
        if self._targets_N is None:
            off = (output.float() - self._own).double().square().sum()
            return Divergence(harm=float(off), count=float(self._own.double().square().sum()))
        other_NV = output[self._chosen_BT]
        harm, loss = 0.0, 0.0
        for part in rows_at_once(len(self._targets_N), other_NV.shape[-1]):
            own_nV, targets_n = self._own[part], self._targets_N[part]
            other_nV = torch.log_softmax(other_NV[part].float(), -1)
            harm += float(
                F.kl_div(other_nV, own_nV, log_target=True, reduction="none").sum(-1).double().sum()
            )
            loss += float((_at(own_nV, targets_n) - _at(other_nV, targets_n)).double().sum())
        return Divergence(harm=max(harm, 0.0), loss=loss, count=len(self._targets_N))


def _at(log_probabilities_NV: Tensor, targets_N: Tensor) -> Tensor:
    return log_probabilities_NV.gather(-1, targets_N[:, None])[:, 0]
