"""Cross-entropy over the vocabulary without ever holding the batch's logits.

For N target positions with hidden states h_n, output matrix W and targets t_n (z_n = log sum exp of the logits):

    loss = sum_n  z_n - (W h_n)_t  +  c z_n^2                 c: z-loss (PaLM, 2204.02311, section 5)
    d/dlogits = softmax (1 + 2 c z_n) - onehot(t_n)

Only positions with a target are projected. They go through in chunks; each chunk's gradient with respect to h and W is formed
at once, while its logits are at hand, so the backward pass has nothing to recompute and memory is one chunk of logits. (The idea
of Liger's fused linear cross-entropy, 2410.10989, on any device.) Log-softmax is in fp32 whatever the compute format; the
gradients are kept in fp32 until the loss's own gradient, loss scale included, has multiplied them, so none underflows early.

Shapes: N positions, C hidden, V vocabulary, n positions a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glm.precision import linear, upcasts

# Logits of a chunk: about 16 MB in fp32, which stays near the caches and is small beside the model.
CHUNK_ELEMENTS = 1 << 22


class _VocabularyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_NC: Tensor, weight_VC: Tensor, target_N: Tensor, z_loss: float) -> Tensor:
        needs_gradient = hidden_NC.requires_grad or weight_VC.requires_grad
        in_fp32 = upcasts(hidden_NC)
        # Where half products are computed in fp32 anyway, upcast the matrix once instead of once a chunk.
        weight = weight_VC.float() if in_fp32 else weight_VC
        loss = hidden_NC.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty(hidden_NC.shape, dtype=torch.float32, device=hidden_NC.device)
        grad_weight = torch.zeros(
            weight_VC.shape if needs_gradient else (0,), dtype=torch.float32, device=weight_VC.device
        )
        size = max(1, CHUNK_ELEMENTS // weight_VC.shape[0])
        for first in range(0, hidden_NC.shape[0], size):
            hidden = hidden_NC[first : first + size]
            hidden = hidden.float() if in_fp32 else hidden
            target_n1 = target_N[first : first + size, None]
            logits_nV = (hidden @ weight.t()).float()
            largest_n1 = logits_nV.amax(1, keepdim=True)
            at_target_n1 = logits_nV.gather(1, target_n1) - largest_n1
            # In place: the logits become exponentials, then their own gradient.
            exponentials = logits_nV.sub_(largest_n1).exp_()
            total_n1 = exponentials.sum(1, keepdim=True)
            log_total_n1 = total_n1.log()
            loss += (log_total_n1 - at_target_n1).sum()
            z_n1 = log_total_n1 + largest_n1
            if z_loss:
                loss += z_loss * z_n1.square().sum()
            if needs_gradient:
                grad_logits = exponentials.mul_((1 + 2 * z_loss * z_n1) / total_n1)
                grad_logits.scatter_add_(1, target_n1, torch.full_like(total_n1, -1.0))
                wide = grad_logits.to(hidden.dtype)
                grad_hidden[first : first + size] = wide @ weight
                grad_weight += (
                    (wide.t() @ hidden).float() if wide.dtype != torch.float32 else wide.t() @ hidden
                )
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden_NC.dtype, weight_VC.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        return (grad_hidden * grad).to(hidden_dtype), (grad_weight * grad).to(weight_dtype), None, None


def vocabulary_loss(hidden_NC: Tensor, weight_VC: Tensor, target_N: Tensor, z_loss: float = 0.0) -> Tensor:
    """Sum over positions of the cross-entropy (and z-loss), an fp32 scalar in nats.

    Args:
        hidden_NC: final hidden states at target positions.
        weight_VC: output projection.
        target_N: token numbers.
        z_loss: coefficient c.
    """
    loss: Tensor = _VocabularyLoss.apply(hidden_NC, weight_VC, target_N, z_loss)  # type: ignore[no-untyped-call]
    return loss


def logits(hidden: Tensor, weight_VC: Tensor) -> Tensor:
    """[..., V] in the compute format, for generation and evaluation."""
    return linear(hidden, weight_VC)
