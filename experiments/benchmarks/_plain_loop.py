"""The proxy's model as written by hand: torch.nn modules, fused attention and AdamW, no instrument.

GLM's shape (DeepNorm, RoPE, GeGLU, tied embedding) and its masks, over the same rows as ``glm train``; it projects all positions,
as ``F.cross_entropy`` wants them.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glm.commands.train import preset_config
from glm.data.loader import Loader
from glm.data.shards import open_data

BETAS, DECAY, CLIP, RATE, BASE = (0.9, 0.95), 0.1, 1.0, 1e-3, 1e4
LAYERS, HIDDEN, HEADS, LENGTH, ROWS, INNER = 4, 64, 4, 128, 8, 160


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.query_key_value, self.output = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, 2 * INNER), nn.Linear(INNER, HIDDEN)

    def forward(self, x_BTC: Tensor, mask_B1TT: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        def turned(z: Tensor) -> Tensor:
            a, b = z.chunk(2, -1)
            return z * cosine + torch.cat((-b, a), -1) * sine

        B, T, _ = x_BTC.shape
        alpha = math.sqrt(2 * LAYERS)
        a = self.attention_norm(x_BTC)
        q, k, v = self.query_key_value(a).view(B, T, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(turned(q), turned(k), v, attn_mask=mask_B1TT)
        x = alpha * a + self.output(mixed.transpose(1, 2).flatten(2))
        b = self.feed_forward_norm(x)
        linear, gate = self.up(b).chunk(2, -1)
        result: Tensor = alpha * b + self.down(linear * F.gelu(gate))
        return result


class Plain(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, HIDDEN)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, tokens_BT: Tensor, place_BT: Tensor, mask_B1TT: Tensor) -> Tensor:
        width = HIDDEN // HEADS
        angle = place_BT[:, None, :, None] * BASE ** (-torch.arange(0, width, 2) / width)
        angle = torch.cat((angle, angle), -1)
        x_BTC = self.embedding(tokens_BT)
        for layer in self.layers:
            x_BTC = layer(x_BTC, mask_B1TT, angle.cos(), angle.sin())
        return F.linear(self.norm(x_BTC), self.embedding.weight)


def plain_run(data: Path, steps: int) -> float:
    """Train; returns the last loss."""
    torch.set_num_threads(1)
    opened = open_data(data)
    config = preset_config("glm-tiny")
    loader = Loader(opened, config.objective, config.sampling, length=LENGTH, seed=0)
    model = Plain(opened.vocabulary)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=BETAS, weight_decay=DECAY, fused=True)
    before_TT = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    last = math.nan
    for step in range(steps):
        batch = loader.samples(range(ROWS * step, ROWS * step + ROWS))
        segments = batch.segments_BT
        mask = (segments[:, :, None] == segments[:, None]) & (before_TT | batch.context_BT[:, None])
        place_BT = batch.positions if batch.positions.dim() == 2 else batch.positions[..., 0]
        logits = model(batch.tokens_BT, place_BT, mask[:, None])
        loss = F.cross_entropy(
            logits.flatten(0, 1), batch.targets_BT.flatten().clamp_min(-1), ignore_index=-1
        )
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        last = float(loss.detach())
    return last
