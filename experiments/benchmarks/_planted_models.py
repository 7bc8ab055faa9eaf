"""Models for the benchmark of forensics, in the manner of other people's code.

    GPT              pre-norm, LayerNorm, GELU, separate projections
    Mixture          RMSNorm, SwiGLU, grouped queries, four experts of which a router takes two, blocks in a ModuleList of experts
    EncoderDecoder   an encoder that sees both ways, a decoder with cross-attention, one table for both

They train on ``mean_loss`` of tokens [B, T + 1]; all register modules in another order than that of execution. ``parts`` names for
each the modules of the roles on which plants act: in the second block (the decoder's, the first expert's).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, cast

from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention, silu

VOCABULARY, WIDTH, HEADS, LAYERS, LENGTH = 64, 32, 4, 4, 32


class Attention(nn.Module):
    """From x to ``context``, by default itself; may have fewer key heads than query heads."""

    def __init__(self, *, key_heads: int = HEADS, bias: bool = True, causal: bool = True) -> None:
        super().__init__()
        kept = WIDTH * key_heads // HEADS
        self.query, self.key = nn.Linear(WIDTH, WIDTH, bias=bias), nn.Linear(WIDTH, kept, bias=bias)
        self.value, self.output = nn.Linear(WIDTH, kept, bias=bias), nn.Linear(WIDTH, WIDTH, bias=bias)
        self.key_heads, self.causal = key_heads, causal

    def forward(self, x_BTD: Tensor, context_BSD: Tensor | None = None) -> Tensor:
        B, T, D = x_BTD.shape
        other = x_BTD if context_BSD is None else context_BSD
        q_BHTC = self.query(x_BTD).view(B, T, HEADS, -1).transpose(1, 2)
        k_BHSC, v_BHSC = (
            layer(other).view(B, other.shape[1], self.key_heads, -1).transpose(1, 2)
            for layer in (self.key, self.value)
        )
        y_BHTC = scaled_dot_product_attention(
            q_BHTC, k_BHSC, v_BHSC, is_causal=self.causal, enable_gqa=self.key_heads != HEADS
        )
        return self.output(y_BHTC.transpose(1, 2).reshape(B, T, D))  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self, *, causal: bool = True, cross: bool = False) -> None:
        super().__init__()
        self.ln1, self.attn, self.ln2 = nn.LayerNorm(WIDTH), Attention(causal=causal), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        if cross:
            self.ln3, self.cross = nn.LayerNorm(WIDTH), Attention(causal=False)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.ln1(x))
        if context is not None:
            x = x + self.cross(self.ln3(x), context)
        return x + self.down(gelu(self.up(self.ln2(x))))  # type: ignore[no-any-return]


class GPT(nn.Module):
    parts: ClassVar[Mapping[str, str]] = {
        **{role: f"blocks.1.attn.{role}" for role in ("query", "value", "output")},
        "attention_norm": "blocks.1.ln1",
        "up": "blocks.1.up",
        "down": "blocks.1.down",
        "embedding": "embed",
        "head": "head",
    }

    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        self.head, self.norm = nn.Linear(WIDTH, VOCABULARY, bias=False), nn.LayerNorm(WIDTH)
        self.embed, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x = self.embed(tokens_BT) + self.positions.weight[: tokens_BT.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False), nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


class MixtureBlock(nn.Module):
    """Every expert sees every token, weighted by the two largest of the router's shares: small enough for that."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert() for _ in range(4))
        self.router = nn.Linear(WIDTH, 4, bias=False)
        self.norm2, self.norm1 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.self_attn = Attention(key_heads=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.norm1(x))
        y = self.norm2(x)
        share, which = self.router(y).softmax(-1).topk(2, dim=-1)
        for number, expert in enumerate(self.experts):
            chosen = (which == number).any(-1)
            weight = (share * (which == number)).sum(-1)[chosen]
            x = x.index_put(
                chosen.nonzero(as_tuple=True), expert(y[chosen]) * weight[:, None], accumulate=True
            )
        return x


class Mixture(nn.Module):
    parts: ClassVar[Mapping[str, str]] = {
        **{role: f"model.layers.1.self_attn.{role}" for role in ("query", "value", "output")},
        "attention_norm": "model.layers.1.norm1",
        "up": "model.layers.1.experts.0.up",
        "down": "model.layers.1.experts.0.down",
        "embedding": "model.embed_tokens",
        "head": "lm_head",
    }

    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.model = nn.ModuleDict(
            {
                "layers": nn.ModuleList(MixtureBlock() for _ in range(LAYERS)),
                "norm": nn.RMSNorm(WIDTH),
                "embed_tokens": nn.Embedding(VOCABULARY, WIDTH),
            }
        )

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x = self.model["embed_tokens"](tokens_BT)
        for layer in cast(nn.ModuleList, self.model["layers"]):
            x = layer(x)
        return self.lm_head(self.model["norm"](x))  # type: ignore[no-any-return]


class EncoderDecoder(nn.Module):
    """Reads the first half of a row, and writes the second."""

    parts: ClassVar[Mapping[str, str]] = {
        **{role: f"decoder.1.cross.{role}" for role in ("query", "value", "output")},
        "attention_norm": "decoder.1.ln1",
        "up": "decoder.1.up",
        "down": "decoder.1.down",
        "embedding": "shared",
        "head": "head",
    }

    def __init__(self) -> None:
        super().__init__()
        self.head, self.norm = nn.Linear(WIDTH, VOCABULARY, bias=False), nn.LayerNorm(WIDTH)
        self.decoder = nn.ModuleList(Block(cross=True) for _ in range(3))
        self.encoder = nn.ModuleList(Block(causal=False) for _ in range(3))
        self.shared, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)

    def forward(self, read_BS: Tensor, written_BT: Tensor) -> Tensor:
        context = self.shared(read_BS) + self.positions.weight[: read_BS.shape[1]]
        for block in self.encoder:
            context = block(context)
        x = self.shared(written_BT) + self.positions.weight[: written_BT.shape[1]]
        for block in self.decoder:
            x = block(x, context)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


MODELS: Mapping[str, type[GPT | Mixture | EncoderDecoder]] = {
    "plain": GPT,
    "mixture": Mixture,
    "encoder-decoder": EncoderDecoder,
}


def mean_loss(model: nn.Module, tokens_BT: Tensor) -> Tensor:
    """Mean loss of the next tokens of a row [B, T + 1]; for an encoder-decoder of those in its second half."""
    half = tokens_BT.shape[1] // 2 if isinstance(model, EncoderDecoder) else 0
    read, written = tokens_BT[:, :half], tokens_BT[:, half:]
    logits = model(read, written[:, :-1]) if half else model(written[:, :-1])
    return cross_entropy(logits.flatten(0, 1), written[:, 1:].flatten())
