"""What a watch says of logs that grow, turn over, are written anew, and of stores: each thing once, at its value."""

import json
import sqlite3
import tarfile
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from stabilitylab.errors import InputError
from stabilitylab.runs.folder import RunFolder
from stabilitylab.sinks import ParquetSink
from stabilitylab.spikes.detector import SpikeDetector
from stabilitylab.telemetry import LOSS, Event, Key, Samples
from stabilitylab.watching.rules import RULES
from stabilitylab.watching.stores import RunFollower
from tests.stabilitylab.watching import growing
from tests.stabilitylab.watching.growing import Watched, losses, megatron

DOCS = Path(__file__).parents[3] / "docs" / "watch.md"


@pytest.fixture(autouse=True)
def closed():
    yield
    while growing.OPEN:
        growing.OPEN.pop().end()


@pytest.fixture
def log(tmp_path):
    return tmp_path / "train.log"


def append(file: Path, text: str) -> None:
    with file.open("a") as opened:
        opened.write(text)


def test_a_spike_is_told_at_the_line_at_which_the_detector_tells_it(log, tmp_path):
    curve = losses(700, spike=600)
    detector = SpikeDetector()
    told = next(
        step
        for step, loss in enumerate(curve)
        for event in detector.update(step, {LOSS: loss})
        if event.kind == "spike"
    )
    watched = Watched(log, tmp_path / "state")
    assert watched.look() == []
    assert "not there yet" in watched.watch.problem
    for step, loss in enumerate(curve):
        append(log, megatron(step, loss))
        if step % 50 == 0 or step >= 600:
            new = [one for one in watched.look() if one[0] == "spike"]
            assert new == ([("spike", told)] if step == told else [])
    assert [alert.rule for alert in watched.said] == ["spike", "over"]
    assert watched.said[0].text.startswith(f"step {told}: spike: lm loss has risen by")


def test_a_vanishing_loss_is_nan_and_one_line_ends_it(log, tmp_path):
    watched = Watched(log, tmp_path / "state")
    append(log, "".join(megatron(k, x) for k, x in enumerate(losses(200))))
    assert watched.look() == []
    append(log, megatron(200, None))
    assert watched.look() == [("non-finite", 200)]
    append(log, megatron(201, None))
    assert watched.look() == []


def test_half_a_line_is_left_for_later(log, tmp_path):
    watched = Watched(log, tmp_path / "state")
    text = "".join(megatron(k, x) for k, x in enumerate(losses(100)))
    append(log, text[:-40])
    watched.look()
    assert watched.watch.judges[""].curves[LOSS].step == 98
    append(log, text[-40:])
    watched.look()
    assert watched.watch.judges[""].curves[LOSS].step == 99


@pytest.mark.parametrize("how", ["renamed", "copied", "shorter"])
def test_rotation_and_truncation_lose_nothing_that_is_there(log, tmp_path, how):
    curve = losses(700, spike=600)
    lines = [megatron(k, x) for k, x in enumerate(curve)]
    watched = Watched(log, tmp_path / "state")
    log.write_text("".join(lines[:500]))
    watched.look()
    append(log, "".join(lines[500:520]))
    if how == "renamed":  # its last lines are read after it has lost its name
        log.rename(log.with_suffix(".log.1"))
        log.write_text("".join(lines[520:610]))
    else:
        watched.look()
        log.write_text("".join(lines[520:610]) * (1 if how == "shorter" else 8))
    watched.look()
    said = watched.rules()
    assert said[0] == ("rotated" if how == "renamed" else "truncated")
    assert "spike" in said
    assert watched.watch.judges[""].curves[LOSS].step == 609
    assert "restarted" not in said or how == "copied"


def test_a_table_written_anew_with_another_column_repeats_nothing(log, tmp_path):
    curve = losses(700, spike=600)
    watched = Watched(log.with_suffix(".csv"), tmp_path / "state")
    file = watched.path
    file.write_text("step,loss\n" + "".join(f"{k},{x}\n" for k, x in enumerate(curve[:650])))
    watched.look()
    # Lightning's CSVLogger rewrites its file when a metric comes in.
    file.write_text("step,acc,loss\n" + "".join(f"{k},1.0,{x}\n" for k, x in enumerate(curve)))
    watched.look()
    assert watched.rules() == ["spike", "over", "truncated"]
    assert watched.watch.judges[""].curves[LOSS].step == 699


def test_a_checkpoint_taken_up_again_is_a_restart_and_a_count_from_zero_another_run(log, tmp_path):
    curve = losses(300)
    watched = Watched(log, tmp_path / "state")
    append(log, "".join(megatron(k, x) for k, x in enumerate(curve, start=1)))
    watched.look()
    append(log, "".join(megatron(k, curve[k]) for k in range(200, 260)))
    assert watched.look() == [("restarted", 200)]
    assert watched.watch.judges[""].piece == 0
    append(log, "".join(megatron(k, x) for k, x in enumerate(losses(300, spike=250, seed=1), start=1)))
    found = watched.look()
    assert watched.watch.judges[""].piece == 1
    assert [rule for rule, _ in found] == ["restarted", "spike", "over"] or [rule for rule, _ in found] == [
        "spike",
        "over",
    ]


def test_nothing_is_said_twice_over_ends_and_begins(log, tmp_path):
    lines = [megatron(k, x) for k, x in enumerate(losses(900, spike=600))]
    watched = Watched(log, tmp_path / "state")
    for end in (300, 605, 620, 700, 900):
        log.write_text("".join(lines[:end]))
        watched.look()
        watched.end()
        watched.begin()
    assert watched.rules() == ["spike", "over"]
    assert watched.watch.judges[""].curves[LOSS].step == 899
    # From the state before the spike on, as after a kill: the journal knows.
    state = json.loads((tmp_path / "state" / "state.json").read_text())
    watched.end()
    (tmp_path / "state" / "state.json").unlink()
    watched.begin()
    watched.look()
    assert watched.rules() == ["spike", "over"]
    assert state["values"] == watched.watch.values == 900


def test_a_silent_run_is_told_once_and_so_is_its_voice(log, tmp_path):
    lines = [megatron(k, x) for k, x in enumerate(losses(100))]
    watched = Watched(log, tmp_path / "state", silent_after=60.0)
    append(log, "".join(lines[:50]))
    watched.look()
    watched.watch.last_value -= 61
    assert watched.look() == [("silent", 49)]
    assert watched.look() == []
    watched.end()
    watched.begin()
    assert watched.look() == []
    append(log, "".join(lines[50:]))
    assert watched.look() == [("speaking-again", None)]


def test_what_cannot_be_chosen_is_said_as_spikes_says_it(log, tmp_path):
    log.write_text(
        "".join(json.dumps({"step": k, "gen_loss": 1.0, "disc_loss": 2.0}) + "\n" for k in range(40))
    )
    watched = Watched(log, tmp_path / "state")
    watched.look()
    assert "--loss gen_loss or --loss disc_loss" in watched.watch.problem
    with pytest.raises(InputError, match="several loss columns"):
        watched.look(last=True)
    watched.end()
    again = Watched(log, tmp_path / "other", loss="gen_loss")
    again.look()
    assert again.watch.judges[""].curves[LOSS].step == 39


def test_a_long_preface_is_said_once_and_the_log_is_read_when_it_begins(log, tmp_path):
    watched = Watched(log, tmp_path / "state")
    append(log, "compiling kernels, please wait\n" * 40_000)
    assert watched.look() == [("unreadable", None)]
    watched.watch._retry_at = 0.0
    assert watched.look() == []
    append(log, "".join(megatron(k, x) for k, x in enumerate(losses(640, spike=600))))
    watched.watch._retry_at = 0.0
    assert [rule for rule, _ in watched.look()] == ["spike", "over"]


def test_a_damaged_store_is_said_once(tmp_path):
    state = tmp_path / "trainer_state.json"
    state.write_text(json.dumps({"log_history": [{"step": k, "loss": 3.0 - k / 100} for k in range(50)]}))
    watched = Watched(state, tmp_path / "state")
    watched.look()
    state.write_bytes(bytes(100))
    watched.look()
    watched.watch._source.follower._failed_since -= 100
    assert watched.look() == [("unreadable", None)]
    state.write_text(json.dumps({"log_history": [{"step": k, "loss": 3.0 - k / 100} for k in range(60)]}))
    watched.look()
    assert watched.watch.judges[""].curves[LOSS].step == 59


def test_records_over_several_lines_wait_for_the_rest(log, tmp_path):
    watched = Watched(log, tmp_path / "state")
    for k, x in enumerate(losses(30), start=1):
        append(log, f"2026-08-08 INFO [x:68] [step={k}/3,000,epoch=1]\n    optim/total grad norm=1.0\n")
        watched.look()
        # A beginning without a loss is no log yet, and is looked at again after a while.
        watched.watch._retry_at = 0.0
        append(log, f"    train/CE loss={x:.4f}\n    train/PPL=9.0\n")
        watched.look()
    judge = watched.watch.judges[""]
    assert judge.curves[LOSS].step == 29
    assert len(judge.curves[LOSS].values) == 29


def test_a_document_is_read_again_and_only_its_new_rows_count(tmp_path):
    curve = losses(700, spike=600)
    folder = tmp_path / "out"
    watched = Watched(folder, tmp_path / "state")
    for end in (100, 300, 650):
        checkpoint = folder / f"checkpoint-{end}"
        checkpoint.mkdir(parents=True)
        history = [{"step": k, "loss": x} for k, x in enumerate(curve[:end])]
        (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": history}))
        watched.watch._located_at = 0.0
        watched.look()
    assert watched.rules() == ["spike", "over"]
    assert watched.watch.values == 650


WHOLE = {
    "a list of records": lambda rows: json.dumps([{"step": k, "loss": x} for k, x in rows]),
    "a list without its end": lambda rows: (
        "[\n" + "".join(f'{{"step": {k}, "loss": {x}}},\n' for k, x in rows)
    ),
    "columns": lambda rows: json.dumps({"step": [k for k, _ in rows], "loss": [x for _, x in rows]}),
    "lines in a document": lambda rows: json.dumps(
        {"events": [{"message": f"step {k} loss {x:.4f}"} for k, x in rows]}
    ),
    "a table below prose": lambda rows: (
        "# Report\n\nA day of training.\n\n| step | loss |\n|---:|---:|\n"
        + "".join(f"| {k} | {x:.4f} |\n" for k, x in rows)
    ),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_what_is_written_as_a_whole_is_watched(kind, tmp_path):
    path = tmp_path / "log"
    rows = list(enumerate(losses(640, spike=600)))
    watched = Watched(path, tmp_path / "state")
    for end in (100, 300, 605, 640):
        path.write_text(WHOLE[kind](rows[:end]))
        watched.look()
    assert watched.rules() == ["spike", "over"]
    assert watched.watch.values == 640


def test_an_archive_is_refused_at_once(tmp_path):
    path = tmp_path / "logs.tar.gz"
    (tmp_path / "train.log").write_text("step 1 loss 2.0\n" * 9)
    with tarfile.open(path, "w:gz") as archive:
        archive.add(tmp_path / "train.log", "train.log")
    with pytest.raises(InputError, match=r"is a tar archive: unpack it, and give the log in it$"):
        Watched(path, tmp_path / "state").look()


def test_a_tensorboard_folder(tmp_path):
    from tensorboard.compat.proto.event_pb2 import Event as Record
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    curve = losses(640, spike=600)
    folder = tmp_path / "tb"
    writer = EventFileWriter(str(folder))
    watched = Watched(folder, tmp_path / "state")
    for k, x in enumerate(curve):
        value = Summary(value=[Summary.Value(tag="train/loss", simple_value=x)])
        writer.add_event(Record(step=k, wall_time=1.7e9 + k, summary=value))
        if k in (300, 605, 639):
            writer.flush()
            watched.look()
            watched.end()
            watched.begin()
    writer.close()
    assert watched.rules() == ["spike", "over"]
    assert watched.watch.values == 640


def test_databases_of_mlflow_and_trackio(tmp_path):
    curve = losses(640, spike=600)
    for kind in ("mlflow", "trackio"):
        path = tmp_path / f"{kind}.db"
        with sqlite3.connect(path) as database:
            if kind == "mlflow":
                database.execute("CREATE TABLE metrics (key, value, timestamp, run_uuid, step, is_nan)")
            else:
                database.execute("CREATE TABLE metrics (id INTEGER PRIMARY KEY, run_name, step, metrics)")
        watched = Watched(path, tmp_path / f"{kind}-state")
        for begin, end in ((0, 300), (300, 610), (610, 640)):
            with sqlite3.connect(path) as database:
                for k in range(begin, end):
                    if kind == "mlflow":
                        for key, value in (("loss", curve[k]), ("grad_norm", 1.0)):
                            row = (key, value, k, "0123456789", k, 0)
                            database.execute("INSERT INTO metrics VALUES (?, ?, ?, ?, ?, ?)", row)
                    else:
                        row = ("mine", k, json.dumps({"loss": curve[k]}))
                        database.execute(
                            "INSERT INTO metrics (run_name, step, metrics) VALUES (?, ?, ?)", row
                        )
            watched.look()
            watched.end()
            watched.begin()
        assert watched.rules() == ["spike", "over"], kind
        assert watched.watch.values == 640


def test_a_run_folder_tells_what_its_monitor_recorded_and_ends_with_it(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.claim()
    sink = ParquetSink(run.telemetry)
    curve = losses(640, spike=600)
    watched = Watched(run.path, tmp_path / "state")
    for begin, end in ((0, 300), (300, 640)):
        steps = range(begin, end)
        sink.write(Samples.of([(k, Key("train", "-", "loss"), curve[k]) for k in steps]), [])
        sink.flush()
        if end == 640:
            data = {
                "episode": 1,
                "phase": "onset",
                "signal": LOSS,
                "onset": 600,
                "height": 2.0,
                "baseline": 2.1,
            }
            run.append_events([Event(step=601, kind="spike", data=data)])
            run.append_events(
                [Event(step=601, kind="site-departure", data={"site": "layers.3", "factor": 9.0})]
            )
        watched.look()
    assert [(a.rule, a.step) for a in watched.said] == [("spike", 601), ("site-departure", 601)]
    assert "layers.3" in watched.said[1].text
    assert watched.watch.judges[""].curves[LOSS].step == 639
    run.append_events([Event(step=640, kind="run-end")])
    assert watched.look() == [("run-ended", 640)]
    assert watched.watch.is_over
    sink.close()
    run.release()


def test_a_run_folder_without_events_is_judged(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.claim()
    sink = ParquetSink(run.telemetry)
    sink.write(
        Samples.of([(k, Key("train", "-", "loss"), x) for k, x in enumerate(losses(640, spike=600))]), []
    )
    sink.close()
    watched = Watched(run.path, tmp_path / "state")
    watched.look()
    assert watched.rules() == ["spike", "over"]
    run.release()


def test_whole_and_grown_logs_are_judged_alike(log, tmp_path):
    curve = losses(1500, spike=800)
    rng = np.random.default_rng(1)
    text = "".join(megatron(k, x) for k, x in enumerate(curve, start=1))
    whole = Watched(log, tmp_path / "whole")
    log.write_text(text)
    whole.look()
    grown = Watched(tmp_path / "grown.log", tmp_path / "grown")
    at = 0
    while at < len(text):
        size = int(rng.integers(1, 4000))
        append(grown.path, text[at : at + size])
        at += size
        grown.look()
    assert [a.id for a in grown.said] == [a.id for a in whole.said]
    assert [a.text for a in grown.said] == [a.text for a in whole.said]


def test_the_rules_are_those_of_the_page():
    rows = [
        line.split("|") for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith("| `")
    ]
    told = {row[1].strip().strip("`"): (row[2].strip(), row[3].strip()) for row in rows}
    assert told == {rule.id: (rule.severity, rule.meaning) for rule in RULES.values()}


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="tells by Linux' list of locks")
def test_a_run_that_was_killed_is_lost_and_one_that_waits_is_silent(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.claim()
    run.append_events([Event(step=0, kind="run-start", data={})])
    assert run.is_being_written() is True
    watched = Watched(run.path, tmp_path / "one", silent_after=60.0)
    watched.look()
    watched.watch.last_value -= 61
    assert [rule for rule, _ in watched.look()] == ["silent"]
    run.release()
    assert run.is_being_written() is False
    watched = Watched(run.path, tmp_path / "two", silent_after=60.0)
    watched.look()
    watched.watch.last_value -= 61
    assert [rule for rule, _ in watched.look()] == ["run-lost"]


# ------------------------------------------------------------------------------------------------ files that go away


def test_what_vanishes_between_two_looks_is_looked_for_again(tmp_path, monkeypatch):
    """A run folder whose telemetry cannot be reached just now: nothing is lost, and only what lasts is told."""
    run = RunFolder(tmp_path / "run")
    run.claim()
    sink = ParquetSink(run.telemetry)
    sink.write(Samples.of([(k, Key("train", "-", "loss"), 2.0) for k in range(50)]), [])
    sink.flush()
    run.append_events([Event(step=10, kind="telemetry-lost", data={"reason": "full"})])
    watched = Watched(run.path, tmp_path / "state")
    where = RunFollower._new_rows

    def gone(self):
        raise FileNotFoundError(2, "No such file or directory", "part-000001.parquet")

    monkeypatch.setattr(RunFollower, "_new_rows", gone)
    assert watched.look() == [("telemetry-lost", 10)]  # read before the telemetry failed, and not read again
    assert watched.look() == []
    assert watched.watch.problem == "part-000001.parquet: no such file or directory"
    watched.watch._unreachable_since -= 61.0
    assert [rule for rule, _ in watched.look()] == ["unreadable"]
    assert watched.look() == []
    monkeypatch.setattr(RunFollower, "_new_rows", where)
    watched.look()
    assert watched.watch.values == 50
    assert watched.watch.problem is None
    sink.close()
    run.release()


def test_a_folder_that_may_not_be_entered_is_waited_for(log, tmp_path, monkeypatch):
    """``is_dir`` raises where the network's file system does not answer, or rights were taken away."""
    watched = Watched(log, tmp_path / "state")
    append(log, "".join(megatron(k, x) for k, x in enumerate(losses(100))))
    watched.look()
    assert watched.watch.values == 100
    is_dir = Path.is_dir

    def stale(self):
        if self == log:
            raise OSError(116, "Stale file handle", str(self))
        return is_dir(self)

    monkeypatch.setattr(Path, "is_dir", stale)
    watched.watch._located_at = -1e9
    append(log, megatron(100, 2.0))
    assert watched.look() == []
    assert watched.watch.values == 101  # an open file is read all the same


@pytest.mark.parametrize("kind", ["mlflow", "trackio"])
def test_a_database_made_anew_is_read_from_its_start(kind, tmp_path):
    path = tmp_path / "runs.db"

    def make(curve):
        path.unlink(missing_ok=True)
        with closing(sqlite3.connect(path)) as database, database:
            if kind == "mlflow":
                database.execute("CREATE TABLE metrics (key, value, timestamp, run_uuid, step, is_nan)")
                rows = [("loss", x, k, "0123456789", k, 0) for k, x in enumerate(curve)]
                database.executemany("INSERT INTO metrics VALUES (?, ?, ?, ?, ?, ?)", rows)
            else:
                database.execute("CREATE TABLE metrics (id INTEGER PRIMARY KEY, run_name, step, metrics)")
                pairs = [("mine", k, json.dumps({"loss": x})) for k, x in enumerate(curve)]
                database.executemany("INSERT INTO metrics (run_name, step, metrics) VALUES (?, ?, ?)", pairs)

    make(losses(800))
    watched = Watched(path, tmp_path / "state")
    assert watched.look() == []
    make(losses(700, spike=600, seed=1))
    assert [rule for rule, _ in watched.look()] == ["truncated", "restarted", "spike", "over"]
    assert watched.watch.values == 1500
