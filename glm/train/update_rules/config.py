"""What an update is made with, and which combinations cannot be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from glm.errors import InputError

Kind = Literal["adamw", "muon", "lion", "ademamix", "adam-atan2", "soap"]


@dataclass(frozen=True, kw_only=True)
class MuonConfig:
    """Constants of Muon.

    Attributes:
        momentum: decay of the gradient's momentum.
        nesterov: orthogonalize the gradient moved towards its momentum instead of the momentum.
        iterations: Newton-Schulz iterations.
        scale: scale of an m x n update: "rms": .2 sqrt(max(m, n)), AdamW's RMS, so that both take one rate; "spectral":
            sqrt(max(1, m / n)).
        per_head: orthogonalize each head's query, key and value projection by itself (GLM-5's Muon split).
    """

    momentum: float = 0.95
    nesterov: bool = True
    iterations: int = 5
    scale: Literal["rms", "spectral"] = "rms"
    per_head: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise InputError(f"optimizer.muon.momentum must lie in [0, 1), got {self.momentum}")
        if self.iterations < 1:
            raise InputError(f"optimizer.muon.iterations must be at least 1, got {self.iterations}")


@dataclass(frozen=True, kw_only=True)
class SlowMomentumConfig:
    """AdEMAMix's second, slow momentum.

    Attributes:
        weight: alpha, the slow momentum's weight beside the fast one.
        beta3: decay of the slow momentum.
        warmup: updates over which alpha and beta3 rise to their values; 0: none.
    """

    weight: float = 5.0
    beta3: float = 0.9999
    warmup: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.beta3 < 1:
            raise InputError(f"optimizer.slow.beta3 must lie in (0, 1), got {self.beta3}")
        if self.weight < 0 or self.warmup < 0:
            raise InputError("optimizer.slow.weight and optimizer.slow.warmup must be 0 or positive")


@dataclass(frozen=True, kw_only=True)
class RateFactors:
    """Factors on the learning rate, by group.

    Attributes:
        embedding: for the token embedding (and the output projection, where they are tied) and learned positions.
        output: for the output projection, where it is not tied.
        vectors: for norms, biases and other vectors.
        hidden: for every other matrix.
    """

    embedding: float = 1.0
    output: float = 1.0
    vectors: float = 1.0
    hidden: float = 1.0

    def __post_init__(self) -> None:
        for name in ("embedding", "output", "vectors", "hidden"):
            if not getattr(self, name) > 0:
                raise InputError(f"optimizer.rates.{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Guards against a wild gradient, beside the clip of the global norm.

    Attributes:
        adagc: clip each tensor's norm by its own past (AdaGC), and the global norm only in the first ``warmup`` updates.
        warmup: updates before AdaGC clips tensors.
        spam: "spam": clip elements whose square is more than 5,000 times their second moment; "stable": clip elements by the past
            maxima of their tensor, and scale its norm by its past norms. Both zero all moments every ``reset`` updates.
        reset: updates between two such resets; 0: never.
        skip_step: leave out an update whose loss or gradient norm lies more than this many standard deviations above the mean of
            the last 128; 0: off.
        update_norm: bound the norm of the whole update to this many standard deviations above the mean of the last 128; 0: off.
    """

    adagc: bool = False
    warmup: int = 100
    spam: Literal["off", "spam", "stable"] = "off"
    reset: int = 500
    skip_step: float = 0.0
    update_norm: float = 0.0

    def __post_init__(self) -> None:
        if self.warmup < 1:
            raise InputError(f"optimizer.guard.warmup must be at least 1, got {self.warmup}")
        if self.reset < 0 or self.skip_step < 0 or self.update_norm < 0:
            raise InputError(
                "optimizer.guard.reset, optimizer.guard.skip_step and optimizer.guard.update_norm must be 0 (off) or "
                "positive"
            )
        if self.adagc and self.spam != "off":
            raise InputError(
                "optimizer.guard.adagc and optimizer.guard.spam both clip each tensor: choose one"
            )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How gradients become updates.

    Attributes:
        kind: update rule; muon and soap update hidden matrices, and AdamW the rest.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        epsilon: added to the root of the second moment.
        weight_decay: weight decay of matrices; vectors have none.
        decay: what multiplies the weight decay: "coupled": the learning rate (AdamW); "independent": the rate as a share of its
            peak; "adamc": both, except for the output projection, which keeps AdamW's.
        decay_embedding: decay the embedding, and learned positions, as other matrices.
        cautious: keep only those elements of an update that point the gradient's way.
        cautious_decay: decay only weights that the update makes smaller anyway.
        clip: bound of the global gradient norm; 0 is off.
        zclip: bound the global gradient norm by its own past as well.
        update_clipping: divide a tensor's rate by its sqrt(mean(g^2 / v)) where that is above 1 (StableAdamW).
    """

    kind: Kind = "adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    decay: Literal["coupled", "independent", "adamc"] = "coupled"
    decay_embedding: bool = True
    cautious: bool = False
    cautious_decay: bool = False
    clip: float = 1.0
    zclip: bool = False
    update_clipping: bool = False
    rates: RateFactors = field(default_factory=RateFactors)
    muon: MuonConfig = field(default_factory=MuonConfig)
    slow: SlowMomentumConfig = field(default_factory=SlowMomentumConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"optimizer.{name} must lie in [0, 1), got {getattr(self, name)}")
        if not self.epsilon > 0:
            raise InputError(f"optimizer.epsilon must be positive, got {self.epsilon}")
        if self.weight_decay < 0 or self.clip < 0:
            raise InputError("optimizer.weight_decay and optimizer.clip must be 0 (off) or positive")
        if self.update_clipping and (self.kind != "adamw" or not self.is_plain):
            raise InputError(
                "optimizer.update_clipping is StableAdamW's: choose optimizer.kind adamw without cautious, cautious_decay "
                "and guard.update_norm"
            )
        if self.guard.spam != "off" and self.kind not in ("adamw", "adam-atan2"):
            raise InputError(
                f"optimizer.guard.spam reads Adam's second moments, which {self.kind} does not keep of every parameter: "
                "choose optimizer.kind adamw or adam-atan2, or guard.adagc"
            )

    @property
    def is_plain(self) -> bool:
        """Whether an update is AdamW's own and nothing is done to it, so that torch's fused kernel makes it."""
        return self.kind == "adamw" and not (self.cautious or self.cautious_decay or self.guard.update_norm)

    @property
    def needs_whole_matrices(self) -> bool:
        """Whether a share of a matrix is not enough to update it."""
        return self.kind in ("muon", "soap")
