"""The responder's decisions: each policy, escalation, cooldown, budget, and that it survives a resume."""

import json

import pytest

from stabilitylab.errors import InputError
from stabilitylab.spikes import Responder, ResponderConfig
from stabilitylab.spikes.responses import LADDER
from stabilitylab.telemetry import Event


def noticed(step, kind="spike", *, onset=None, phase="onset", signal="train/-/loss"):
    data = {"phase": phase, "signal": signal, "onset": step if onset is None else onset, "episode": 1}
    return [Event(step=step, kind=kind, data=data)]


def decide(config, step=100, kind="spike", **how):
    return Responder(config).decide(noticed(step, kind, **how), step)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("none", {"kind": "continue"}),
        ("skip-batch", {"kind": "skip-batch", "back_to": 98, "skip_batches": 3}),
        ("clip", {"kind": "clip", "clip": 0.3, "back_to": None}),
        ("lower-rate", {"kind": "lower-rate", "rate_factor": 0.5, "back_to": None}),
        ("shrink-embedding-gradient", {"kind": "shrink-embedding-gradient", "alpha": 0.1, "back_to": None}),
        ("roll-back", {"kind": "roll-back", "back_to": 58, "skip_batches": 50}),
    ],
)
def test_each_policy(policy, expected):
    config = ResponderConfig(policy=policy, rollback_steps=40, skip_batches=50)
    decision = decide(config, onset=98)
    assert {name: getattr(decision, name) for name in expected} == expected


@pytest.mark.parametrize("policy", ["clip", "lower-rate", "shrink-embedding-gradient"])
def test_a_lost_state_is_left_whatever_the_policy(policy):
    decision = decide(ResponderConfig(policy=policy), kind="non-finite")
    assert (decision.kind, decision.back_to, decision.skip_batches) == (policy, 100, 1)
    gradient = decide(ResponderConfig(policy=policy), kind="non-finite", signal="train/-/gradient_norm")
    assert gradient.back_to is None  # that update was not made: the state is as it was


def test_a_rollback_does_not_go_before_the_first_step():
    assert decide(ResponderConfig(policy="roll-back", cooldown=0), step=30).back_to == 0


@pytest.mark.parametrize("phase", ["end", None])
def test_only_beginnings_and_changes_ask_for_anything(phase):
    assert decide(ResponderConfig(policy="clip"), phase=phase).kind == "continue"


@pytest.mark.parametrize("kind", ["dead", "frozen"])
def test_what_stands_still_is_not_answered(kind):
    assert decide(ResponderConfig(policy="escalate", hard_batches=True), kind=kind).kind == "continue"


def test_hard_batches_are_left_alone_unless_asked_for():
    assert decide(ResponderConfig(policy="skip-batch"), kind="hard-batch").kind == "continue"
    asked = ResponderConfig(policy="skip-batch", hard_batches=True)
    assert decide(asked, kind="hard-batch").skip_batches == 1


def test_the_gravest_event_is_answered():
    events = noticed(100, "loss-scale-collapse") + noticed(100, "divergence") + noticed(100, "spike")
    decision = Responder(ResponderConfig(policy="clip")).decide(events, 100)
    assert decision.reason["kind"] == "divergence"


def test_cooldown_at_the_beginning_and_after_a_decision():
    responder = Responder(ResponderConfig(policy="clip", cooldown=20))
    taken = [step for step in range(100) if responder.decide(noticed(step), step).kind == "clip"]
    assert taken == [20, 41, 62, 83]
    assert responder.decide(noticed(100, "non-finite"), 100).kind == "clip"  # does not wait


@pytest.mark.parametrize("ends", [False, True])
def test_what_begins_in_a_cooldown_is_answered_after_it_if_it_goes_on(ends):
    responder = Responder(ResponderConfig(policy="skip-batch", cooldown=20))
    assert responder.decide(noticed(10), 10).kind == "continue"
    if ends:
        responder.decide(noticed(15, onset=10, phase="end"), 15)
    taken = {step: d for step in range(16, 40) if (d := responder.decide([], step)).kind != "continue"}
    if ends:
        assert taken == {}
    else:
        ((step, decision),) = taken.items()
        assert (step, decision.back_to, decision.skip_batches) == (20, 10, 11)


def test_cooldown_counts_from_where_training_goes_on():
    responder = Responder(ResponderConfig(policy="roll-back", rollback_steps=50, cooldown=20))
    assert responder.decide(noticed(100), 100).back_to == 50
    assert responder.decide(noticed(69), 69).kind == "continue"
    assert responder.decide(noticed(70), 70).kind == "roll-back"


def test_escalation_climbs_while_episodes_come_close_and_begins_anew_after_that():
    config = ResponderConfig(policy="escalate", cooldown=5, memory=100, rollback_steps=10, skip_batches=7)
    responder = Responder(config)
    kinds = [responder.decide(noticed(step), step).kind for step in (10, 60, 110, 160, 210)]
    assert kinds == [*LADDER, LADDER[-1]]
    assert responder.decide(noticed(900), 900).kind == LADDER[0]


def test_the_budget_is_said_once_to_be_spent():
    responder = Responder(ResponderConfig(policy="clip", cooldown=0, budget=2))
    kinds = [responder.decide(noticed(step), step).kind for step in range(5)]
    assert kinds == ["clip", "clip", "give-up", "continue", "continue"]


def test_a_resumed_responder_continues_exactly():
    config = ResponderConfig(policy="escalate", cooldown=10, memory=60, budget=6)
    whole, resumed = Responder(config), Responder(config)
    for step in range(0, 300, 7):
        saved = json.loads(json.dumps(resumed.state_dict()))
        resumed = Responder(config)
        resumed.load_state_dict(saved)
        assert resumed.decide(noticed(step), step) == whole.decide(noticed(step), step)


def test_a_decision_is_an_event():
    event = decide(ResponderConfig(policy="lower-rate")).event
    assert (event.step, event.kind) == (100, "response")
    body = json.loads(event.to_json())["data"]
    assert (body["kind"], body["rate_factor"], body["used"]) == ("lower-rate", 0.5, 1)
    assert body["reason"]["kind"] == "spike"


@pytest.mark.parametrize(
    "wrong",
    [
        {"policy": "pray"},
        {"rate_factor": 1.0},
        {"rate_factor": 0.0},
        {"alpha": 2.0},
        {"clip": 0.0},
        {"rollback_steps": 0},
        {"skip_batches": -1},
        {"cooldown": -1},
        {"budget": 0},
    ],
)
def test_a_wrong_configuration_says_what_to_change(wrong):
    with pytest.raises(InputError, match=rf"responder\.{next(iter(wrong))}"):
        ResponderConfig(**wrong)


@pytest.mark.parametrize("policy", ["skip-batch", "roll-back"])
def test_a_second_event_at_the_same_spot_escalates_and_then_is_left_alone(policy):
    config = ResponderConfig(policy=policy, rollback_steps=20, skip_batches=5, cooldown=2)
    responder = Responder(config)
    taken = []
    for step in (100, 101, 103, 104, 106, 107, 109):
        if (decision := responder.decide(noticed(step, onset=100), step)).kind != "continue":
            taken.append((decision.back_to, decision.rate_factor))
    first = 100 if policy == "skip-batch" else 80
    further = [80, 60] if policy == "skip-batch" else [60, 20]
    assert taken == [(first, None), *((back, 0.5) for back in further)]
    assert responder.used == 3
    # Elsewhere it begins anew.
    fresh = responder.decide(noticed(400), 400)
    assert (fresh.back_to, fresh.rate_factor) == (400 if policy == "skip-batch" else 380, None)


def test_what_turns_out_graver_does_not_wait_for_the_cooldown():
    responder = Responder(ResponderConfig(policy="clip", cooldown=80))
    assert responder.decide(noticed(152), 152).kind == "clip"
    assert responder.decide(noticed(155, onset=152, phase="change"), 155).kind == "continue"
    assert responder.decide(noticed(156, "divergence", onset=152, phase="change"), 156).kind == "clip"
