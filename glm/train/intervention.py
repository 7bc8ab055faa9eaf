"""What the responder, or a replay, has changed in training so far: the state between a decision and its expiry.

The loop carries out a decision (``stabilitylab.spikes.Decision``); ``Intervention`` keeps what lasts longer than a step,
checkpoints save it, and the loop applies it on top of the schedules:

    learning rate   x rate_factor
    EGS alpha       min(schedule, alpha)
    clipping bound  min(configured, clip)
    data position   jumps ahead by a number of batches at a given step
    updates         not made to some parameters, up to a given step

Sources: OPT-175B lowered its rate and clip bound by hand (2205.01068, section 2.5); GLM-130B lowered alpha; PaLM went back about
100 steps and skipped 200-500 batches (2204.02311, section 5.1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from stabilitylab.spikes import Decision


@dataclass(frozen=True, slots=True, kw_only=True)
class Intervention:
    """Lasting changes, neutral at first.

    Attributes:
        rate_factor: on the scheduled learning rate.
        alpha: upper bound of EGS's alpha; None: the schedule's own.
        clip: upper bound of the clipping norm; None: the configured one.
        skips: (step, batches): how many batches to leave out before that step.
        held: names of parameters not to update.
        held_until: the first step that updates them again; None: never.
    """

    rate_factor: float = 1.0
    alpha: float | None = None
    clip: float | None = None
    skips: tuple[tuple[int, int], ...] = ()
    held: tuple[str, ...] = ()
    held_until: int | None = None

    def after(self, decision: Decision) -> Intervention:
        """The intervention after a decision."""
        skips = self.skips
        if decision.back_to is not None and decision.skip_batches:
            # The loop trains steps from ``back_to`` on anew: their earlier skips belong to another history.
            kept = tuple(skip for skip in skips if skip[0] <= decision.back_to)
            skips = (*kept, (decision.back_to, decision.skip_batches))
        bounds = [bound for bound in (self.clip, decision.clip) if bound is not None]
        return replace(
            self,
            rate_factor=self.rate_factor * (decision.rate_factor or 1.0),
            alpha=self.alpha if decision.alpha is None else decision.alpha,
            clip=min(bounds, default=None),
            skips=skips,
        )

    def leaving_out(self, steps: Sequence[int]) -> Intervention:
        """The same without the batches of ``steps``; the batches after them take their place."""
        # Each batch left out moves the batches of later steps one step earlier.
        skips = [(step - place, 1) for place, step in enumerate(sorted(steps))]
        return replace(self, skips=(*self.skips, *skips))

    def skipped_before(self, step: int) -> int:
        """Batches to leave out before ``step``."""
        return sum(batches for at, batches in self.skips if at == step)

    def held_at(self, step: int) -> frozenset[str]:
        """Parameters that the update of ``step`` leaves alone."""
        over = self.held_until is not None and step >= self.held_until
        return frozenset() if over else frozenset(self.held)

    def clipping(self, configured: float) -> float:
        """The bound in force. A configured 0 means no clipping; our bound replaces it."""
        if self.clip is None:
            return configured
        return self.clip if configured == 0 else min(self.clip, configured)

    def shrink(self, scheduled: float) -> float:
        """EGS's alpha in force."""
        return scheduled if self.alpha is None else min(self.alpha, scheduled)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Intervention:
        skips = tuple((int(step), int(batches)) for step, batches in state["skips"])
        return cls(
            rate_factor=state["rate_factor"],
            alpha=state["alpha"],
            clip=state["clip"],
            skips=skips,
            # States saved before updates could be withheld lack this.
            held=tuple(state.get("held", ())),
            held_until=state.get("held_until"),
        )
