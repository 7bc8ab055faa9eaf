"""Replays repeat events bit for bit, with one thing changed; a replay can repeat the responder's rollbacks by hand."""

import dataclasses
import json
import shlex
import shutil

import numpy as np
import pytest
import torch
from rich.console import Console

from glm.commands.train import TrainCommand, train
from glm.data.config import DataConfig, ObjectiveConfig
from glm.data.loader import Loader
from glm.data.shards import open_data
from glm.errors import InputError
from glm.model.config import ModelConfig
from glm.train import checkpoint as checkpoints
from glm.train.config import BatchConfig, CheckpointConfig, MonitorConfig, TrainConfig
from glm.train.engine import LocalEngine
from glm.train.events import Callback
from glm.train.loop import FLIGHT, Trainer
from glm.train.monitoring import MonitorCallback
from glm.train.replay import replay_command
from glm.train.replay_forks import episode_of
from glm.train.replay_report import verdict
from stabilitylab import Monitor
from stabilitylab.logs.recognise import open_logs
from stabilitylab.runs import load_run
from stabilitylab.runs.folder import RunFolder
from stabilitylab.spikes import Episode, ResponderConfig, episodes_of
from stabilitylab.spikes.advice import _TRY, OF_OPTIMIZER, command
from stabilitylab.spikes.log_scan import scan_log
from stabilitylab.spikes.treatment_outcomes import tally
from stabilitylab.telemetry import Event

ONSET = 22
SMALL = TrainConfig(
    steps=36,
    model=ModelConfig(layers=2, hidden=32, heads=2, length=64, dropout=0.1),
    objective=ObjectiveConfig(kind="causal"),
    batch=BatchConfig(rows=4),
    monitor=MonitorConfig(every=0, gradients_every=0, tensorboard=False),
    checkpoint=CheckpointConfig(every=8, keep=3, ring=3, ring_every=5),
)


def onset(step=ONSET, kind="spike", episode=1):
    data = {"episode": episode, "phase": "onset", "signal": "train/-/loss", "onset": step, "peak": step}
    return Event(step=step, kind=kind, data={**data, "end": None, "height": 1.0})


@pytest.fixture(scope="module")
def finished(data_folder, tmp_path_factory):
    """A finished run, with an episode in its events that stands for one the detector found."""
    out = tmp_path_factory.mktemp("run") / "run"
    train(TrainCommand(config=SMALL, data=data_folder, out=out), console=Console(quiet=True))
    RunFolder(out).append_events([onset()])
    return out


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run for each test, since a page compares all replays of an event in a run."""
    return shutil.copytree(finished, tmp_path / "run")


def replayed(run, *flags):
    assert replay_command([str(run), "--event", "1", *flags]) == 0


def test_an_unchanged_replay_is_bit_identical(run, capsys):
    replayed(run, "--before", "6", "--steps", "12")
    said = capsys.readouterr()
    assert "bit-identical to the original over 12 steps" in said.err
    assert "from the beginning" in said.err  # the checkpoints that are left are younger
    fork, original = load_run(run / "replays" / "event-1" / "unchanged"), load_run(run)
    for name in ("train/-/loss", "train/-/gradient_norm", "train/-/first_sample"):
        ours = fork.series(name)
        assert ours.index.tolist() == list(range(16, 28))
        assert ours.tolist() == original.series(name).loc[16:27].tolist()
    assert set(fork.rows("gradient", "l2")["step"]) == set(range(16, 28))  # in full resolution
    page = (run / "replays" / "event-1" / "report.html").read_text(encoding="utf-8")
    assert "Replays of the event at step " in page
    assert "Last loss: the mean of the last 5 steps." in page
    with pytest.raises(InputError, match="already holds this fork"):
        replay_command([str(run), "--event", "1", "--before", "6", "--steps", "12"])


def test_a_replay_from_a_checkpoint_is_bit_identical(run, tmp_path, capsys):
    replayed(run, "--before", "0", "--steps", "9", "--out", str(tmp_path / "fork"))
    said = capsys.readouterr().err
    assert "from the state of step 24" not in said
    RunFolder(run).append_events([onset(30, episode=2)])
    assert (
        replay_command(
            [str(run), "--event", "2", "--before", "4", "--steps", "8", "--out", str(tmp_path / "b")]
        )
        == 0
    )
    said = capsys.readouterr().err
    assert "from the state of step 24" in said
    assert "bit-identical to the original over 8 steps" in said


def test_one_thing_changed(run, capsys):
    replayed(run, "--before", "2", "--steps", "6", "--model.embedding.gradient-shrink", "0.1")
    fork = load_run(run / "replays" / "event-1" / "model.embedding.gradient_shrink=0.1")
    alpha = fork.series("train/-/embedding_gradient_shrink")
    assert set(alpha) == {0.1}
    original = load_run(run).series("train/-/loss")
    loss = fork.series("train/-/loss")
    assert loss.loc[20] == original.loc[20]  # the first update is the first that differs
    assert loss.loc[21] != original.loc[21]
    assert json.loads((fork.path / "config.json").read_text())["model"]["embedding"]["gradient_shrink"] == 0.1
    assert "model.embedding.gradient_shrink=0.1" in (run / "replays" / "event-1" / "report.html").read_text()


def test_batches_can_be_left_out_and_the_precision_changed(run):
    replayed(run, "--before", "2", "--steps", "6", "--precision", "fp16", "--skip-batches", "22", "23")
    fork = load_run(run / "replays" / "event-1" / "precision=fp16,skip=22+23")
    samples = load_run(run).series("train/-/first_sample")
    assert fork.series("train/-/first_sample").tolist() == samples.loc[[20, 21, 24, 25, 26, 27]].tolist()


def test_a_fork_records_whether_it_helped(run):
    replayed(run, "--before", "0", "--steps", "11", "--skip-batches", "22")
    (fork,) = (load_run(path) for path in (run / "replays" / "event-1").glob("skip=22"))
    (outcome,) = [event.data for event in fork.events if event.kind == "outcome"]
    # The event was written by hand, so it does not come.
    assert (outcome["treatment"], outcome["verdict"], outcome["helped"]) == ("skip-batch", "prevented", True)
    assert tally(load_run(run), "skip-batch") == (1, 1)


def test_updates_can_be_withheld(run):
    replayed(
        run,
        "--before",
        "0",
        "--steps",
        "3",
        "--hold",
        "embedding",
        "--hold",
        "layers.0*",
        "--hold-steps",
        "2",
    )
    (fork,) = (load_run(path) for path in (run / "replays" / "event-1").glob("hold=*"))
    updates = fork.rows("update", "rms").groupby("site")["value"].apply(list)
    assert updates["embedding.weight"][:2] == [0.0, 0.0]
    assert updates["embedding.weight"][2] > 0
    assert min(updates["layers.1.attention.output.weight"]) > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--event", "1", "--hold", "embeding"],
            r"--hold 'embeding' matches no parameter .*: it has embedding, ",
        ),
        (["--event", "1", "--only", "x"], "--only 'x' matches no"),
        (["--event", "9"], r"no event 9: choose one of 1 \(spike at 22\)"),
        (["--event", "1", "--steps", "0"], "--steps at least 1"),
        (["--event", "x"], "invalid int value"),
        (["--event", "1", "--data", "/nowhere"], "/nowhere"),
        (["--event", "1", "--model.layers", "3"], "another model"),
    ],
)
def test_what_cannot_be_replayed_is_refused(run, flags, message):
    with pytest.raises(InputError, match=message):
        replay_command([str(run), *flags])


def test_other_runs_are_refused(tmp_path):
    RunFolder(tmp_path).append_events([onset()])
    with pytest.raises(InputError, match=r"no config\.json"):
        replay_command([str(tmp_path), "--event", "1"])
    with pytest.raises(InputError, match="there is no such directory"):
        replay_command([str(tmp_path / "nowhere"), "--event", "1"])


@pytest.mark.parametrize(
    ("found", "rise", "expected"),
    [
        ([], 0.0, "prevented"),
        ([("spike", 100)], 1.0, "came"),
        ([("spike", 100)], 0.3, "milder"),
        ([("spike", 120)], 1.0, "later"),
        ([("divergence", 100)], 1.0, "came"),
    ],
)
def test_verdicts(found, rise, expected):
    def episode(kind, step):
        return Episode(kind=kind, onset=step, peak=step, end=None, height=1.0, signal="train/-/loss")

    assert verdict(episode("spike", 100), [episode(*one) for one in found], rise=rise) == expected


# --------------------------------------------------------------------------------- responses, states from before


class Alarm(Callback):
    """Reports an event at given steps, once each, as the detector would."""

    def __init__(self, *steps):
        self.steps = list(steps)
        self.told = []

    def step_end(self, info):
        if info.step in self.steps:
            self.steps.remove(info.step)
            return [onset(info.step)]
        return []

    def event(self, event):
        self.told.append(event)


def trained(data_folder, config, *callbacks, run=None):
    data = open_data(data_folder)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocabulary=data.vocabulary))
    loader = Loader(data, config.objective, config.sampling, length=config.model.length, seed=config.seed)
    trainer = Trainer(config, LocalEngine(config), loader, run=run, callbacks=callbacks)
    assert trainer.train()
    return trainer


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.engine.tensors()[0].items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def with_policy(**responder):
    return dataclasses.replace(SMALL, responder=ResponderConfig(cooldown=0, **responder))


def test_a_skipped_batch_is_as_if_it_had_never_been_there(data_folder):
    alarm = Alarm(20)
    responded = trained(data_folder, with_policy(policy="skip-batch", rollback_steps=10), alarm)
    # Told when it is done.
    assert [event.kind for event in alarm.told] == ["rewind", "response", "run-end"]
    without = dataclasses.replace(SMALL, sampling=DataConfig(skip=((20 * 4, 21 * 4),)))
    assert_same(weights(responded), weights(trained(data_folder, without)))


def test_a_rollback_with_skipped_batches_can_be_repeated_by_hand(data_folder):
    policy = with_policy(policy="roll-back", rollback_steps=10, skip_batches=3)
    responded = trained(data_folder, policy, Alarm(25))
    without = dataclasses.replace(SMALL, sampling=DataConfig(skip=((15 * 4, 18 * 4),)))
    assert_same(weights(responded), weights(trained(data_folder, without)))


def test_one_spot_does_not_spend_the_budget(data_folder):
    class Always(Alarm):
        def step_end(self, info):
            return [onset(info.step)] if info.step == 20 else []

    alarm = Always()
    trained(data_folder, with_policy(policy="skip-batch", rollback_steps=10, budget=10), alarm)
    done = [event.data for event in alarm.told if event.kind == "response"]
    # Each goes further than the one before; then the spot is left to itself.
    assert [data["kind"] for data in done] == ["skip-batch"] * 3
    assert [data["back_to"] for data in done] == sorted((data["back_to"] for data in done), reverse=True)
    assert [data["used"] for data in done] == [1, 2, 3]


@pytest.fixture
def claimed(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.claim()
    yield folder
    folder.release()


def test_a_lowered_rate_lasts_and_is_recorded(data_folder, claimed):
    run = claimed
    watch = MonitorCallback(run, SMALL.monitor)
    trained(data_folder, with_policy(policy="lower-rate", rate_factor=0.25), Alarm(20), watch)
    plain = trained(data_folder, SMALL).config.schedule
    rate = load_run(run.path).series("train/-/learning_rate")
    assert rate.loc[20] == plain.learning_rate(20, SMALL.steps)
    assert rate.loc[21] == 0.25 * plain.learning_rate(21, SMALL.steps)
    assert rate.loc[35] == 0.25 * plain.learning_rate(35, SMALL.steps)


def test_a_state_from_before_an_alarm_is_kept(data_folder, claimed):
    trained(data_folder, SMALL, Alarm(30), run=claimed)
    assert [step for step, _ in checkpoints.list_checkpoints(claimed.path / FLIGHT)] == [
        20
    ]  # the ring's oldest


def test_a_state_that_cannot_be_written_is_an_event(data_folder, claimed):
    (claimed.path / FLIGHT).write_text("a file stands in the way, as a full disk would")
    alarm = Alarm(30)
    trained(data_folder, SMALL, alarm, run=claimed)
    (lost,) = [event for event in alarm.told if event.kind == "telemetry-lost"]
    assert "could not be kept" in lost.data["reason"]


@pytest.mark.parametrize("flags", sorted({flags for _, flags in _TRY.values() if flags} | {OF_OPTIMIZER}))
def test_what_is_advised_runs_as_it_is_printed(run, flags, capsys):
    RunFolder(run).append_events([onset(30, episode=2)])
    said = command(load_run(run), 2, flags)
    words = shlex.split(said.partition("`glm replay ")[2].removesuffix("`."))
    assert replay_command([*words, "--before", "4", "--steps", "5"]) == 0
    capsys.readouterr()


def test_an_event_that_only_the_whole_log_shows_has_its_number(tmp_path):
    losses = 2 * (1 + np.random.default_rng(0).normal(0, 0.01, 120))
    losses[70:74] += 0.18
    watched = torch.nn.Linear(1, 1)
    with Monitor(watched, out=tmp_path, every=0, probes=[], detector=None, tensorboard=False) as monitor:
        for step, loss in enumerate(losses.tolist()):
            monitor.step(step, loss=loss)
    run = load_run(tmp_path)
    assert not episodes_of(run.events)
    (log,) = open_logs([tmp_path])
    (listed,) = scan_log(log).episodes
    assert 68 <= listed.onset <= 71
    assert episode_of(run, 1) == listed
    with pytest.raises(InputError, match="no event 2: choose one of 1"):
        episode_of(run, 2)
