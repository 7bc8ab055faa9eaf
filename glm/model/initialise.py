"""Initial weights. h hidden width, L layers; biases are 0, norms 1.

    xavier   std = gain sqrt(2 / (fan_in + fan_out)) per projection; q, k, v and the two halves of a gated input count as
             matrices of their own. Gain 1, but with DeepNorm beta = (2L)^-1/2 (GLM-130B), with DeepNet beta = (8L)^-1/4 (DeepNet)
             on v, the attention output and both feed-forward matrices. Embedding 0.02.
    gpt2     std 0.02; the two output projections of a layer 0.02 / sqrt(2L)                  (GPT-2)
    small    std sqrt(2 / (5h)); output projections / sqrt(2L); also the embedding   (Nguyen and Salazar, 1910.05895)

Each tensor is drawn in fp32 from a generator of its own, a function of (seed, the tensor's name in the model): models that have
a tensor of the same name and shape share it, whatever else differs (tied or not, the feed-forward's kind, how positions enter, how
many layers there are, where the norms stand; a gain scales the same draw), and a rank draws only what it holds. It is the same in
every precision and under any sharding, since fans are those of the whole matrix.

Limits: CPU generators take 32 bits of a seed; of a thousand tensors two are alike once in ten thousand models.
"""

from __future__ import annotations

import hashlib
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


def generator_of(seed: int, name: str) -> torch.Generator:
    """What draws the tensor of this name."""
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


@torch.no_grad()
def initialise_block(block: Block, config: ModelConfig, seed: int, name: str) -> None:
    """Draw the linear layers of a block, which the model knows by ``name``."""
    attention, feed = block.attention, block.feed_forward
    beta = deep_gain(config)
    # The gains of the matrices that a layer's weight is made of.
    for path, linear, gains in (
        ("attention.query_key_value", attention.query_key_value, (1.0, 1.0, beta)),
        ("attention.output", attention.output, (beta,)),
        ("feed_forward.up", feed.up, (beta, beta) if feed.is_gated else (beta,)),
        ("feed_forward.down", feed.down, (beta,)),
    ):
        generator = generator_of(seed, f"{name}.{path}.weight")
        leads_out = linear in (attention.output, feed.down)
        for weight, gain in zip(linear.weight.chunk(len(gains)), gains, strict=True):
            if config.init == "xavier":
                std = gain * math.sqrt(2 / sum(weight.shape))
            else:
                std = hidden_std(config) / (math.sqrt(2 * config.layers) if leads_out else 1.0)
            nn.init.normal_(weight, std=std, generator=generator)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)


@torch.no_grad()
def initialise_embedding(weight: Tensor, config: ModelConfig, seed: int, name: str) -> None:
    """Draw an embedding, output projection or table of positions, which the model knows by ``name``."""
    std = hidden_std(config) if config.init == "small" else EMBEDDING
    nn.init.normal_(weight, std=std, generator=generator_of(seed, name))


def hidden_std(config: ModelConfig) -> float:
    """Standard deviation of the plain schemes."""
    return math.sqrt(2 / (5 * config.hidden)) if config.init == "small" else 0.02
