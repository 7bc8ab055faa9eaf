"""The model's shape and levers. What an experiment can move is a field here; no experiment has a branch in the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from glm.errors import InputError

NormPlacement = Literal[
    "pre", "post", "sandwich", "deepnorm", "deepnet", "reordered", "pre-scaled", "sandwich-scaled"
]
NormKind = Literal["layer", "rms", "rms-plain", "rms-single", "rms-centred", "dyt"]


def _positive(where: str, **values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise InputError(f"{where}.{name} must be positive, got {value}")


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig:
    """Token embedding.

    Attributes:
        gradient_shrink: EGS's alpha, a factor on the gradient into the embedding; 1 is off.
        shrink_side: which gradient to shrink: the look-up's ("input"), the tied output projection's ("output"), or both.
        norm: norm after the look-up (BLOOM).
        tied: input and output embedding are one matrix.
        scale: factor on the looked-up vectors: "none" (1), or "sqrt", the root of the hidden width (Spike No More).
        std: standard deviation of the initial embedding; None: that of `model.init`.
    """

    gradient_shrink: float = 1.0
    shrink_side: Literal["input", "output", "both"] = "input"
    norm: bool = False
    tied: bool = True
    scale: Literal["none", "sqrt"] = "none"
    std: float | None = None

    def __post_init__(self) -> None:
        if self.std is not None:
            _positive("model.embedding", std=self.std)
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
        v_norm: norm of each value head as well (QKV-norm).
        soft_cap: scores become c tanh(score / c); 0 is off.
        clip_qkv: clamp queries, keys and values to plus and minus this; 0 is off.
        qk_clip: after an update in which a head's largest score exceeded this, scale its query and key weights down to it; 0: off.
        gate: a sigmoid of the layer's input on each head's output, or on each of its elements.
        sink: one more logit in the softmax's sum, without a value: 0 ("off-by-one"), or learned for each head.
        key_heads: heads of the keys and values, each shared by as many query heads; None: every query head has its own.
        rope_base: base of the rotary frequencies.
    """

    positions: Literal["rope", "rope2d", "alibi", "learned", "none"] = "rope"
    softmax: Literal["fp32", "compute", "pb-relax", "fused"] = "fp32"
    relax: float = 32.0
    qk_norm: bool = False
    v_norm: bool = False
    soft_cap: float = 0.0
    clip_qkv: float = 0.0
    qk_clip: float = 0.0
    gate: Literal["none", "head", "element"] = "none"
    sink: Literal["none", "off-by-one", "learned"] = "none"
    key_heads: int | None = None
    rope_base: float = 10_000.0

    def __post_init__(self) -> None:
        _positive("model.attention", relax=self.relax, rope_base=self.rope_base)
        if self.clip_qkv < 0 or self.qk_clip < 0:
            raise InputError(
                "model.attention.clip_qkv and model.attention.qk_clip must be 0 (off) or positive"
            )
        for lever, is_on in (("qk_clip", self.qk_clip > 0), ("sink", self.sink != "none")):
            if is_on and self.softmax == "fused":
                raise InputError(
                    f"model.attention.{lever} needs the scores, which fused attention does not form: choose softmax fp32"
                )
        if self.qk_clip and (self.qk_norm or self.soft_cap):
            raise InputError(
                "model.attention.qk_clip scales weights whose size qk_norm and soft_cap take out of the scores: choose one"
            )
        if self.soft_cap < 0:
            raise InputError(f"model.attention.soft_cap must be 0 (off) or positive, got {self.soft_cap}")
        if self.soft_cap and self.softmax == "fused":
            raise InputError(
                "model.attention.soft_cap needs the scores, which fused attention does not form: choose softmax fp32"
            )


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """A mixture of experts in place of each feed-forward layer.

    Attributes:
        count: experts in a layer; 0: one feed-forward layer without a router.
        active: experts that a token passes through.
        shared: width, in experts, of a further one that every token passes through; 0: none.
        balance: coefficient of the load-balance loss.
        router_z: coefficient of the router's z-loss.
        bias_rate: step of the bias that evens the load without a loss; 0 is off.
        capacity: most tokens that an expert takes, in multiples of an even load; it drops the rest. 0: no limit.
    """

    count: int = 0
    active: int = 2
    shared: int = 0
    balance: float = 0.01
    router_z: float = 0.0
    bias_rate: float = 0.0
    capacity: float = 0.0

    def __post_init__(self) -> None:
        if self.count < 0 or self.shared < 0:
            raise InputError("model.feed_forward.experts.count and shared must be 0 (none) or positive")
        if self.count and not 1 <= self.active <= self.count:
            raise InputError(
                f"model.feed_forward.experts.active must lie between 1 and the count of {self.count}, got {self.active}"
            )
        if min(self.balance, self.router_z, self.bias_rate, self.capacity) < 0:
            raise InputError(
                "model.feed_forward.experts.balance, router_z, bias_rate and capacity must be 0 (off) or positive"
            )


@dataclass(frozen=True, kw_only=True)
class FeedForwardConfig:
    """Feed-forward layer.

    Attributes:
        kind: activation; the gated ones (geglu, swiglu) have two input projections in one matrix.
        inner: inner width; None: 8/3 of the hidden width for gated kinds, 4 times for the others, rounded to a multiple of 32.
        clamp: for gated kinds: clamp the gate from above to this, and the other half to plus and minus this; 0 is off.
        experts: a mixture of several such layers, of which each token passes through some.
    """

    kind: Literal["geglu", "swiglu", "gelu", "relu", "squared-relu"] = "geglu"
    inner: int | None = None
    clamp: float = 0.0
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)

    def __post_init__(self) -> None:
        if self.clamp < 0:
            raise InputError(f"model.feed_forward.clamp must be 0 (off) or positive, got {self.clamp}")
        if self.clamp and not self.is_gated:
            raise InputError(f"model.feed_forward.clamp is for geglu and swiglu, not {self.kind}")
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
class ScalingConfig:
    """How learning rate and initial weights follow the model's size (`glm.model.scaling`).

    Attributes:
        kind: "standard": not at all; "mup": by width; "complete-p": by width and depth.
        base_hidden: hidden width at which nothing changes.
        base_layers: number of layers at which nothing changes.
    """

    kind: Literal["standard", "mup", "complete-p"] = "standard"
    base_hidden: int = 128
    base_layers: int = 8

    def __post_init__(self) -> None:
        _positive("model.scaling", base_hidden=self.base_hidden, base_layers=self.base_layers)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A transformer.

    Attributes:
        vocabulary: number of tokens; None: the data's tokenizer decides.
        length: row length T, and the number of positions.
        layers: number of transformer layers.
        hidden: hidden width.
        heads: attention heads of a layer.
        norm: where the norms stand.
        norm_kind: what they are: LayerNorm, RMSNorm (with gains, none, a single one, or 1 + g), or DyT.
        dropout: probability, on the embedding output and both sublayers' outputs.
        z_loss: coefficient of log^2 Z added to the loss; 0 is off.
        logit_cap: logits become c tanh(logit / c); 0 is off.
        init: "xavier" (with DeepNorm's gains where they apply), "gpt2" (0.02, outputs / sqrt(2L)), "small" (sqrt(2 / 5h)),
            "fan-in" (1 / sqrt(inputs)).
        spectral: make the spectral norm of each linear layer in a block a parameter (sigma-reparametrization).
        bias: give linear layers and norms biases.
        parallel_block: let attention and feed-forward read the same input (PaLM).
        recompute: recompute each layer's activations in the backward pass.
        norm_epsilon: epsilon of every norm.
    """

    vocabulary: int | None = None
    length: int = 256
    layers: int = 8
    hidden: int = 128
    heads: int = 4
    norm: NormPlacement = "deepnorm"
    norm_kind: NormKind = "layer"
    dropout: float = 0.0
    z_loss: float = 0.0
    logit_cap: float = 0.0
    init: Literal["xavier", "gpt2", "small", "fan-in"] = "xavier"
    spectral: bool = False
    bias: bool = True
    parallel_block: bool = False
    recompute: bool = False
    norm_epsilon: float = 1e-5
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    feed_forward: FeedForwardConfig = field(default_factory=FeedForwardConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)

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
        if self.z_loss < 0 or self.logit_cap < 0:
            raise InputError("model.z_loss and model.logit_cap must be 0 (off) or positive")
        if self.spectral and self.feed_forward.experts.count:
            raise InputError(
                "model.spectral is for linear layers, which experts are not: leave one of them out"
            )
        groups = self.attention.key_heads
        if groups is not None and (groups < 1 or self.heads % groups):
            raise InputError(
                f"model.attention.key_heads must divide model.heads ({self.heads}), got {groups}"
            )
        if self.norm == "sandwich-scaled" and self.norm_kind == "rms-plain":
            raise InputError(
                "model.norm sandwich-scaled sets gains, which norm_kind rms-plain lacks: choose rms"
            )
        if self.scaling.kind != "standard" and (
            self.norm not in ("pre", "reordered") or self.init == "small"
        ):
            raise InputError(
                f"model.scaling {self.scaling.kind} is for model.norm pre or reordered and init gpt2, fan-in or xavier, not "
                f"{self.norm} and {self.init}"
            )
        if self.parallel_block and self.norm != "pre":
            raise InputError(f"model.parallel_block goes with model.norm pre, not {self.norm}")

    @property
    def head(self) -> int:
        """Dimensions of a head."""
        return self.hidden // self.heads

    @property
    def key_heads(self) -> int:
        """Heads of the keys, and of the values."""
        return self.attention.key_heads or self.heads

    @property
    def norms_per_layer(self) -> int:
        """Norms of a layer over the hidden width."""
        if self.norm in ("sandwich", "sandwich-scaled"):
            return 4
        return 1 if self.parallel_block else 2

    def norm_parameters(self, width: int) -> int:
        """Parameters of a norm over ``width`` channels."""
        affine = width * (1 + int(self.bias))
        sizes = {"layer": affine, "dyt": 1 + affine, "rms-plain": 0, "rms-single": 1}
        return sizes.get(self.norm_kind, width)

    def parameters(self) -> int:
        """Number of parameters, from the formula (a test compares it with the built model)."""
        if self.vocabulary is None:
            raise InputError("model.vocabulary is not set: the count depends on it")
        h, inner, b = self.hidden, self.feed_forward.width(self.hidden), int(self.bias)
        own, up = self.attention, inner * (2 if self.feed_forward.is_gated else 1)
        qkv = (self.heads + 2 * self.key_heads) * self.head
        gate = {"none": 0, "head": self.heads, "element": h}[own.gate]
        layer = h * (qkv + h + gate) + b * (qkv + h + gate)
        experts = self.feed_forward.experts
        if experts.count:
            layer += experts.count * h * (up + inner + 1)
            layer += experts.shared * (h * (up + inner) + b * up) + (b * h if experts.shared else 0)
        else:
            layer += h * (up + inner) + b * (up + h)
        layer += self.norms_per_layer * self.norm_parameters(h)
        layer += (2 * int(own.qk_norm) + int(own.v_norm)) * self.norm_parameters(self.head)
        layer += (self.heads if own.sink == "learned" else 0) + (4 if self.spectral else 0)
        total = self.vocabulary * h * (1 if self.embedding.tied else 2) + self.layers * layer
        total += 0 if self.norm == "post" else self.norm_parameters(h)
        total += self.norm_parameters(h) if self.embedding.norm else 0
        return total + (self.length * h if own.positions == "learned" else 0)
