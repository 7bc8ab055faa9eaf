"""What a watch says about logs that do not grow by lines: documents, TensorBoard, trackers' databases, run folders."""

import json
import sqlite3
import tarfile
from contextlib import closing
from pathlib import Path

import pytest

from stabilitylab.errors import InputError
from stabilitylab.runs.folder import RunFolder
from stabilitylab.sinks import ParquetSink
from stabilitylab.telemetry import LOSS, Event, Key, Samples
from stabilitylab.watching.stores import RunFollower
from tests.stabilitylab.watching.growing import Watched, losses


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
