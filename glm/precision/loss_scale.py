"""Dynamic loss scaling: keep fp16 gradients between underflow and overflow.

Training multiplies the loss by a scale s before backward, and divides gradients by s in fp32 before the optimizer. fp16 holds 6e-8
to 65,504, so s must lift small gradients over the lower end without pushing large ones over the upper:

    gradient overflowed:  skip the update; use up one unit of hysteresis, and once it is used up s <- max(s / 2, minimum)
    no overflow:          after every ``window`` updates counted from the last overflow, s <- 2 s and hysteresis is refilled

Source: Micikevicius et al. (1710.03740, section 3.2); the state machine is that of DeepSpeed's dynamic scaler with GLM-130B's
values (initial 2^16, hysteresis 2, minimum 1; window 2000 in the paper, 200 in its launch configuration). A window counts updates
as torch's GradScaler does; DeepSpeed 0.19 waits one update longer.

A scale that keeps falling is the collapse that preceded GLM-130B's loss explosion by 30 steps: ``collapsed`` says that the scale is
at its minimum and the gradient overflows all the same, so nothing is left to lower.
"""

from __future__ import annotations

from dataclasses import dataclass

from glm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class LossScaleConfig:
    """Constants of the dynamic loss scale."""

    initial: float = 2.0**16
    """First scale."""
    window: int = 200
    """Updates without overflow after which the scale is raised."""
    hysteresis: int = 2
    """Overflows that it takes to lower the scale for the first time in a window; each further one lowers it again."""
    minimum: float = 1.0
    """The scale is never lowered below this."""
    factor: float = 2.0
    """Step by which the scale is raised and lowered."""

    def __post_init__(self) -> None:
        if not self.minimum > 0:
            raise InputError(f"loss scale minimum {self.minimum} must be positive")
        if self.initial < self.minimum:
            raise InputError(
                f"initial loss scale {self.initial} is below the minimum {self.minimum}: raise it"
            )
        if self.window < 1 or self.hysteresis < 1:
            raise InputError(
                f"loss scale window {self.window} and hysteresis {self.hysteresis} must both be at least 1"
            )
        if not self.factor > 1:
            raise InputError(f"loss scale factor {self.factor} must be above 1")


class LossScaler:
    """The scale and the state machine that moves it: ``scale`` before backward, ``update`` after every step."""

    def __init__(self, config: LossScaleConfig | None = None) -> None:
        self.config = config or LossScaleConfig()
        self.scale = self.config.initial
        self.hysteresis_left = self.config.hysteresis
        self.updates = 0
        self.last_overflow = -1
        self.collapsed = False

    def update(self, overflow: bool) -> float:
        """Note one step's outcome and return the scale of the next.

        Args:
            overflow: whether any gradient element was infinite or NaN, so that the engine skipped the update.
        """
        if overflow:
            self.collapsed = self.scale <= self.config.minimum
            if self.hysteresis_left == 1:
                self.scale = max(self.scale / self.config.factor, self.config.minimum)
            else:
                self.hysteresis_left -= 1
            self.last_overflow = self.updates
        else:
            self.collapsed = False
            if (self.updates - self.last_overflow) % self.config.window == 0:
                self.hysteresis_left = self.config.hysteresis
                # Above 2^127 the scale itself would be infinite in fp32 and turn every gradient into NaN.
                self.scale = min(self.scale * self.config.factor, 2.0**127)
        self.updates += 1
        return self.scale

    def state_dict(self) -> dict[str, float | int | bool]:
        """Plain numbers: everything that ``load_state_dict`` needs to continue exactly."""
        return {
            "scale": self.scale,
            "hysteresis_left": self.hysteresis_left,
            "updates": self.updates,
            "last_overflow": self.last_overflow,
            "collapsed": self.collapsed,
        }

    def load_state_dict(self, state: dict[str, float | int | bool]) -> None:
        """Go on from a saved state."""
        missing = self.state_dict().keys() - state.keys()
        if missing:
            raise InputError(
                f"loss scaler state lacks {', '.join(sorted(missing))}: it is not a saved state of ours"
            )
        self.scale = float(state["scale"])
        self.hysteresis_left = int(state["hysteresis_left"])
        self.updates = int(state["updates"])
        self.last_overflow = int(state["last_overflow"])
        self.collapsed = bool(state["collapsed"])
