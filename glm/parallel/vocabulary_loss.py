"""Cross-entropy where every tensor rank has some rows of the vocabulary (Megatron-LM, 1909.08053, section 3).

The same as ``glm.model.vocabulary_loss``; the ranks exchange the largest logit, the sum of exponentials and the target's logit,
three numbers a position, never the logits:

    M_n = max_i max_v l_nv           Z_n = sum_i sum_v exp(l_nv - M_n)
    loss = sum_n  log Z_n + M_n - l_n,target + c (log Z_n + M_n)^2

Chunks, formats and the point of rounding gradients are those of the one-process loss.

Shapes: N positions, C hidden, V this rank's part of the vocabulary, n positions a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from glm.model.chunks import CHUNK_ELEMENTS
from glm.model.vocabulary_loss import LIFT, capped
from glm.precision import at_least_fp32, upcasts, wide_product


class _SplitVocabularyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NC: Tensor,
        weight_VC: Tensor,
        target_N: Tensor,
        first: int,
        z_loss: float,
        group: dist.ProcessGroup,
        cap: float,
    ) -> tuple[Tensor, Tensor]:
        ctx.dtypes = hidden_NC.dtype, weight_VC.dtype
        in_fp32 = upcasts(hidden_NC)
        hidden_NC, weight = (at_least_fp32(x) if in_fp32 else x for x in (hidden_NC, weight_VC))
        ctx.lift = LIFT if hidden_NC.dtype == torch.float16 else 1.0
        wide = torch.promote_types(hidden_NC.dtype, torch.float32)
        needs_gradient = any(ctx.needs_input_grad[:2])
        loss, squares = (hidden_NC.new_zeros((), dtype=wide) for _ in range(2))
        grad_hidden = hidden_NC.new_empty(hidden_NC.shape if needs_gradient else (0,), dtype=wide)
        grad_weight = hidden_NC.new_zeros(weight_VC.shape if needs_gradient else (0,), dtype=wide)
        size = max(1, CHUNK_ELEMENTS // weight_VC.shape[0])
        for begin in range(0, hidden_NC.shape[0], size):
            hidden = hidden_NC[begin : begin + size]
            local_n1 = target_N[begin : begin + size, None] - first
            elsewhere_n1 = (local_n1 < 0) | (local_n1 >= weight_VC.shape[0])
            local_n1 = local_n1.masked_fill(elsewhere_n1, 0)
            logits_nV = capped(at_least_fp32(hidden @ weight.t()), cap)
            slope_nV = 1 - (logits_nV / cap).square_() if cap and needs_gradient else None
            largest_n1 = logits_nV.amax(1, keepdim=True)
            dist.all_reduce(largest_n1, op=dist.ReduceOp.MAX, group=group)
            logits_nV -= largest_n1
            target_n1 = logits_nV.gather(1, local_n1).masked_fill(elsewhere_n1, 0.0)
            softmax_nV = logits_nV.exp_()
            sums_n2 = torch.cat((softmax_nV.sum(1, keepdim=True), target_n1), dim=1)
            dist.all_reduce(sums_n2, group=group)
            total_n1, target_n1 = sums_n2[:, :1], sums_n2[:, 1:]
            log_total_n1 = total_n1.log()
            loss += (log_total_n1 - target_n1).sum()
            z_n1 = log_total_n1 + largest_n1
            if z_loss:
                squares += (of_chunk := z_n1.square().sum())
                loss += z_loss * of_chunk
            if needs_gradient:
                grad_logits = softmax_nV.div_(total_n1).mul_(1 + 2 * z_loss * z_n1)
                grad_logits.scatter_add_(1, local_n1, elsewhere_n1.to(wide) - 1.0)
                if slope_nV is not None:
                    grad_logits = grad_logits.mul_(slope_nV)
                grad_logits = grad_logits.mul_(ctx.lift).to(hidden.dtype)
                grad_hidden[begin : begin + size] = wide_product(grad_logits, weight)
                grad_weight += wide_product(grad_logits.t(), hidden)
        if needs_gradient:
            dist.all_reduce(grad_hidden, group=group)
        ctx.save_for_backward(grad_hidden, grad_weight)
        squares *= z_loss
        ctx.mark_non_differentiable(squares)
        return loss, squares

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        grad = grad / ctx.lift
        hidden_dtype, weight_dtype = ctx.dtypes
        hidden, weight = (grad_hidden * grad).to(hidden_dtype), (grad_weight * grad).to(weight_dtype)
        return hidden, weight, None, None, None, None, None


def split_vocabulary_loss(
    hidden_NC: Tensor,
    weight_VC: Tensor,
    target_N: Tensor,
    z_loss: float,
    group: dist.ProcessGroup,
    cap: float = 0.0,
) -> Tensor:
    """Sum over positions of the cross-entropy (and z-loss), an fp32 scalar in nats, the same on all tensor ranks.

    Args:
        hidden_NC: final hidden states at target positions, the same on all tensor ranks.
        weight_VC: this rank's rows of the output projection.
        target_N: token numbers of the whole vocabulary.
        z_loss: coefficient c.
        group: the tensor ranks.
        cap: of the logits; 0 is off.
    """
    return split_vocabulary_losses(hidden_NC, weight_VC, target_N, z_loss, group, cap)[0]


def split_vocabulary_losses(
    hidden_NC: Tensor,
    weight_VC: Tensor,
    target_N: Tensor,
    z_loss: float,
    group: dist.ProcessGroup,
    cap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``split_vocabulary_loss``, and its z-loss part, which has no gradient."""
    first = dist.get_rank(group) * weight_VC.shape[0]
    both: tuple[Tensor, Tensor] = _SplitVocabularyLoss.apply(  # type: ignore[no-untyped-call]
        hidden_NC, weight_VC, target_N, first, z_loss, group, cap
    )
    return both
