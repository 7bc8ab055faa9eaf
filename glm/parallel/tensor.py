"""Tensor parallelism: each layer cut over t ranks, as Megatron-LM does (Shoeybi et al., 1909.08053, section 3).

    column   Y_i = X W_i'         W_i some of the outputs: query, key and value of H / t heads; up
    row      Y = sum_i X_i W_i'   W_i some of the inputs: attention output, down; adds the bias once, after the sum
    look-up  e = sum_i E_i[token] E_i some of the vocabulary, 0 for tokens that another rank has

Where all ranks hold the same X and each uses it for its own part, the gradient of X is the sum of theirs (``shared``); where they
sum their parts, each gets the gradient unchanged (``summed``): two all-reduces a sublayer forward, two backward.

``cut_block`` replaces the modules of a built block; the model itself knows nothing of it. Between the cuts every tensor rank holds
the same activations, and drops the same ones (``glm.model.dropout``).

Shapes: B rows, T tokens, C hidden, V vocabulary.

Limits: sums of parts are in the compute format, as collectives carry them: in half precision one more rounding a part.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from glm.model.block import Block
from glm.model.embedding import Embedding
from glm.model.feed_forward import FeedForward
from glm.model.layers import Norm
from glm.parallel.partition import Cut
from glm.precision import linear


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def shared(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The same tensor on every rank; its gradient is the sum of all ranks' gradients."""
    result: Tensor = _Shared.apply(x, group)  # type: ignore[no-untyped-call]
    return result


def summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the ranks, the same on each."""
    result: Tensor = _Summed.apply(x, group)  # type: ignore[no-untyped-call]
    return result


class _Part(nn.Module):
    """This rank's part of a linear layer.

    Args:
        whole: the layer.
        cut: of its weight.
        group: the tensor ranks.
    """

    def __init__(self, whole: nn.Linear, cut: Cut, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group = group
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        bias = whole.bias
        self.weight = nn.Parameter(cut.part(whole.weight.detach(), rank, size))
        self.bias = None
        if bias is not None:
            self.bias = nn.Parameter(
                cut.part(bias.detach(), rank, size) if cut.dim == 0 else bias.detach().clone()
            )


class ColumnLinear(_Part):
    """Some of a linear layer's outputs, from all of its inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(shared(x, self.group), self.weight, self.bias)


class RowLinear(_Part):
    """All of a linear layer's outputs, from some of its inputs on each rank."""

    def forward(self, x: Tensor) -> Tensor:
        y = summed(linear(x, self.weight), self.group)
        return y if self.bias is None else y + self.bias


class VocabularyEmbedding(Embedding):
    """The rows of some of the vocabulary's tokens; looks up any token."""

    def __init__(self, whole: Embedding, cut: Cut, group: dist.ProcessGroup) -> None:
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        part = cut.part(whole.weight.detach(), rank, size)
        rows, hidden = part.shape
        super().__init__(rows, hidden, gradient_shrink=whole.gradient_shrink, shrink_side=whole.shrink_side)
        self.weight = nn.Parameter(part)
        self.group, self.first = group, rank * rows

    def forward(self, tokens_BT: Tensor) -> Tensor:
        local_BT = tokens_BT - self.first
        elsewhere_BT = (local_BT < 0) | (local_BT >= self.weight.shape[0])
        own_BTC = super().forward(local_BT.masked_fill(elsewhere_BT, 0))
        return summed(own_BTC.masked_fill(elsewhere_BT[..., None], 0.0), self.group)


class HeadNorm(Norm):
    """A norm over a head's dimensions whose weights all heads share, hence all ranks."""

    def __init__(self, whole: Norm, group: dist.ProcessGroup) -> None:
        super().__init__(whole.normalized_shape[0], epsilon=whole.eps, bias=whole.bias is not None)
        self.load_state_dict(whole.state_dict())
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else shared(self.bias, self.group)
        return F.layer_norm(x, self.normalized_shape, shared(self.weight, self.group), bias, self.eps)


def cut_block(block: Block, group: dist.ProcessGroup) -> None:
    """Reduce a layer to what this rank computes: some heads, some of the inner width."""
    attention, feed = block.attention, block.feed_forward
    assert isinstance(feed, FeedForward)  # glm.parallel.topology refuses experts
    attention.heads //= dist.get_world_size(group)
    attention.key_heads //= dist.get_world_size(group)
    if attention.gate is not None:
        attention.gate = ColumnLinear(attention.gate, Cut(dim=0), group)  # type: ignore[assignment]
    if attention.sink_H is not None:
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        attention.sink_H = nn.Parameter(Cut(dim=0).part(attention.sink_H.detach(), rank, size))
    attention.query_key_value = ColumnLinear(attention.query_key_value, Cut(dim=0, blocks=3), group)  # type: ignore[assignment]
    attention.output = RowLinear(attention.output, Cut(dim=1), group)  # type: ignore[assignment]
    for name in ("query_norm", "key_norm", "value_norm"):
        norm = getattr(attention, name)
        if norm is not None:
            # glm.parallel.topology refuses other kinds of norms.
            assert isinstance(norm, Norm)
            setattr(attention, name, HeadNorm(norm, group))
    feed.up = ColumnLinear(feed.up, Cut(dim=0, blocks=2 if feed.is_gated else 1), group)  # type: ignore[assignment]
    feed.down = RowLinear(feed.down, Cut(dim=1), group)  # type: ignore[assignment]
