"""What to do about an episode: a policy, its escalation, and the limits on both. This module only decides; the loop acts.

| policy | decision | after |
| --- | --- | --- |
| none | go on | |
| skip-batch | back to before the onset, its batches left out | common practice for hard batches |
| clip | clip gradients at ``clip`` from here on | OPT-175B: 1.0 to 0.3 (2205.01068, section 2.5) |
| lower-rate | multiply the learning rate by ``rate_factor`` from here on | OPT-175B |
| shrink-embedding-gradient | EGS with ``alpha`` from here on | GLM-130B (2210.02414, section 3.3) |
| roll-back | back ``rollback_steps``, leave out ``skip_batches`` | PaLM: 100, 200-500 (2204.02311, 5.1) |
| escalate | the rungs of ``LADDER`` one after the other | |

The responder decides at the onset of an episode, or when it turns out worse than thought, but not within ``cooldown`` steps of the
run's beginning or of the last decision; only a non-finite loss and an event graver than the last one do not wait. It responds to an
episode that begins in a cooldown when that is over, if the episode is still open. Under ``escalate`` an episode within ``memory``
steps of the last decision takes the next rung, later ones begin at the first. After ``budget`` decisions the responder reports this
once and does nothing further: a run that needs more needs a person.

An episode in a stretch that the run has gone back over before shows that going back was not enough. The second decision there goes
back ``rollback_steps`` further, skips twice as many batches and also lowers the rate by ``rate_factor``; the third doubles that.
After ``AT_ONE_SPOT`` decisions the responder leaves that stretch alone and keeps the budget.

Your own policy is any object with the methods of ``Policy``: ``glm.train.loop.Trainer(..., responder=mine)``.

The detector reports ``dead`` and ``frozen`` losses, but the responder does not respond to them. A loss of exactly 0, or one that
repeats itself, comes from a mask that leaves no target, a log that repeats a value, or skipped updates: no batch, rate or older
state fixes that, and going back would only repeat the same steps.

After a non-finite loss the state cannot be trusted: whatever the policy, the decision then also goes back to before the onset and
skips that batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, get_args

from stabilitylab.errors import InputError
from stabilitylab.telemetry import Event

PolicyName = Literal[
    "none", "skip-batch", "clip", "lower-rate", "shrink-embedding-gradient", "roll-back", "escalate"
]
LADDER: tuple[PolicyName, ...] = ("skip-batch", "clip", "lower-rate", "roll-back")
# Gravest first. A hard batch recovers by itself and asks for nothing, unless ``hard_batches`` says otherwise.
_GRAVITY = ("non-finite", "divergence", "spike", "loss-scale-collapse", "hard-batch")
# Decisions about one spot before the responder leaves it to itself.
AT_ONE_SPOT = 3


@dataclass(frozen=True, kw_only=True)
class ResponderConfig:
    """What to do about episodes, and how often at most.

    Attributes:
        policy: see the table at the head of ``stabilitylab/spikes/responses.py``.
        rate_factor: lower-rate multiplies the current rate by this; factors of several decisions multiply.
        alpha: EGS's alpha that shrink-embedding-gradient sets.
        clip: bound of the global gradient norm that clip sets.
        rollback_steps: steps that roll-back goes back from the onset.
        skip_batches: batches that roll-back leaves out from there on.
        hard_batches: act on hard batches too, the moment they show.
        cooldown: steps after the run's beginning, and after each decision, in which the responder takes none.
        memory: steps after a decision within which escalate takes the next rung.
        budget: decisions in one run.
    """

    policy: PolicyName = "none"
    rate_factor: float = 0.5
    alpha: float = 0.1
    clip: float = 0.3
    rollback_steps: int = 100
    skip_batches: int = 200
    hard_batches: bool = False
    cooldown: int = 20
    memory: int = 500
    budget: int = 10

    def __post_init__(self) -> None:
        if self.policy not in get_args(PolicyName):
            raise InputError(
                f"responder.policy is {self.policy!r}: choose one of {', '.join(get_args(PolicyName))}"
            )
        for name, low in (("rate_factor", 0), ("alpha", 0)):
            if not low < getattr(self, name) < 1:
                raise InputError(
                    f"responder.{name} must lie between 0 and 1 to change anything, got {getattr(self, name)}"
                )
        if not self.clip > 0:
            raise InputError(f"responder.clip bounds the gradient norm and must be above 0, got {self.clip}")
        for name, least in (
            ("rollback_steps", 1),
            ("skip_batches", 0),
            ("cooldown", 0),
            ("memory", 0),
            ("budget", 1),
        ):
            if getattr(self, name) < least:
                raise InputError(f"responder.{name} must be at least {least}, got {getattr(self, name)}")

    @property
    def active(self) -> bool:
        """Whether any decision can follow."""
        return self.policy != "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What the loop must do now. Fields that do not apply are None or 0.

    Attributes:
        kind: a policy's name, ``continue``, or ``give-up`` (continue, and say that the budget is spent).
        step: the step at which the responder took it.
        rate_factor: multiply the learning rate by this from here on.
        alpha: EGS's alpha from here on.
        clip: bound of the gradient norm from here on.
        back_to: continue from the state before this step (or an older one, if that is not kept).
        skip_batches: skip this many batches from ``back_to`` on.
        reason: the data and kind of the event that led to it.
        used: decisions so far, this one included.
    """

    kind: str
    step: int
    rate_factor: float | None = None
    alpha: float | None = None
    clip: float | None = None
    back_to: int | None = None
    skip_batches: int = 0
    reason: Mapping[str, Any] | None = None
    used: int = 0

    @property
    def event(self) -> Event:
        """The decision as an event of kind ``response``."""
        data = {name: value for name, value in asdict(self).items() if value is not None and name != "step"}
        return Event(step=self.step, kind="response", data=data)


class Policy(Protocol):
    """Decides how to respond to episodes. Any object with these methods is a policy; none has to be registered."""

    def decide(self, events: Sequence[Event], step: int) -> Decision:
        """What to do after ``step``, at which the detector noticed ``events``; ``Decision(kind="continue", step=step)`` for
        nothing. Called after every step, on every process with the same events."""

    def state_dict(self) -> dict[str, Any]:
        """The state that a resumed run needs, ready for JSON."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""


class Responder:
    """Takes decisions, and keeps the state for escalation, cooldown and budget. It must outlive the rollbacks that it orders.

    Args:
        config: policy and limits.
    """

    def __init__(self, config: ResponderConfig) -> None:
        self.config = config
        self.used = 0
        self.rung = 0
        self.quiet_until = config.cooldown
        self.remember_until = 0
        self.gave_up = False
        self.waiting: dict[str, dict[str, Any]] = {}  # episodes that began in a cooldown and go on
        self.answered = len(_GRAVITY)  # how grave the last event answered was, as a place in _GRAVITY
        self.spot: tuple[int, int] | None = None  # steps that the run has gone back over
        self.times = 0  # decisions about this spot

    def decide(self, events: Sequence[Event], step: int) -> Decision:
        """The decision that follows from what the detector noticed at ``step``."""
        proceed = Decision(kind="continue", step=step, used=self.used)
        if not self.config.active:
            return proceed
        self._forget_ended(events)
        minded = [event for event in events if self._minds(event)]
        event = _gravest(minded)
        lost = event is not None and event.kind == "non-finite" and _signal(event).endswith("/loss")
        graver = self.used > 0 and event is not None and _GRAVITY.index(event.kind) < self.answered
        if step < self.quiet_until and not (lost or graver):
            # Answer what begins in the cooldown when that is over, if it is still going on.
            for one in minded:
                self.waiting[_name(one)] = _reason(one)
            return proceed
        if event is None:
            event = _gravest([_event(step, reason) for reason in self.waiting.values()])
        self.waiting.clear()
        if event is None:
            return proceed
        if not self._is_new(event, step) and self.times >= AT_ONE_SPOT:
            return proceed
        if self.used >= self.config.budget:
            if self.gave_up:
                return proceed
            self.gave_up = True
            return Decision(kind="give-up", step=step, used=self.used, reason=_reason(event))
        return self._respond(event, step, lost=lost)

    def _is_new(self, event: Event, step: int) -> bool:
        """Whether the event stands at a spot that the run has not gone back over."""
        onset = int(event.data.get("onset", step))
        return self.spot is None or not self.spot[0] <= onset <= self.spot[1]

    def _minds(self, event: Event) -> bool:
        """Whether it is a beginning, or a turn for the worse, of something that asks for an answer."""
        asks = event.kind in _GRAVITY and (event.kind != "hard-batch" or self.config.hard_batches)
        return asks and event.data.get("phase") in ("onset", "change")

    def _forget_ended(self, events: Sequence[Event]) -> None:
        for event in events:
            if event.data.get("phase") == "end":
                self.waiting.pop(_name(event), None)

    def _respond(self, event: Event, step: int, *, lost: bool) -> Decision:
        config = self.config
        action = config.policy
        if action == "escalate":
            self.rung = min(self.rung + 1, len(LADDER) - 1) if step < self.remember_until else 0
            action = LADDER[self.rung]
        self.used += 1
        self.answered = _GRAVITY.index(event.kind)
        self.times = 1 if self._is_new(event, step) else self.times + 1
        again = self.times - 1
        onset = int(event.data.get("onset", step))
        back_to: int | None = None
        skip = 0
        if action == "roll-back":
            back_to, skip = max(0, onset - config.rollback_steps * 2**again), config.skip_batches * 2**again
        elif action == "skip-batch" or lost:
            back_to = max(0, onset - config.rollback_steps * again)
            skip = (step - back_to + 1) if again else step - onset + 1
        if back_to is not None:
            first = back_to if self.spot is None or self.times == 1 else min(back_to, self.spot[0])
            self.spot = first, step + config.cooldown
        else:
            self.spot, self.times = None, 0
        continues_at = step + 1 if back_to is None else back_to
        self.quiet_until = continues_at + config.cooldown
        self.remember_until = max(step, continues_at) + config.memory
        return Decision(
            kind=action,
            step=step,
            rate_factor=config.rate_factor
            if action == "lower-rate" or (again and back_to is not None)
            else None,
            alpha=config.alpha if action == "shrink-embedding-gradient" else None,
            clip=config.clip if action == "clip" else None,
            back_to=back_to,
            skip_batches=skip,
            reason=_reason(event),
            used=self.used,
        )

    def state_dict(self) -> dict[str, Any]:
        """The state, ready for JSON."""
        return {
            "used": self.used,
            "rung": self.rung,
            "quiet_until": self.quiet_until,
            "remember_until": self.remember_until,
            "gave_up": self.gave_up,
            "waiting": {name: dict(reason) for name, reason in self.waiting.items()},
            "answered": self.answered,
            "spot": self.spot,
            "times": self.times,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.used = state["used"]
        self.rung = state["rung"]
        self.quiet_until = state["quiet_until"]
        self.remember_until = state["remember_until"]
        self.gave_up = state["gave_up"]
        self.waiting = {name: dict(reason) for name, reason in state["waiting"].items()}
        # Older states do not hold a spot.
        self.answered = state.get("answered", len(_GRAVITY))
        spot = state.get("spot")
        self.spot = None if spot is None else (int(spot[0]), int(spot[1]))
        self.times = state.get("times", 0)


def _gravest(events: Sequence[Event]) -> Event | None:
    return min(events, key=lambda event: _GRAVITY.index(event.kind), default=None)


def _reason(event: Event) -> dict[str, Any]:
    return {"kind": event.kind, **event.data}


def _event(step: int, reason: Mapping[str, Any]) -> Event:
    return Event(step=step, kind=reason["kind"], data={k: v for k, v in reason.items() if k != "kind"})


def _signal(event: Event) -> str:
    return str(event.data.get("signal", ""))


def _name(event: Event) -> str:
    return f"{event.data.get('episode')} {_signal(event)}"
