"""Shapes by name: GLM at several sizes, and the systems that GLM-130B is compared with, at a size that trains here.

A preset is a model, and the objective and optimizer it trains with; ``glm train NAME`` composes it with everything else. The
``-like`` ones have a system's recipe, not its size, and of its parts those that are levers here: Qwen3-Next's linear attention,
gpt-oss's windows and GLM-5's latent and sparse attention are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from glm.model.config import (
    AttentionConfig,
    EmbeddingConfig,
    ExpertsConfig,
    FeedForwardConfig,
    ModelConfig,
)
from glm.train.update_rules.config import MuonConfig, OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class ModelPreset:
    """A named model.

    Attributes:
        summary: one line for help.
        model: its shape and levers.
        objective: kind of ``ObjectiveConfig``.
        optimizer: what updates it.
    """

    summary: str
    model: ModelConfig
    objective: Literal["glm", "causal", "span-corruption"] = "glm"
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)


def glm(
    layers: int,
    hidden: int,
    heads: int,
    length: int,
    *,
    vocabulary: int | None = None,
    inner: int | None = None,
) -> ModelConfig:
    """GLM-130B's architecture at another size: DeepNorm, RoPE, GeGLU, tied embeddings, fp32 softmax."""
    return ModelConfig(
        vocabulary=vocabulary,
        layers=layers,
        hidden=hidden,
        heads=heads,
        length=length,
        feed_forward=FeedForwardConfig(kind="geglu", inner=inner),
    )


# The compared systems at glm-tiny's size: what differs between them is the recipe.
_TINY = ModelConfig(layers=8, hidden=128, heads=4, length=256)
# What those of 2025 and 2026 have in common.
_RECENT = replace(
    _TINY, norm="pre", norm_kind="rms", init="gpt2", bias=False, embedding=EmbeddingConfig(tied=False)
)

PRESETS: Mapping[str, ModelPreset] = {
    "glm-proxy": ModelPreset(
        summary="GLM, 4 layers of 64: seconds a run, for hundreds of runs", model=glm(4, 64, 4, 128)
    ),
    "glm-proxy-2": ModelPreset(
        summary="GLM, 6 layers of 96: the proxy one size up", model=glm(6, 96, 6, 128)
    ),
    "glm-proxy-3": ModelPreset(summary="GLM, 8 layers of 128: two sizes up", model=glm(8, 128, 8, 128)),
    "glm-tiny": ModelPreset(summary="GLM, 8 layers of 128: minutes on a laptop", model=glm(8, 128, 4, 256)),
    "glm-small": ModelPreset(
        summary="GLM, 12 layers of 384: an evening on a CPU", model=glm(12, 384, 6, 512)
    ),
    "glm-medium": ModelPreset(summary="GLM, 12 layers of 768: about 110M", model=glm(12, 768, 12, 512)),
    "glm-1b": ModelPreset(summary="GLM, 24 layers of 2048: about 1B", model=glm(24, 2048, 16, 1024)),
    "glm-10b": ModelPreset(summary="GLM, 48 layers of 4096: about 10B", model=glm(48, 4096, 64, 1024)),
    "glm-130b": ModelPreset(
        summary="GLM-130B: 70 layers of 12288",
        model=glm(70, 12288, 96, 2048, vocabulary=150_528, inner=32_768),
    ),
    "gpt3-like": ModelPreset(
        summary="GPT-3's recipe: learned positions, pre-LN, GELU, next token",
        model=replace(
            _TINY,
            norm="pre",
            init="gpt2",
            attention=AttentionConfig(positions="learned"),
            feed_forward=FeedForwardConfig(kind="gelu"),
        ),
        objective="causal",
    ),
    "opt-like": ModelPreset(
        summary="OPT's recipe: as GPT-3 with ReLU",
        model=replace(
            _TINY,
            norm="pre",
            init="gpt2",
            attention=AttentionConfig(positions="learned"),
            feed_forward=FeedForwardConfig(kind="relu"),
        ),
        objective="causal",
    ),
    "palm-like": ModelPreset(
        summary="PaLM's recipe: parallel block, SwiGLU, RoPE, no biases, z-loss",
        model=replace(
            _TINY,
            norm="pre",
            init="gpt2",
            bias=False,
            parallel_block=True,
            z_loss=1e-4,
            feed_forward=FeedForwardConfig(kind="swiglu"),
        ),
        objective="causal",
    ),
    "bloom-like": ModelPreset(
        summary="BLOOM's recipe: ALiBi, embedding norm, pre-LN, GELU",
        model=replace(
            _TINY,
            norm="pre",
            init="gpt2",
            embedding=EmbeddingConfig(norm=True),
            attention=AttentionConfig(positions="alibi"),
            feed_forward=FeedForwardConfig(kind="gelu"),
        ),
        objective="causal",
    ),
    "t5-like": ModelPreset(
        summary="T5's objective on GLM's architecture: span corruption only",
        model=_TINY,
        objective="span-corruption",
    ),
    "olmo2-like": ModelPreset(
        summary="OLMo 2's recipe: reordered RMSNorm, QK-norm, SwiGLU, z-loss, no decay on embeddings",
        model=replace(
            _RECENT,
            norm="reordered",
            z_loss=1e-5,
            attention=AttentionConfig(softmax="fused", qk_norm=True, rope_base=500_000.0),
            feed_forward=FeedForwardConfig(kind="swiglu"),
        ),
        objective="causal",
        optimizer=OptimizerConfig(decay_embedding=False),
    ),
    "qwen3-next-like": ModelPreset(
        summary="Qwen3-Next's recipe: gated attention, RMSNorm with gains around 1, experts and a shared one",
        model=replace(
            _RECENT,
            norm_kind="rms-centred",
            attention=AttentionConfig(
                softmax="fused", qk_norm=True, gate="element", key_heads=2, rope_base=1e7
            ),
            feed_forward=FeedForwardConfig(
                kind="swiglu", inner=96, experts=ExpertsConfig(count=8, active=2, shared=1, balance=1e-3)
            ),
        ),
        objective="causal",
    ),
    "nanochat-like": ModelPreset(
        summary="nanochat's recipe: Muon, RMSNorm without gains, QK-norm, squared ReLU, capped logits",
        model=replace(
            _RECENT,
            norm_kind="rms-plain",
            init="fan-in",
            logit_cap=15.0,
            embedding=EmbeddingConfig(tied=False, norm=True),
            attention=AttentionConfig(softmax="fused", qk_norm=True),
            feed_forward=FeedForwardConfig(kind="squared-relu"),
        ),
        objective="causal",
        optimizer=OptimizerConfig(kind="muon"),
    ),
    "gpt-oss-like": ModelPreset(
        summary="gpt-oss's recipe: learned sinks, clamped SwiGLU experts, grouped queries, biases",
        model=replace(
            _RECENT,
            bias=True,
            attention=AttentionConfig(sink="learned", key_heads=2, rope_base=150_000.0),
            feed_forward=FeedForwardConfig(
                kind="swiglu", inner=96, clamp=7.0, experts=ExpertsConfig(count=8, active=2)
            ),
        ),
        objective="causal",
    ),
    "glm-5-like": ModelPreset(
        summary="GLM-5's recipe: Muon split by head, RMSNorm, experts evened by a bias, a shared one",
        model=replace(
            _RECENT,
            attention=AttentionConfig(softmax="fused", rope_base=1e6),
            feed_forward=FeedForwardConfig(
                kind="swiglu",
                inner=96,
                experts=ExpertsConfig(count=8, active=2, shared=1, balance=0.0, bias_rate=1e-3),
            ),
        ),
        objective="causal",
        optimizer=OptimizerConfig(kind="muon", muon=MuonConfig(per_head=True)),
    ),
}
