"""Sinks to trackers: what they send, how seldom, what a failing or hanging tracker costs; and the real libraries, where installed.

The default packages for tests do not include the real ones: pip install 'stabilitylab[trackers]'.
"""

import contextlib
import math
import re
import sqlite3
import threading
import time
from pathlib import Path

import pytest
import torch

from stabilitylab import Monitor
from stabilitylab.errors import InputError
from stabilitylab.logs.recognise import open_logs
from stabilitylab.sinks import trackers
from stabilitylab.sinks.tracker import EPISODE, KEYS, ROWS, TrackerSink, thinned
from stabilitylab.sinks.trackers import names_of
from stabilitylab.telemetry import LOSS, Event, Key, Samples
from tests.patience import wait_until

LOSS_KEY = "stability/loss"


class Kept(TrackerSink):
    """A tracker that keeps what it is sent, fails while ``broken``, hangs on ``hung``."""

    def __init__(self, **options):
        super().__init__(**options)
        self.rows, self.pictures, self.alerts, self.sendings, self.ended = {}, {}, [], [], None
        self.senders = set()
        self.broken, self.hung = False, threading.Event()
        self.hung.set()

    def send(self, rows):
        self.senders.add(threading.get_ident())
        self.hung.wait()
        if self.broken:
            raise ConnectionError("no route to https://key@host")
        self.sendings.append(len(rows))
        self.rows.update({step: dict(row) for step, row in rows.items()})

    def show(self, step, pictures):
        self.pictures.update(pictures)

    def alert(self, step, title, text, *, critical):
        if self.broken:
            raise ConnectionError("no route to https://key@host")
        self.alerts.append((step, title, text, critical))

    def end(self, episodes):
        self.ended = episodes


def samples(steps, loss=lambda step: 2.0):
    keys = [Key("train", "-", "loss"), Key("train", "-", "gradient_norm"), Key("train", "-", "tokens")]
    keys += [Key("gradient", f"layers.{i}.weight", "l2") for i in range(50)]
    return Samples.of(
        [(step, key, loss(step) if key.statistic == "loss" else 1.0) for step in steps for key in keys]
    )


def spike(step, kind="spike", phase="onset", episode=1):
    data = {
        "episode": episode,
        "phase": phase,
        "signal": LOSS,
        "onset": step,
        "peak": step,
        "end": None,
        "height": 1.0,
        "baseline": 2.0,
    }
    return Event(step=step, kind=kind, data=data)


def test_a_few_keys_are_sent_whatever_is_measured():
    sink = Kept(seconds=0.01)
    sink.write(samples(range(5)), [spike(3)])
    sink.close()
    sent = {key for row in sink.rows.values() for key in row} | set(sink.pictures)
    assert sent == {LOSS_KEY, "stability/gradient_norm", EPISODE} | {
        "stability/loss_with_spikes", "stability/spikes", "stability/map_gradient"}  # fmt: skip
    assert sent <= set(KEYS)
    assert len(KEYS) == 13
    assert sink.rows[3][EPISODE] == 2.0
    assert sink.alerts == [(3, "spike", "loss at step 3: 1 above its level of 2", False)]
    assert sink.ended == 1
    assert all(png.startswith(b"\x89PNG") for png in sink.pictures.values())


def test_the_page_names_the_keys():
    page = (Path(__file__).parents[3] / "docs" / "trackers.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `stability/")]
    assert {key for row in rows for key in re.findall("`(.*?)`", row)} == set(KEYS)
    assert "Thirteen keys" in page


def test_sendings_are_seldom_and_short_and_keep_extremes():
    began = time.monotonic()
    sink = Kept(seconds=0.2, pictures=False)
    peaks = {777: 50.0, 1234: math.nan, 1999: 3.0}
    for begin in range(0, 2000, 10):
        sink.write(samples(range(begin, begin + 10), lambda step: peaks.get(step, 2.0)), [])
    sink.close()
    # Before each but the last it has waited for .2 s.
    assert 0.2 * (len(sink.sendings) - 1) <= time.monotonic() - began
    assert all(rows <= ROWS + 3 for rows in sink.sendings)
    assert sink.rows[777][LOSS_KEY] == 50.0
    assert math.isnan(sink.rows[1234][LOSS_KEY])
    assert 1999 in sink.rows


def test_thinning_keeps_what_matters():
    rows = {step: {LOSS_KEY: float(step % 7)} for step in range(1000)}
    rows[500][LOSS_KEY], rows[503] = math.nan, {LOSS_KEY: 0.0, EPISODE: 1.0}
    kept = thinned(rows, 50)
    assert len(kept) <= 53
    assert {500, 503, 999} <= kept.keys()
    assert thinned(kept, 100) == kept


def test_a_failing_tracker_is_said_once_loses_nothing_and_costs_no_time(caplog):
    sink = Kept(seconds=0.02, pictures=False)
    sink.broken = True
    model = torch.nn.Linear(3, 3)
    with Monitor(model, sinks=[sink], every=0, flush_every=1) as monitor:
        for step in range(40):
            monitor.step(step, loss=2.0)
            time.sleep(0.005)
        wait_until(lambda: sink.senders)
        assert threading.get_ident() not in sink.senders  # training waits for nothing
        sink.broken = False
    assert sorted(sink.rows) == list(range(40))
    told = [record for record in caplog.records if "Kept" in record.getMessage()]
    assert len(told) == 1
    assert "ConnectionError" in told[0].getMessage()


def test_an_alert_that_could_not_be_sent_is_sent_again():
    """A tracker may be away just when a spike comes: the sink sends the alert once it is back."""
    sink = Kept(seconds=0.02, pictures=False)
    sink.broken = True
    with contextlib.suppress(RuntimeError):
        sink.write(samples([1]), [spike(1)])
    wait_until(lambda: sink._failures >= 2)
    assert sink.alerts == []
    sink.broken = False
    wait_until(lambda: sink.alerts)
    with contextlib.suppress(RuntimeError):  # the failure, which the monitor says
        sink.close()
    assert [(step, title) for step, title, *_ in sink.alerts] == [(1, "spike")]


def test_a_hanging_tracker_is_left_behind(monkeypatch, caplog):
    monkeypatch.setattr("stabilitylab.sinks.tracker.CLOSE_SECONDS", 0.3)
    sink = Kept(seconds=0.01, pictures=False)
    sink.hung.clear()
    model = torch.nn.Linear(3, 3)
    # Nothing answers before the end of the test: who waited for it would never come there.
    with Monitor(model, sinks=[sink], every=0, flush_every=1) as monitor:
        for step in range(20):
            monitor.step(step, loss=2.0)
    assert "no answer within 0.3 s" in caplog.text
    sink.hung.set()


def test_a_tracker_that_does_not_begin_keeps_no_training_waiting(monkeypatch, caplog):
    """MLflow tries a server that is down for four minutes before it says so."""
    answers = threading.Event()

    def hangs(*_):
        return trackers._within(0.1, answers.wait)

    monkeypatch.setitem(trackers._OPEN, "mlflow", hangs)
    assert trackers.open_trackers(["mlflow"], None) == []
    assert "mlflow cannot begin a run (TimeoutError: no answer within 0.1 s)" in caplog.text
    answers.set()
    assert trackers._within(10.0, answers.wait) is True
    with pytest.raises(ZeroDivisionError):
        trackers._within(10.0, lambda: 1 // 0)


def test_a_kind_that_changes_is_told_and_many_are_told_as_one():
    sink = Kept(seconds=0.05, pictures=False)
    sink.write(
        samples([1]),
        [spike(1), spike(1), spike(1, kind="divergence"), spike(1, kind="hard-batch", episode=9)],
    )
    wait_until(lambda: sink.alerts)
    sink.write(samples([2]), [spike(2, episode=k) for k in range(2, 6)])
    sink.close()
    assert [alert[1] for alert in sink.alerts] == ["spike", "spike"]
    assert "and 1 more: divergence" in sink.alerts[0][2]
    assert sink.alerts[0][3]
    assert "and 3 more" in sink.alerts[1][2]


def test_a_rewind_takes_back_what_was_not_sent():
    sink = Kept(seconds=60, pictures=False)
    sink.write(samples(range(10)), [spike(8)])
    sink.write(samples([5], lambda step: 7.0), [Event(step=5, kind="rewind")])
    sink.close()
    assert sorted(sink.rows) == [0, 1, 2, 3, 4, 5]
    assert sink.rows[5][LOSS_KEY] == 7.0


def test_names(monkeypatch):
    with pytest.raises(InputError, match="there is no tracker 'comet'"):
        names_of("comet,wandb")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"stabilitylab\[trackers\]"):
        names_of(["mlflow"])
    assert names_of("") == ()


# ------------------------------------------------------------------------------------------- the real libraries


def train(out, **options):
    """Sixty steps of a small model, its loss made up: a spike at 50."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, out=out, every=1, **options) as monitor:
        for step in range(60):
            model(torch.randn(4, 8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            loss = 5.0 - step / 100 + 0.01 * math.sin(step) + (3.0 if 50 <= step < 55 else 0.0)
            monitor.step(step, loss=math.nan if step == 58 else loss)
            time.sleep(0.002)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def offline_run(folder, **options):
    """The run's log; wandb's own process may write it a moment after ``finish``."""

    def opened():
        with contextlib.suppress(InputError):
            return open_logs([next((folder / "wandb").glob("offline-run-*"))], **options)

    (log,) = wait_until(opened, 0.1)
    return log


@pytest.mark.filterwarnings("default")  # theirs
def test_wandb_offline(place, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(place / "run", trackers=["wandb"])
    log = offline_run(place / "run")
    (block,) = log.blocks()
    assert log.columns[LOSS] == LOSS_KEY
    assert len(block) >= 55
    media = list((place / "run" / "wandb").rglob("*.png"))
    assert {path.name.split("_")[0] for path in media} >= {"loss", "spikes", "map"}


@pytest.mark.filterwarnings("default")  # theirs
def test_wandb_in_somebody_elses_run(place, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from stabilitylab.sinks import WandbSink

    monkeypatch.setenv("WANDB_MODE", "offline")
    run = wandb.init(project="mine", dir=place)
    sink = WandbSink(run, seconds=0.01)
    for step in range(0, 300, 10):
        sink.write(samples(range(step, step + 10)), [])
        run.log({"loss": 3.0 - step / 1000}, step=step)
        time.sleep(0.02)
    sink.close()
    assert run.step <= 300
    run.finish()
    log = offline_run(place, loss="loss")
    assert (
        sum(int(block.logged[LOSS].sum()) for block in log.blocks()) == 30
    )  # none of the owner's rows was dropped


@pytest.mark.filterwarnings("default")  # theirs
def test_mlflow_in_a_database(place, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    uri = f"sqlite:///{place}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)
    (place / "run").mkdir()
    (place / "run" / "config.json").write_text('{"model": {"layers": 3}, "seed": 1}')
    train(place / "run", trackers="mlflow")
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("stabilitylab").experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.params["model.layers"] == "3"
    assert run.data.tags["stability.episodes"] >= "1"
    assert "spike" in run.data.tags["stability.last_episode"]
    found = client.get_metric_history(run.info.run_id, LOSS_KEY)
    assert len(found) >= 55
    assert any(math.isnan(one.value) for one in found)
    images = [file.path for file in client.list_artifacts(run.info.run_id, "images")]
    assert any("map_gradient" in path for path in images)
    (log,) = open_logs([place / "mlflow.db"])
    assert log.columns[LOSS] == LOSS_KEY


@pytest.mark.filterwarnings("default")  # theirs
def test_trackio(place, monkeypatch):
    trackio = pytest.importorskip("trackio")
    folder = place / "trackio"
    monkeypatch.setenv("TRACKIO_DIR", str(folder))
    for module in (trackio, trackio.sqlite_storage, trackio.utils):
        if hasattr(module, "TRACKIO_DIR"):
            monkeypatch.setattr(module, "TRACKIO_DIR", folder)
    monkeypatch.setenv("TRACKIO_PROJECT", "tried")
    train(place / "run", trackers="trackio")
    (database,) = wait_until(lambda: list(folder.rglob("tried*.db")))

    def told():
        with contextlib.suppress(sqlite3.OperationalError), sqlite3.connect(database) as opened:
            return opened.execute("SELECT title, text FROM alerts").fetchall()

    alerts = wait_until(told)
    assert any(title.startswith("spike at step") for title, _ in alerts)
    (log,) = open_logs([database])
    assert log.columns[LOSS] == LOSS_KEY
    assert sum(len(block) for block in log.blocks()) >= 55
