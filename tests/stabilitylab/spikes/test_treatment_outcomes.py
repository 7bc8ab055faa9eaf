"""Outcomes of responses and forks, counted from what runs recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from stabilitylab import Monitor
from stabilitylab.runs import load_run
from stabilitylab.runs.folder import RunFolder
from stabilitylab.spikes.advice import told_now
from stabilitylab.spikes.explain import write_diagnoses
from stabilitylab.spikes.treatment_outcomes import WITHIN, outcomes, tally, treatment_of
from stabilitylab.telemetry import Event

AT = 100


def run_with(folder: Path, *events: Event, steps: int = 300) -> RunFolder:
    """A run of this many steps with these events; its losses do not show them."""
    with Monitor(nn.Linear(2, 2), out=folder, probes=[], detector=None, tensorboard=False) as monitor:
        for step in range(steps):
            monitor.step(step, loss=2.0)
    RunFolder(folder).append_events(events)
    return RunFolder(folder)


def response(step: int = AT + 2, kind: str = "lower-rate", **data: Any) -> Event:
    reason = {"kind": "divergence", "signal": "train/-/loss", "onset": step - 2}
    return Event(step=step, kind="response", data={"kind": kind, "reason": reason, **data})


def episode(onset: int, end: int | None, kind: str = "divergence", number: int = 1) -> Event:
    body = {"episode": number, "signal": "train/-/loss", "onset": onset, "peak": onset, "end": end}
    return Event(step=onset, kind=kind, data={**body, "height": 1.0, "phase": "end"})


@pytest.mark.parametrize(
    ("events", "helped"),
    [
        ([response(), episode(AT, AT + 20)], [True]),
        ([response(), episode(AT, AT + 2 + WITHIN + 2)], [False]),
        ([response(), episode(AT, None)], [False]),
        # It ended, but another began.
        ([response(), episode(AT, AT + 20), episode(AT + 40, AT + 45, "spike", 2)], [False]),
        ([response(), episode(AT, AT + 20), episode(AT + 40, AT + 41, "hard-batch", 2)], [True]),
        ([response(), episode(AT, AT + 20), episode(AT + 200, AT + 220, "spike", 2)], [True]),
        # A second decision was needed.
        ([response(), response(AT + 30, "clip"), episode(AT, AT + 40)], [False, True]),
        # Gone back from: the episode is no more, or comes again.
        ([response(back_to=AT - 20)], [True]),
        ([response(back_to=AT - 20), episode(AT, AT + 5)], [False]),
        ([response(kind="give-up"), episode(AT, None)], []),
        # Too soon to say.
        ([response(290), episode(288, 291)], []),
    ],
)
def test_a_response_helped_where_the_event_is_over_soon(
    tmp_path: Path, events: list[Event], helped: list[bool]
) -> None:
    run = run_with(tmp_path / "run", *events)
    assert [one.data["helped"] for one in outcomes(load_run(run.path))] == helped


def test_the_advice_says_how_often_it_helped(tmp_path: Path) -> None:
    """In the run itself, in its forks, and in the runs beside it."""
    own = run_with(tmp_path / "own", response(), episode(AT, AT + 20), Event(step=AT, kind="rewind"))
    assert tally(load_run(own.path), "lower-rate") == (1, 1)
    beside = run_with(tmp_path / "beside", response(), episode(AT, None))
    write_diagnoses(beside)
    write_diagnoses(beside)  # as a resumed run does
    assert [one.data["helped"] for one in beside.read_events() if one.kind == "outcome"] == [False]
    assert tally(load_run(own.path), "lower-rate") == (1, 2)
    fork = own.path / "replays" / "event-1" / "rate-factor=0.5"
    fork.mkdir(parents=True)
    data = {"of": "replay", "treatment": treatment_of(["rate-factor=0.5"]), "helped": True}
    RunFolder(fork).append_events([Event(step=AT, kind="outcome", data=data)])
    run = load_run(own.path)
    assert tally(run, "lower-rate") == (2, 3)
    assert tally(run, "clip") == (0, 0)
    written = {"cause": "learning-rate", "advice": "Try: x.", "sentences": ["a", "Try: x."]}
    assert told_now(run, written) == ["a", "Try: x. In recorded runs: lower-rate ended the event in 2 of 3."]
    written = {**written, "cause": "gradient"}
    assert told_now(run, written) == ["a", "Try: x."]


@pytest.mark.parametrize(
    ("change", "treatment"),
    [
        (["optimizer.clip=0.3"], "clip"),
        (["skip=412+413"], "skip-batch"),
        (["responder.policy=roll-back"], "roll-back"),
        (["model.attention.soft_cap=30.0", "model.attention.softmax=fp32"], "soft-cap"),
        (["optimizer.clip=0.3", "rate-factor=0.5"], "clip+lower-rate"),
        (["precision=bf16"], "precision"),
    ],
)
def test_what_a_fork_changed_is_called_as_a_policy_is(change: list[str], treatment: str) -> None:
    assert treatment_of(change) == treatment
