"""Cross-entropy over the vocabulary without ever holding the batch's logits.

For N target positions with hidden states h_n, output matrix W and targets t_n (z_n = log sum exp of the logits):

    loss = sum_n  z_n - (W h_n)_t  +  c z_n^2                 c: z-loss (PaLM, 2204.02311, section 5), also returned by itself
    d/dlogits = softmax (1 + 2 c z_n) - onehot(t_n)

With a cap c (Gemma 2) a logit is c tanh(z / c), and its gradient is multiplied by 1 - tanh^2.

The loss projects only positions with a target, in chunks. It forms each chunk's gradient with respect to h and W at once, while the
chunk's logits are at hand, so the backward pass recomputes nothing and memory is one chunk of logits. (The idea of Liger's fused
linear cross-entropy, 2410.10989, on any device.) Log-softmax is in fp32 whatever the compute format; the gradients stay in fp32
until the loss's own gradient, with the loss scale, has multiplied them, so none underflows early.

Where half products are native, the logits' gradient is an operand, hence half. Its elements are probabilities, and in fp16 those
below 2^-25 would be 0 before any loss scale can lift them. So the loss multiplies them by LIFT before rounding, keeps and
accumulates products in fp32, and divides by LIFT with the loss's gradient: 2^-37 still counts, and 1 + 2 c z < 16 stays in range.

Shapes: N positions, C hidden, V vocabulary, n positions a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glm.model.chunks import CHUNK_ELEMENTS
from glm.precision import (
    at_least_fp32,
    has_kernel,
    linear,
    losses,
    upcasts,
    wide_product,
    wide_product_of_rows,
)

# Power of two, so that it costs no rounding.
LIFT = 2.0**12


class _VocabularyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NC: Tensor, weight_VC: Tensor, target_N: Tensor, z_loss: float, cap: float
    ) -> tuple[Tensor, Tensor]:
        ctx.dtypes = hidden_NC.dtype, weight_VC.dtype
        needs_gradient = any(ctx.needs_input_grad[:2])
        # Where the CPU computes half products in fp32 anyway, upcast once instead of once per chunk.
        in_fp32 = upcasts(hidden_NC)
        hidden_NC, weight = (at_least_fp32(x) if in_fp32 else x for x in (hidden_NC, weight_VC))
        wide = torch.promote_types(hidden_NC.dtype, torch.float32)
        ctx.lift = LIFT if hidden_NC.dtype == torch.float16 else 1.0
        loss, squares = (hidden_NC.new_zeros((), dtype=wide) for _ in range(2))
        # Without gradients (in evaluation) these stay empty.
        grad_hidden = hidden_NC.new_empty(hidden_NC.shape if needs_gradient else (0,), dtype=wide)
        grad_weight = hidden_NC.new_zeros(weight_VC.shape if needs_gradient else (0,), dtype=wide)
        size = max(1, CHUNK_ELEMENTS // weight_VC.shape[0])
        room_nV = hidden_NC.new_empty((min(size, hidden_NC.shape[0]), weight_VC.shape[0]), dtype=wide)
        for first in range(0, hidden_NC.shape[0], size):
            hidden = hidden_NC[first : first + size]
            target_n1 = target_N[first : first + size, None]
            logits_nV = capped(at_least_fp32(linear(hidden, weight)), cap)
            if not cap and hidden.dtype == wide and has_kernel(logits_nV):
                of_target_n = logits_nV.gather(1, target_n1)[:, 0] if z_loss else None  # overwritten next
                loss_n = losses(logits_nV, target_n1, z_loss)
                loss += loss_n.sum()
                if of_target_n is not None:
                    # The kernel returns z + c z^2: solve for z, in the form that loses nothing where c is small.
                    both_n = loss_n + of_target_n
                    squares += (2 * both_n / (1 + (1 + 4 * z_loss * both_n).sqrt())).square().sum()
                if needs_gradient:
                    grad_hidden[first : first + size] = wide_product(logits_nV, weight)
                    grad_weight += wide_product_of_rows(logits_nV, hidden)
                continue
            largest_n1, at_n1 = logits_nV.max(1, keepdim=True)
            softmax_nV = torch.softmax(logits_nV, 1, out=room_nV[: len(hidden)])
            # log sum exp(logits - largest): the largest one's probability is at least 1/V, so its logarithm is safe.
            log_total_n1 = -softmax_nV.gather(1, at_n1).log()
            loss += (largest_n1 - logits_nV.gather(1, target_n1) + log_total_n1).sum()
            z_n1 = log_total_n1 + largest_n1
            if z_loss:
                squares += (of_chunk := z_n1.square().sum())
                loss += z_loss * of_chunk
            if needs_gradient:
                # In place: the probabilities become the logits' gradient.
                grad_logits = softmax_nV.mul_(1 + 2 * z_loss * z_n1) if z_loss else softmax_nV
                grad_logits.scatter_add_(1, target_n1, torch.full_like(largest_n1, -1.0))
                if cap:
                    grad_logits = grad_logits.mul_(1 - (logits_nV / cap).square_())
                if hidden.dtype != wide:
                    grad_logits = grad_logits.mul_(ctx.lift).to(hidden.dtype)
                grad_hidden[first : first + size] = wide_product(grad_logits, weight)
                grad_weight += wide_product_of_rows(grad_logits, hidden)
        ctx.save_for_backward(grad_hidden, grad_weight)
        squares *= z_loss
        ctx.mark_non_differentiable(squares)
        return loss, squares

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        grad = grad / ctx.lift
        hidden, weight = (grad_hidden * grad).to(hidden_dtype), (grad_weight * grad).to(weight_dtype)
        return hidden, weight, None, None, None


def vocabulary_loss(
    hidden_NC: Tensor, weight_VC: Tensor, target_N: Tensor, z_loss: float = 0.0, cap: float = 0.0
) -> Tensor:
    """Sum over positions of the cross-entropy (and z-loss), an fp32 scalar in nats.

    Args:
        hidden_NC: final hidden states at target positions.
        weight_VC: output projection.
        target_N: token numbers.
        z_loss: coefficient c.
        cap: of the logits; 0 is off.
    """
    return vocabulary_losses(hidden_NC, weight_VC, target_N, z_loss, cap)[0]


def vocabulary_losses(
    hidden_NC: Tensor, weight_VC: Tensor, target_N: Tensor, z_loss: float, cap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """``vocabulary_loss``, and its z-loss part, which has no gradient."""
    both: tuple[Tensor, Tensor] = _VocabularyLoss.apply(hidden_NC, weight_VC, target_N, z_loss, cap)  # type: ignore[no-untyped-call]
    return both


def logits(hidden: Tensor, weight_VC: Tensor, cap: float = 0.0) -> Tensor:
    """[..., V] in the compute format, for generation and evaluation."""
    return capped(linear(hidden, weight_VC), cap)


def capped(logits_nV: Tensor, cap: float) -> Tensor:
    """c tanh(z / c); c = 0 leaves the logits unchanged."""
    return torch.tanh(logits_nV / cap) * cap if cap else logits_nV
