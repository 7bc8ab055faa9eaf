"""The monitor reports an alarm at once, with its telemetry on disk by then, and no listener can stop training."""

from __future__ import annotations

import logging
import math
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stabilitylab import Event, Monitor, SpikeDetector
from stabilitylab.monitoring.alarms import Alarms, alarm_line
from stabilitylab.runs import load_run
from tests.patience import PATIENCE
from tests.stabilitylab.recording import Recording


class Scripted:
    """A detector that reports what the test scripts, and keeps its inputs."""

    def __init__(self, says: Mapping[int, Event | Exception] = {}) -> None:
        self.says, self.given = says, dict[int, dict[str, float]]()

    def update(self, step: int, values: Mapping[str, float]) -> Sequence[Event]:
        self.given[step] = dict(values)
        said = self.says.get(step)
        if isinstance(said, Exception):
            raise said
        return [] if said is None else [said]

    def finish(self) -> Sequence[Event]:
        return []

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def spike(step: int, phase: str = "onset", kind: str = "spike", **data: Any) -> Event:
    about = {"episode": 1, "phase": phase, "signal": "train/-/loss", "onset": step, "height": 0.87} | data
    return Event(step=step, kind=kind, data=about)


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (spike(3, baseline=2.314), "step 3: spike: loss has risen by 0.87 over its level of 2.314"),
        (
            spike(9, kind="divergence", onset=4, precursors={"update/-/rms_over_rate": 12, "b": 0}),
            "step 9: divergence: loss has risen by 0.87 over its level, since step 4; before it "
            "update/-/rms_over_rate (12 steps)",
        ),
        (
            spike(5, signal="train/-/gradient_norm", height=math.log(4)),
            "step 5: spike: gradient norm is 4 times its level",
        ),
        (
            spike(
                7,
                kind="non-finite",
                height=None,
                value="nan",
                site="layers.3.down",
                tensor="activation_gradient",
            ),
            "step 7: non-finite: loss is nan; first in layers.3.down (activation gradient)",
        ),
        (spike(8, kind="dead", height=None, onset=6), "step 8: dead: loss is exactly 0, since step 6"),
        (spike(8, kind="frozen", height=None), "step 8: frozen: loss repeats itself"),
        (
            Event(step=2, kind="site-departure", data={"metric": "attention/a.b/score_max", "factor": 31.0}),
            "step 2: site-departure: attention/a.b/score_max is 31 times its level",
        ),
    ],
)
def test_what_and_where_in_one_line(event: Event, line: str) -> None:
    assert alarm_line(event) == line


def test_an_episode_is_told_when_it_begins_and_when_it_changes(caplog: pytest.LogCaptureFixture) -> None:
    heard: list[Event] = []
    alarms = Alarms(heard.append)
    events = [
        spike(1, kind="hard-batch"),
        spike(2, "change"),
        spike(3, "change"),
        spike(4, "change", "divergence"),
    ]
    alarms.hear([*events, spike(9, "end", "divergence"), spike(12, episode=2), spike(13, "end", episode=2)])
    assert [(e.step, e.kind) for e in heard] == [(2, "spike"), (4, "divergence"), (12, "spike")]
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 3


def test_a_monitor_tells_and_hands_on_what_it_finds(caplog: pytest.LogCaptureFixture) -> None:
    heard: list[tuple[int, Event]] = []
    detector = Scripted({30: spike(30)})
    now = 0
    with Monitor(
        nn.Linear(2, 2), detector=detector, on_event=lambda e: heard.append((now, e)), probes=[]
    ) as monitor:
        for now in range(40):
            monitor.step(now, loss=1.0)
        assert [(step, event.kind) for step, event in heard] == [(30, "spike")]
        monitor.event(Event(step=39, kind="site-departure", data={"metric": "x/y/z", "factor": 20.0}))
    assert [event.kind for _, event in heard] == ["spike", "site-departure"]
    assert "step 30: spike: loss has risen by 0.87" in caplog.text


def test_standard_error_has_the_line_without_any_setting() -> None:
    code = """
import torch
from stabilitylab import Monitor
with Monitor(torch.nn.Linear(2, 2), probes=[]) as monitor:
    for step in range(60):
        monitor.step(step, loss=float("nan") if step == 40 else 1.0 + .01 * (step % 3))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    assert done.stderr == "step 40: non-finite: loss is nan\n"


def test_a_non_finite_value_says_where_it_came_from(caplog: pytest.LogCaptureFixture) -> None:
    model, sink = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)), Recording()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, every=1, sinks=[sink]) as monitor:
        for step in range(4):
            if step == 3:
                model[1].weight.data[0, 0] = math.nan  # type: ignore[union-attr, operator]
            loss = model(torch.ones(2, 4)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step(step, loss=loss)
    found = {e.data["signal"]: e for e in sink.events if e.kind == "non-finite" and e.is_alarm}[
        "train/-/loss"
    ]
    assert (found.data["site"], found.data["tensor"]) == ("1", "activation")
    (record,) = caplog.records
    said = record.getMessage()
    assert said.startswith("step 3: non-finite: ")
    assert "loss" in said
    assert said.endswith(" is nan; first in 1 (activation)")


@pytest.mark.parametrize("culprit", ["detector", "on_event"])
def test_what_raises_does_not_stop_training(caplog: pytest.LogCaptureFixture, culprit: str) -> None:
    def explode(event: Event) -> None:
        raise ZeroDivisionError

    sink, said = Recording(), {3: ZeroDivisionError("no") if culprit == "detector" else spike(3), 5: spike(5)}
    detector = Scripted(said)  # type: ignore[arg-type]
    with Monitor(nn.Linear(2, 2), detector=detector, on_event=explode, sinks=[sink], probes=[]) as monitor:
        for step in range(8):
            monitor.step(step, loss=1.0)
    assert sink.steps("train/-/loss") == list(range(8))
    assert caplog.text.count("training continues") == 1
    if culprit == "detector":
        assert max(detector.given) == 3
        (event,) = sink.events
        assert (event.kind, event.data["detector"]) == ("telemetry-lost", "Scripted")
    else:
        assert [event.step for event in sink.events] == [3, 5]


def test_the_loss_that_a_detector_names_is_the_one_that_it_sees() -> None:
    detector = SpikeDetector(loss="train/-/d_loss")
    with Monitor(nn.Linear(2, 2), detector=detector, probes=[]) as monitor:
        found = []
        for step in range(200):
            found += monitor.step(
                step, loss=-1.0, d_loss=math.nan if step == 150 else 2.0 + 0.01 * (step % 7)
            )
    assert {(e.kind, e.data["signal"]) for e in found} == {("non-finite", "train/-/d_loss")}


def test_a_run_that_is_killed_after_an_alarm_keeps_what_led_to_it(tmp_path: Path) -> None:
    code = f"""
import os, signal, time, torch
from stabilitylab import Monitor, load_run
monitor = Monitor(torch.nn.Linear(2, 2), probes=[], out={str(tmp_path)!r}, tensorboard=False)
step = 0
while step < 52 or (step < 70 and len(load_run({str(tmp_path)!r}).series("train/-/loss")) < 52):
    monitor.step(step, loss=float("nan") if step == 50 else 1.0 + .01 * (step % 3))
    time.sleep(.55 * (step > 49))
    step += 1
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], stderr=subprocess.DEVNULL, timeout=PATIENCE, check=False
    )
    assert done.returncode == -signal.SIGKILL
    steps = list(load_run(tmp_path).series("train/-/loss").index)
    assert steps[:51] == list(range(51))
    assert (
        len(steps) >= 52
    )  # and of what follows all but the last second, here within 11 on any machine: others are kept for 20
