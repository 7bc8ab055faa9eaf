"""Guards change or reject a wild gradient before it reaches the moments, beside the clip of the global norm.

    AdaGC         tensor i, from its update W + 1 on:  g_i <- g_i min(1, 1.05 c_i / |g_i|),  c_i = .98 c_i + .02 |g_i| clipped
                  in its first W = 100 updates the global clip, and c_i the smallest |g_i| so far     (2502.11034, algorithm 1)
    SPAM          g^2 > 5000 v: g <- sign(g) sqrt(5000 v), from 20 updates after a reset on           (2501.06842, algorithm 1)
    Stable-SPAM   tensor i, M_i mean of past max |g_i| (.999), free of bias: |g| > M_i: g <- g M_i / max |g_i|;
                  then |g_i| <- mean of past |g_i| (.7) / sqrt(mean of past |g_i|^2 (.9))             (2502.17055, algorithm 1)
    reset         both: every ``reset`` updates all moments are zeroed; SPAM's rate rises again over 150 updates, as a cosine
    skip-step     an update whose loss or norm lies k deviations above the mean of its last 128 is left out, from 64 on
                                                                                                      (OLMo-core, SkipStepOptimizer)

Norms of 0, of tensors without a gradient, do not enter the past: AdaGC as published freezes such a tensor for good. Rejected values
enter skip-step's past at the bound, and non-finite ones not at all, so that one of them neither hides the next nor rejects all
others for 128 updates. The guards decide all this from the loss and the norms that the step has on the host already.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from glm.train.update_rules.config import GuardConfig

ADAGC_BETA, ADAGC_RATIO = 0.98, 1.05
SPAM_THRESHOLD, SPAM_FIRST, SPAM_WARMUP = 5000.0, 20, 150
STABLE_MAXIMUM, STABLE_NORM, STABLE_SQUARE = 0.999, 0.7, 0.9
SKIP_WINDOW, SKIP_LEAST = 128, 64


class AdaGC:
    """Per-tensor clipping by each tensor's own past.

    Args:
        warmup: W.
    """

    def __init__(self, warmup: int = 100) -> None:
        self._warmup = warmup
        # The smallest, later the mean norm of each tensor with a gradient.
        self._past: dict[str, Tensor] = {}
        self._updates = 0

    def clip(self, gradients: Mapping[str, Tensor], norms: Mapping[str, Tensor], factor: float) -> Tensor:
        """Clip in place; returns the share of clipped tensors, as a scalar.

        Args:
            gradients: by name.
            norms: of the whole tensors.
            factor: of the global clip, which applies during the warm-up.
        """
        norms_N = torch.stack([norms[name] for name in gradients]).float()
        none = norms_N.new_full((), math.inf)
        past_N = torch.stack([self._past.get(name, none).to(norms_N) for name in gradients])
        begins = self._updates < self._warmup
        shares_N = torch.full_like(norms_N, factor)
        if not begins:
            shares_N = (ADAGC_RATIO * past_N / norms_N.clamp_min(1e-38)).clamp_max(1.0)
        torch._foreach_mul_(list(gradients.values()), list(shares_N.unbind()))
        kept_N = norms_N * shares_N
        moved_N = ADAGC_BETA * past_N + (1 - ADAGC_BETA) * kept_N
        if begins:
            moved_N = torch.minimum(past_N, kept_N)
        moved_N = torch.where(past_N.isinf(), kept_N, moved_N)
        after_N = torch.where(norms_N > 0, moved_N, past_N)
        self._past |= dict(zip(gradients, after_N.unbind(), strict=True))
        self._updates += 1
        return (shares_N < 1).float().mean()

    def state_dict(self) -> dict[str, Any]:
        past = {name: float(value) for name, value in self._past.items()}
        return {"past": {n: v for n, v in past.items() if math.isfinite(v)}, "updates": self._updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._past = {name: torch.tensor(value) for name, value in state["past"].items()}
        self._updates = state["updates"]


def clip_spikes(gradients: list[Tensor], second: list[Tensor]) -> None:
    """SPAM: cut elements off at sqrt(5000 v), in place. v is as stored, without bias correction."""
    for gradient, v in zip(gradients, second, strict=True):
        limit = (SPAM_THRESHOLD * v).sqrt_()
        gradient.copy_(torch.where(gradient.abs() > limit, gradient.sign() * limit, gradient))


def rate_after_reset(updates: int) -> float:
    """SPAM's factor on the rate, this many updates after a reset."""
    if updates >= SPAM_WARMUP:
        return 1.0
    return 1 - 0.99 * 0.5 * (1 + math.cos(math.pi * updates / SPAM_WARMUP))


class StableClip:
    """Stable-SPAM's clipping: elements by the past of their tensor's largest, then norms by their own past."""

    def __init__(self) -> None:
        self._past: dict[str, Tensor] = {}
        self._updates = 0

    def clip(self, gradients: Mapping[str, Tensor], epsilon: float) -> None:
        """Clip in place. Leaves tensors whose gradient is 0 alone, and their past too."""
        self._updates += 1
        t = self._updates
        for name, gradient in gradients.items():
            past = self._past.get(name)
            past = gradient.new_zeros(3) if past is None else past.to(gradient)
            largest = gradient.abs().amax()
            maximum = past[0].lerp(largest, 1 - STABLE_MAXIMUM)
            bound = maximum / (1 - STABLE_MAXIMUM**t)
            # A largest of 0 gives 0 / 0, which the next line does not use.
            clipped = torch.where(gradient.abs() > bound, gradient / largest * bound, gradient)
            norm = torch.linalg.vector_norm(clipped)
            mean = past[1].lerp(norm, 1 - STABLE_NORM)
            square = past[2].lerp(norm.square(), 1 - STABLE_SQUARE)
            target = mean / (1 - STABLE_NORM**t) / ((square / (1 - STABLE_SQUARE**t)).sqrt() + epsilon)
            active = norm > 0
            gradient.copy_(torch.where(active, clipped / norm.clamp_min(1e-38) * target, gradient))
            self._past[name] = torch.where(active, torch.stack((maximum, mean, square)), past)

    def state_dict(self) -> dict[str, Any]:
        return {
            "past": {name: past.tolist() for name, past in self._past.items()},
            "updates": self._updates,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._past = {name: torch.tensor(past) for name, past in state["past"].items()}
        self._updates = state["updates"]


class SkipStep:
    """Decides which updates to skip, by the past of loss and norm.

    Args:
        deviations: k.
    """

    def __init__(self, deviations: float) -> None:
        self._deviations = deviations
        self._losses: list[float] = []
        self._norms: list[float] = []

    def skips(self, loss: float, norm: float) -> bool:
        """Whether to skip this update, which from now on is part of the past."""
        # Ask both, since both remember.
        high = [self._is_high(self._losses, loss), self._is_high(self._norms, norm)]
        return any(high)

    def _is_high(self, past: list[float], value: float) -> bool:
        bound = math.inf
        if len(past) >= SKIP_LEAST:
            mean = math.fsum(past) / len(past)
            variance = math.fsum((x - mean) ** 2 for x in past) / (len(past) - 1)
            bound = mean + self._deviations * math.sqrt(variance)
        if math.isfinite(value):
            past.append(min(value, bound))
            del past[:-SKIP_WINDOW]
        return value > bound

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self._losses, "norms": self._norms}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._losses, self._norms = list(state["losses"]), list(state["norms"])


class Guards:
    """A configuration's guards, in the order in which a gradient meets them."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self._adagc = AdaGC(config.warmup) if config.adagc else None
        self._stable = StableClip() if config.spam == "stable" else None
        self._skip = SkipStep(config.skip_step) if config.skip_step else None
        self._resets = config.reset if config.spam != "off" else 0
        # What they did in the last update, by telemetry name.
        self.told: dict[str, Tensor | float] = {}

    def leaves_out(self, loss: float, norm: float) -> bool:
        """Whether to skip the update with this loss and gradient norm."""
        left_out = self._skip is not None and self._skip.skips(loss, norm)
        self.told = {"guard/-/left_out": float(left_out)} if self._skip is not None else {}
        return left_out

    def resets(self, updates: int) -> bool:
        """Whether to forget all moments before update number ``updates``, from 1."""
        return bool(self._resets) and updates > 1 and updates % self._resets == 0

    def age(self, updates: int) -> int:
        """Number of this update since the moments began, from 1."""
        if not self._resets or updates < self._resets:
            return updates
        return updates % self._resets + 1

    def rate_factor(self, updates: int) -> float:
        """The factor on the rate of this update."""
        if self.config.spam != "spam" or not self._resets or updates < self._resets:
            return 1.0
        return rate_after_reset(self.age(updates) - 1)

    @property
    def clips(self) -> bool:
        """Whether ``clip`` has anything to do."""
        return self._adagc is not None or self.config.spam != "off"

    def clip(
        self,
        gradients: Mapping[str, Tensor],
        norms: Mapping[str, Tensor],
        second: Mapping[str, Tensor],
        *,
        factor: float,
        updates: int,
        epsilon: float,
    ) -> float:
        """Clip in place. Returns the factor still to apply.

        Args:
            gradients, second: and second moments, by name.
            norms: of the whole gradients.
            factor: of the global clip.
            updates: number of this update, from 1.
            epsilon: Adam's.
        """
        if self._adagc is not None:
            self.told["guard/-/clipped_tensors"] = self._adagc.clip(gradients, norms, factor)
            return 1.0
        if factor != 1.0:
            torch._foreach_mul_(list(gradients.values()), factor)
        if self._stable is not None:
            self._stable.clip(gradients, epsilon)
        elif self.age(updates) > SPAM_FIRST:
            clip_spikes(list(gradients.values()), [second[name] for name in gradients])
        return 1.0

    def state_dict(self) -> dict[str, Any]:
        kept = {"adagc": self._adagc, "stable": self._stable, "skip": self._skip}
        return {name: one.state_dict() for name, one in kept.items() if one is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, one in {"adagc": self._adagc, "stable": self._stable, "skip": self._skip}.items():
            if one is not None and name in state:
                one.load_state_dict(state[name])
