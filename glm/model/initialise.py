"""Initial weights. h hidden width, L layers; biases are 0, norms 1.

    xavier   std = gain sqrt(2 / (fan_in + fan_out)) per projection; q, k, v and the two halves of a gated input count as
             matrices of their own. Gain 1, but with DeepNorm beta = (2L)^-1/2 (GLM-130B), with DeepNet beta = (8L)^-1/4 (DeepNet)
             on v, the attention output and both feed-forward matrices. Embedding 0.02.
    gpt2     std 0.02; the two output projections of a layer 0.02 / sqrt(2L)                  (GPT-2)
    small    std sqrt(2 / (5h)); output projections / sqrt(2L); also the embedding   (Nguyen and Salazar, 1910.05895)

All draws are in fp32 in a fixed order, from torch's generator: the same seed gives the same weights in every precision, and
under any sharding, since fans are those of the whole matrix.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from glm.model.block import Block
from glm.model.config import ModelConfig

EMBEDDING = 0.02


def deep_gain(config: ModelConfig) -> float:
    """beta: the gain on v, the attention output and the feed-forward matrices."""
    if config.norm == "deepnorm":
        return float((2 * config.layers) ** -0.5)
    return float((8 * config.layers) ** -0.25) if config.norm == "deepnet" else 1.0


@torch.no_grad()
def initialise_block(block: Block, config: ModelConfig) -> None:
    """Draw the linear layers of a block."""
    attention, feed = block.attention, block.feed_forward
    q, k, v = attention.query_key_value.weight.chunk(3)
    ups = feed.up.weight.chunk(2) if feed.is_gated else (feed.up.weight,)
    for linear in (attention.query_key_value, attention.output, feed.up, feed.down):
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
    if config.init == "xavier":
        beta = deep_gain(config)
        for weight, gain in ((q, 1.0), (k, 1.0), (v, beta), (attention.output.weight, beta)):
            _xavier(weight, gain)
        for weight in (*ups, feed.down.weight):
            _xavier(weight, beta)
        return
    std = hidden_std(config)
    for weight in (q, k, v, *ups):
        nn.init.normal_(weight, std=std)
    for weight in (attention.output.weight, feed.down.weight):
        nn.init.normal_(weight, std=std / math.sqrt(2 * config.layers))


@torch.no_grad()
def initialise_embedding(weight: Tensor, config: ModelConfig) -> None:
    """Draw an embedding, output projection or table of positions."""
    nn.init.normal_(weight, std=hidden_std(config) if config.init == "small" else EMBEDDING)


def hidden_std(config: ModelConfig) -> float:
    """Standard deviation of the plain schemes."""
    return math.sqrt(2 / (5 * config.hidden)) if config.init == "small" else 0.02


def _xavier(weight: Tensor, gain: float) -> None:
    nn.init.normal_(weight, std=gain * math.sqrt(2 / sum(weight.shape)))
