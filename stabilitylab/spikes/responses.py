"""What to do about an episode: a policy, its escalation, and the limits on both. Pure decisions; the loop
acts.

| policy | decision | after |
| --- | --- | --- |
| none | go on | |
| skip-batch | back to before the onset, its batches left out | common practice for hard batches |
| clip | clip gradients at ``clip`` from here on | OPT-175B: 1.0 to 0.3 (2205.01068, section 2.5) |
| lower-rate | multiply the learning rate by ``rate_factor`` from here on | OPT-175B |
| shrink-embedding-gradient | EGS with ``alpha`` from here on | GLM-130B (2210.02414, section 3.3) |
| roll-back | back ``rollback_steps``, leave out ``skip_batches`` | PaLM: 100, 200-500 (2204.02311, 5.1) |
| escalate | the rungs of ``LADDER`` one after the other | |

A decision is taken at the onset of an episode, or when it turns out worse than thought, but not within
``cooldown`` steps of the run's beginning or of the last decision; only a loss that is not finite does not
wait. What begins in a cooldown and still goes on when that is over is answered then. Under ``escalate`` an
episode within ``memory`` steps of the last decision takes the next rung, later ones begin at the first. After
``budget`` decisions the responder says so once and stands aside: a run that needs more needs a person.

A non-finite loss means that the state cannot be trusted: whatever the policy, the decision then also goes
back to before the onset and leaves its batch out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from stabilitylab.errors import InputError
from stabilitylab.telemetry import Event

Policy = Literal[
    "none", "skip-batch", "clip", "lower-rate", "shrink-embedding-gradient", "roll-back", "escalate"
]
LADDER: tuple[Policy, ...] = ("skip-batch", "clip", "lower-rate", "roll-back")
# Gravest first. A hard batch recovers by itself and asks for nothing, unless ``hard_batches`` says otherwise.
_GRAVITY = ("non-finite", "divergence", "spike", "loss-scale-collapse", "hard-batch")


@dataclass(frozen=True, kw_only=True)
class ResponderConfig:
    """What is done about episodes, and how often at most.

    Attributes:
        policy: see the table at the head of ``stabilitylab/spikes/responses.py``.
        rate_factor: of lower-rate, on what the rate is then; factors of later decisions multiply.
        alpha: of shrink-embedding-gradient.
        clip: of clip, the new bound of the global gradient norm.
        rollback_steps: of roll-back, steps to go back from the onset.
        skip_batches: of roll-back, batches to leave out from there on.
        hard_batches: act on hard batches too, the moment they show.
        cooldown: steps after the beginning and after a decision in which none is taken.
        memory: steps after a decision within which escalate takes the next rung.
        budget: decisions in one run.
    """

    policy: Policy = "none"
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
        if self.policy not in get_args(Policy):
            raise InputError(
                f"responder.policy is {self.policy!r}: choose one of {', '.join(get_args(Policy))}"
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
    """What the loop is to do now. Fields that do not concern it are None or 0.

    Attributes:
        kind: a policy's name, ``continue``, or ``give-up`` (continue, and say that the budget is spent).
        step: when it was taken.
        rate_factor: multiply the learning rate by this from here on.
        alpha: EGS's alpha from here on.
        clip: bound of the gradient norm from here on.
        back_to: continue from the state before this step (or an older one, if that is not kept).
        skip_batches: leave so many batches out from ``back_to`` on.
        reason: the event's data that led to it, and its kind.
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


class Responder:
    """Takes decisions; keeps what escalation, cooldown and budget need. It must outlive the rollbacks it
    orders.

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

    def decide(self, events: Sequence[Event], step: int) -> Decision:
        """The decision that follows from what the detector noticed at ``step``."""
        proceed = Decision(kind="continue", step=step, used=self.used)
        if not self.config.active:
            return proceed
        self._forget_ended(events)
        minded = [event for event in events if self._minds(event)]
        event = _gravest(minded)
        lost = event is not None and event.kind == "non-finite" and _signal(event).endswith("/loss")
        if step < self.quiet_until and not lost:
            # What begins in the cooldown is answered when that is over, if it is still going on.
            for one in minded:
                self.waiting[_name(one)] = _reason(one)
            return proceed
        if event is None:
            event = _gravest([_event(step, reason) for reason in self.waiting.values()])
        self.waiting.clear()
        if event is None:
            return proceed
        if self.used >= self.config.budget:
            if self.gave_up:
                return proceed
            self.gave_up = True
            return Decision(kind="give-up", step=step, used=self.used, reason=_reason(event))
        return self._respond(event, step, lost=lost)

    def _minds(self, event: Event) -> bool:
        """A beginning, or a turn to the worse, of something that asks for an answer."""
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
        onset = int(event.data.get("onset", step))
        back_to: int | None = None
        skip = 0
        if action == "roll-back":
            back_to, skip = max(0, onset - config.rollback_steps), config.skip_batches
        elif action == "skip-batch" or lost:
            back_to, skip = onset, step - onset + 1
        continues_at = step + 1 if back_to is None else back_to
        self.quiet_until = continues_at + config.cooldown
        self.remember_until = max(step, continues_at) + config.memory
        return Decision(
            kind=action,
            step=step,
            rate_factor=config.rate_factor if action == "lower-rate" else None,
            alpha=config.alpha if action == "shrink-embedding-gradient" else None,
            clip=config.clip if action == "clip" else None,
            back_to=back_to,
            skip_batches=skip,
            reason=_reason(event),
            used=self.used,
        )

    def state_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "used": self.used,
            "rung": self.rung,
            "quiet_until": self.quiet_until,
            "remember_until": self.remember_until,
            "gave_up": self.gave_up,
            "waiting": {name: dict(reason) for name, reason in self.waiting.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        self.used = state["used"]
        self.rung = state["rung"]
        self.quiet_until = state["quiet_until"]
        self.remember_until = state["remember_until"]
        self.gave_up = state["gave_up"]
        self.waiting = {name: dict(reason) for name, reason in state["waiting"].items()}


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
