"""Around an alarm every step is on disk; elsewhere only the scheduled ones."""

import pytest
import torch

from stabilitylab import Monitor
from stabilitylab.errors import InputError
from stabilitylab.monitoring.flight_recorder import FlightRecorder
from stabilitylab.runs import load_run
from stabilitylab.sinks import MemorySink
from stabilitylab.telemetry import Event, Key, Samples

LOSS, NORM = Key("train", "-", "loss"), Key("gradient", "w", "l2")


def flush(*steps):
    return Samples.of([(s, key, float(s)) for s in steps for key in (LOSS, NORM)])


def steps_of(memory, family):
    frame = memory.frame
    return sorted(frame[frame["family"] == family]["step"].tolist())


def alarm(step, phase="onset", kind="spike"):
    return Event(step=step, kind=kind, data={"phase": phase})


def test_without_an_alarm_only_what_is_due_is_written():
    memory = MemorySink()
    recorder = FlightRecorder(memory, keep=5, every=10)
    for step in range(31):
        recorder.write(flush(step), ())
    recorder.close()
    assert steps_of(memory, "train") == list(range(31))
    assert steps_of(memory, "gradient") == [0, 10, 20, 30]
    assert memory.closed


@pytest.mark.parametrize("together", [1, 4])
def test_an_alarm_brings_every_step_around_it(together):
    memory = MemorySink()
    recorder = FlightRecorder(memory, keep=8, every=10, after=3)
    for first in range(0, 40, together):
        events = [alarm(24)] if first <= 24 < first + together else []
        recorder.write(flush(*range(first, first + together)), events)
    written = steps_of(memory, "gradient")
    assert set(written) >= {0, 10, 20, 30, *range(24 - 8 + together, 28)}
    assert len(written) == len(set(written))
    assert not set(written) & {*range(1, 10), *range(31, 40)}


def test_hard_batches_and_ends_are_no_alarms():
    memory = MemorySink()
    recorder = FlightRecorder(memory, keep=8, every=10)
    for step in range(9):
        recorder.write(flush(step), [alarm(step, kind="hard-batch"), alarm(step, phase="end")])
    assert steps_of(memory, "gradient") == [0]
    assert len(memory.events) == 18


def test_superseded_rows_are_not_brought_back():
    memory = MemorySink()
    recorder = FlightRecorder(memory, keep=50, every=100)
    for step in range(1, 20):
        recorder.write(flush(step), ())
    recorder.write(flush(10), [Event(step=10, kind="rewind")])
    recorder.write(flush(11), [alarm(11)])
    assert steps_of(memory, "gradient") == list(range(1, 12))


def test_memory_is_bounded():
    recorder = FlightRecorder(MemorySink(), keep=10, every=1000)
    for step in range(1, 500):
        recorder.write(flush(step), ())
    assert sum(len(held) for held in recorder._held) <= 11
    with pytest.raises(InputError, match="at least 1"):
        FlightRecorder(MemorySink(), keep=0, every=1)


def test_the_monitor_writes_every_step_around_a_spike(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Monitor(model, optimizer, out=tmp_path / "run", every=25, recorder=10, tensorboard=False) as monitor:
        for step in range(100):
            loss = model(torch.randn(8, 4)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step(step, loss=2.0 + 3.0 * (60 <= step < 66))
    measured = set(load_run(tmp_path / "run").series("gradient/weight/l2").index)
    assert measured >= {0, 25, 50, 75, *range(53, 76)}
    assert not measured & {*range(1, 25), *range(26, 50), *range(81, 100)}
