"""Initial weights. h hidden width, L layers; biases are 0, norms 1.

    xavier   std = gain sqrt(2 / (fan_in + fan_out)) per projection; q, k, v and the two halves of a gated input count as
             matrices of their own. Gain 1, but with DeepNorm beta = (2L)^-1/2 (GLM-130B), with DeepNet beta = (8L)^-1/4 (DeepNet)
             on v, the attention output and both feed-forward matrices. Embedding 0.02.
    gpt2     std 0.02; the two output projections of a layer 0.02 / sqrt(2L)                  (GPT-2)
    small    std sqrt(2 / (5h)); output projections / sqrt(2L); also the embedding   (Nguyen and Salazar, 1910.05895)
    fan-in   std 1 / sqrt(fan_in); embedding 0.02                                    (LeCun et al., 1998)

The embedding's own deviation may be given; under muP gpt2's falls with the width (``glm.model.scaling``). An attention gate gets
the draw of other matrices, learned sinks are 0, the output norms of a depth-scaled sandwich have gains of 1 / sqrt(L).

Each tensor has its own generator, a function of (seed, the tensor's name in the model), which draws it in fp32. So models with a
tensor of the same name and shape share it, whatever else differs (tied or not, the feed-forward's kind, how positions enter, how
many layers there are, where the norms are; a gain scales the same draw), and a rank draws only what it holds. It is the same in
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
from glm.model.experts import Experts
from glm.model.feed_forward import FeedForward
from glm.model.scaling import width_ratio
from glm.model.spectral import SpectralLinear

EMBEDDING = 0.02


def deep_gain(config: ModelConfig) -> float:
    """beta: the gain on v, the attention output and the feed-forward matrices."""
    if config.norm == "deepnorm":
        return float((2 * config.layers) ** -0.5)
    return float((8 * config.layers) ** -0.25) if config.norm == "deepnet" else 1.0


def generator_of(seed: int, name: str) -> torch.Generator:
    """The generator that draws the tensor of this name."""
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


@torch.no_grad()
def initialise_block(block: Block, config: ModelConfig, seed: int, name: str) -> None:
    """Draw the linear layers of a block, which the model knows by ``name``."""
    attention = block.attention
    beta = deep_gain(config)
    queries, keys = config.heads * config.head, config.key_heads * config.head
    # Rows and gains of the matrices that make up a layer's weight.
    parts = [
        ("attention.query_key_value", attention.query_key_value, ((queries, 1.0), (keys, 1.0), (keys, beta))),
        ("attention.output", attention.output, ((config.hidden, beta),)),
    ]
    feed = block.feed_forward
    if isinstance(feed, Experts):
        parts.append(("feed_forward.router", feed.router, ((feed.count, 1.0),)))
        _initialise_experts(feed, config, seed, f"{name}.feed_forward")
    for path, one in _feed_forwards(feed):
        inner = one.down.weight.shape[1]
        parts.append((f"{path}.up", one.up, ((inner, beta),) * (2 if one.is_gated else 1)))
        parts.append((f"{path}.down", one.down, ((config.hidden, beta),)))
    if attention.gate is not None:
        parts.append(("attention.gate", attention.gate, ((attention.gate.weight.shape[0], 1.0),)))
    for path, linear, matrices in parts:
        generator = generator_of(seed, f"{name}.{path}.weight")
        leads_out = path.endswith((".output", ".down"))
        pieces = torch.split(linear.weight, [rows for rows, _ in matrices])
        for weight, (_, gain) in zip(pieces, matrices, strict=True):
            nn.init.normal_(weight, std=_std(weight, config, gain, leads_out), generator=generator)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
        if isinstance(linear, SpectralLinear):
            linear.begin()
    if attention.sink_H is not None:
        nn.init.zeros_(attention.sink_H)
    if config.norm == "sandwich-scaled":
        for norm in (block.attention_output_norm, block.feed_forward_output_norm):
            assert norm is not None
            norm.set_gain(config.layers**-0.5)


def _feed_forwards(feed: FeedForward | Experts) -> list[tuple[str, FeedForward]]:
    """The dense layers of a feed-forward, by their paths in the block."""
    if isinstance(feed, FeedForward):
        return [("feed_forward", feed)]
    return [] if feed.shared is None else [("feed_forward.shared", feed.shared)]


def _initialise_experts(experts: Experts, config: ModelConfig, seed: int, name: str) -> None:
    """Draw all experts' matrices as those of a dense layer of an expert's width."""
    beta, inner = deep_gain(config), experts.down.shape[-1]
    for kind, weight, rows in (("up", experts.up, inner), ("down", experts.down, config.hidden)):
        generator = generator_of(seed, f"{name}.{kind}")
        for piece in torch.split(weight, rows, dim=1):
            std = _std(piece[0], config, beta, kind == "down")
            nn.init.normal_(piece, std=std, generator=generator)
    if experts.bias_E is not None:
        nn.init.zeros_(experts.bias_E)


def _std(weight: Tensor, config: ModelConfig, gain: float, leads_out: bool) -> float:
    """The deviation of one matrix of a layer."""
    if config.init == "xavier":
        return gain * math.sqrt(2 / sum(weight.shape))
    plain = weight.shape[1] ** -0.5 if config.init == "fan-in" else hidden_std(config)
    return plain / (math.sqrt(2 * config.layers) if leads_out else 1.0)


@torch.no_grad()
def initialise_embedding(weight: Tensor, config: ModelConfig, seed: int, name: str) -> None:
    """Draw an embedding, output projection or table of positions, which the model knows by ``name``."""
    std = config.embedding.std if name == "embedding.weight" else None
    if std is None:
        std = hidden_std(config) if config.init == "small" else EMBEDDING
    nn.init.normal_(weight, std=std, generator=generator_of(seed, name))


def hidden_std(config: ModelConfig) -> float:
    """Standard deviation of the plain schemes."""
    return (
        math.sqrt(2 / (5 * config.hidden)) if config.init == "small" else 0.02 * width_ratio(config) ** -0.5
    )
