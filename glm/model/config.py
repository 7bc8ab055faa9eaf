"""The model's shape and levers. What an experiment can move is a field here; no experiment has a branch in the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from glm.errors import InputError

Norm = Literal["pre", "post", "sandwich", "deepnorm", "deepnet"]


def _positive(where: str, **values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise InputError(f"{where}.{name} must be positive, got {value}")


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig:
    """Token embedding.

    Attributes:
        gradient_shrink: EGS's alpha: the gradient into the embedding is multiplied by it; 1 is off.
        shrink_side: where: on the look-up ("input"), on the tied output projection ("output"), or both.
        norm: LayerNorm after the look-up (BLOOM).
        tied: input and output embedding are one matrix.
    """

    gradient_shrink: float = 1.0
    shrink_side: Literal["input", "output", "both"] = "input"
    norm: bool = False
    tied: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.gradient_shrink <= 1:
            raise InputError(
                f"model.embedding.gradient_shrink must lie in [0, 1], got {self.gradient_shrink}"
            )


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Attention.

    Attributes:
        positions: how order enters: rotary (1-D or 2-D), ALiBi, learned, or none.
        softmax: "fp32": layer-wise query-key scaling with an fp32 softmax (GLM-130B); "compute": scores and softmax in the
            compute format; "pb-relax": CogView's relaxation; "fused": scaled_dot_product_attention.
        relax: PB-Relax's divisor a.
        qk_norm: norm of each query and key head.
        soft_cap: scores become c tanh(score / c); 0 is off.
        rope_base: base of the rotary frequencies.
    """

    positions: Literal["rope", "rope2d", "alibi", "learned", "none"] = "rope"
    softmax: Literal["fp32", "compute", "pb-relax", "fused"] = "fp32"
    relax: float = 32.0
    qk_norm: bool = False
    soft_cap: float = 0.0
    rope_base: float = 10_000.0

    def __post_init__(self) -> None:
        _positive("model.attention", relax=self.relax, rope_base=self.rope_base)
        if self.soft_cap < 0:
            raise InputError(f"model.attention.soft_cap must be 0 (off) or positive, got {self.soft_cap}")
        if self.soft_cap and self.softmax == "fused":
            raise InputError(
                "model.attention.soft_cap needs the scores, which fused attention does not form: choose softmax fp32"
            )


@dataclass(frozen=True, kw_only=True)
class FeedForwardConfig:
    """Feed-forward layer.

    Attributes:
        kind: activation; the gated ones (geglu, swiglu) have two input projections in one matrix.
        inner: inner width; None: 8/3 of the hidden width for gated kinds, 4 times for the others, to a multiple of 32.
    """

    kind: Literal["geglu", "swiglu", "gelu", "relu"] = "geglu"
    inner: int | None = None

    def __post_init__(self) -> None:
        if self.inner is not None and self.inner < 1:
            raise InputError(f"model.feed_forward.inner must be at least 1, got {self.inner}")

    @property
    def is_gated(self) -> bool:
        return self.kind in ("geglu", "swiglu")

    def width(self, hidden: int) -> int:
        """The inner width for a hidden width."""
        if self.inner is not None:
            return self.inner
        exact = hidden * 8 / 3 if self.is_gated else hidden * 4.0
        return max(32, round(exact / 32) * 32)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A transformer.

    Attributes:
        vocabulary: tokens; None: taken from the data's tokenizer before building.
        length: row length T, and the number of positions.
        layers, hidden, heads: its shape.
        norm: where the norms stand.
        dropout: on the embedding output and both sublayers' outputs.
        z_loss: coefficient of log^2 Z added to the loss; 0 is off.
        init: "xavier" (with DeepNorm's gains where they apply), "gpt2" (0.02, outputs / sqrt(2L)), "small" (sqrt(2 / 5h)).
        bias: linear layers and norms have biases.
        parallel_block: attention and feed-forward read the same input (PaLM).
        recompute: recompute each layer's activations in the backward pass.
        norm_epsilon: of every LayerNorm.
    """

    vocabulary: int | None = None
    length: int = 256
    layers: int = 8
    hidden: int = 128
    heads: int = 4
    norm: Norm = "deepnorm"
    dropout: float = 0.0
    z_loss: float = 0.0
    init: Literal["xavier", "gpt2", "small"] = "xavier"
    bias: bool = True
    parallel_block: bool = False
    recompute: bool = False
    norm_epsilon: float = 1e-5
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    feed_forward: FeedForwardConfig = field(default_factory=FeedForwardConfig)

    def __post_init__(self) -> None:
        _positive(
            "model",
            length=self.length,
            layers=self.layers,
            hidden=self.hidden,
            heads=self.heads,
            norm_epsilon=self.norm_epsilon,
        )
        if self.hidden % self.heads:
            raise InputError(f"model.heads must divide model.hidden ({self.hidden}), got {self.heads}")
        rotary = {"rope": 2, "rope2d": 4}.get(self.attention.positions, 1)
        if (self.hidden // self.heads) % rotary:
            raise InputError(
                f"model.attention.positions {self.attention.positions} needs heads of a multiple of {rotary} dimensions, "
                f"got {self.hidden // self.heads}"
            )
        if self.vocabulary is not None and self.vocabulary < 2:
            raise InputError(f"model.vocabulary must be at least 2, got {self.vocabulary}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"model.dropout must lie in [0, 1), got {self.dropout}")
        if self.z_loss < 0:
            raise InputError(f"model.z_loss must be 0 (off) or positive, got {self.z_loss}")
        if self.parallel_block and self.norm != "pre":
            raise InputError(f"model.parallel_block goes with model.norm pre, not {self.norm}")

    @property
    def head(self) -> int:
        """Dimensions of a head."""
        return self.hidden // self.heads

    def parameters(self) -> int:
        """Number of parameters, from the formula (a test compares it with the built model)."""
        if self.vocabulary is None:
            raise InputError("model.vocabulary is not set: the count depends on it")
        h, inner, b = self.hidden, self.feed_forward.width(self.hidden), int(self.bias)
        up = inner * (2 if self.feed_forward.is_gated else 1)
        norm = h * (1 + b)
        layer = 4 * h * h + 4 * h * b + h * up + up * b + inner * h + h * b
        norms = {"sandwich": 4}.get(self.norm, 1 if self.parallel_block else 2)
        layer += norms * norm + (2 * self.head * (1 + b) if self.attention.qk_norm else 0)
        total = self.vocabulary * h * (1 if self.embedding.tied else 2) + self.layers * layer
        total += 0 if self.norm == "post" else norm
        total += norm if self.embedding.norm else 0
        return total + (self.length * h if self.attention.positions == "learned" else 0)
