"""A small GPT to watch: pre-norm blocks, causal attention through scaled_dot_product_attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, scaled_dot_product_attention


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.heads, self.dropout = heads, dropout

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        q, k, v = self.query_key_value(x_BTD).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        p = self.dropout if self.training else 0.0
        y = scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
        return self.output(y.transpose(1, 2).reshape(B, T, D))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attention(self.attention_norm(x)))
        return x + self.drop(self.feed_forward(self.feed_forward_norm(x)))


class GPT(nn.Module):
    """Tokens [B, T] to logits [B, T, V], the embedding tied to the output."""

    def __init__(self, layers: int = 2, width: int = 32, heads: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, width)
        self.layers = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.final_norm = nn.LayerNorm(width)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x = self.embedding(tokens_BT)
        for layer in self.layers:
            x = layer(x)
        return linear(self.final_norm(x), self.embedding.weight)


def next_token_loss(model: nn.Module, tokens_BT: Tensor) -> Tensor:
    logits = model(tokens_BT[:, :-1])
    return cross_entropy(logits.flatten(0, 1), tokens_BT[:, 1:].flatten())


def batch(step: int) -> Tensor:
    return torch.randint(64, (3, 17), generator=torch.Generator().manual_seed(step))
