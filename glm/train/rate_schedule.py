"""Learning rate and EGS's alpha as functions of the step.

    rate(s)   warm-up: peak (s + 1) / W for s < W; then cosine from peak to least over the remaining steps, or linear, or constant
              wsd: constant, and over the last share d of the steps to least as 1 - sqrt(done)   (MiniCPM, 2404.06395; the shape
              of the decay: Hägele et al., 2405.18392, section 3)
              inverse-sqrt: peak sqrt(max(W, 1) / (s + 1)), not below least                      (Vaswani et al., 1706.03762)
    alpha(s)  constant, or linear from the configured value to ``shrink_to`` between two steps (GLM-130B raised alpha to 1
              after 6,000 steps)

Source: GLM-130B, Table 11: 8e-5 to 8e-6, cosine, warm-up 0.5 %.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from glm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Shape of the learning-rate schedule, and of EGS's alpha.

    Attributes:
        peak: highest learning rate.
        least: learning rate below which the decay does not go, as a share of the peak.
        warmup: steps until the peak.
        shape: shape of the decay.
        decay_steps: steps until the decay ends, warm-up included; None: all of the run's.
        decay_share: share of the steps over which wsd decays.
        shrink_to: EGS's alpha at the end of its ramp; None: constant.
        shrink_from_step: step at which the ramp begins.
        shrink_to_step: step at which the ramp ends.
    """

    peak: float = 1e-3
    least: float = 0.1
    warmup: int = 50
    shape: Literal["cosine", "linear", "constant", "wsd", "inverse-sqrt"] = "cosine"
    decay_steps: int | None = None
    decay_share: float = 0.2
    shrink_to: float | None = None
    shrink_from_step: int = 0
    shrink_to_step: int = 0

    def __post_init__(self) -> None:
        if not self.peak > 0:
            raise InputError(f"schedule.peak must be positive, got {self.peak}")
        if not 0 <= self.least <= 1:
            raise InputError(f"schedule.least is a share of the peak, in [0, 1], got {self.least}")
        if not 0 < self.decay_share <= 1:
            raise InputError(f"schedule.decay_share must lie in (0, 1], got {self.decay_share}")
        if self.warmup < 0:
            raise InputError(f"schedule.warmup counts steps: 0 or more, got {self.warmup}")
        if self.shrink_to is not None and not 0 <= self.shrink_to <= 1:
            raise InputError(f"schedule.shrink_to must lie in [0, 1], got {self.shrink_to}")
        if self.shrink_to_step < self.shrink_from_step:
            raise InputError("schedule.shrink_to_step must not lie before schedule.shrink_from_step")

    def learning_rate(self, step: int, steps: int) -> float:
        """The rate of update ``step`` (from 0) of a run of ``steps``."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        total = self.decay_steps or steps
        if self.shape == "constant" or total <= self.warmup:
            return self.peak
        if self.shape == "inverse-sqrt":
            return self.peak * max(self.least, math.sqrt(max(1, self.warmup) / (step + 1)))
        done = min(1.0, (step - self.warmup) / (total - self.warmup))
        if self.shape == "wsd":
            decays_from = max(self.warmup, total * (1 - self.decay_share))
            share = 1 - math.sqrt(min(1.0, max(0.0, step - decays_from) / (total - decays_from)))
        else:
            share = 0.5 * (1 + math.cos(math.pi * done)) if self.shape == "cosine" else 1 - done
        return self.peak * (self.least + (1 - self.least) * share)

    def embedding_gradient_shrink(self, step: int, first: float) -> float:
        """EGS's alpha at ``step``, beginning from ``first``."""
        if self.shrink_to is None or step < self.shrink_from_step:
            return first
        if step >= self.shrink_to_step:
            return self.shrink_to
        done = (step - self.shrink_from_step) / (self.shrink_to_step - self.shrink_from_step)
        return first + done * (self.shrink_to - first)
