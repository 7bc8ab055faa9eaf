"""GLM's trainer as a loop that is forked: the same bits as ``glm.train.replay_forks``, and the command around it."""

import dataclasses
import json
import re
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from glm.cli import main
from glm.commands.train import TrainCommand, train
from glm.data.config import ObjectiveConfig
from glm.data.shards import open_data
from glm.errors import InputError
from glm.model.config import ModelConfig
from glm.train.attribute import attribute_command, seconds_of
from glm.train.config import BatchConfig, CheckpointConfig, MonitorConfig, TrainConfig
from glm.train.fork_loop import ForkLoop
from glm.train.rate_schedule import ScheduleConfig
from glm.train.replay_forks import Change, ReplayForks, trainer_of
from glm.train.reproducibility import device_of, machine, machine_of, otherwise, threads, threads_of
from stabilitylab.attribution import LoopState, Without
from stabilitylab.attribution.fork_verdicts import Yardstick
from stabilitylab.attribution.forks import Forks, Usual
from stabilitylab.attribution.observation import Observation
from stabilitylab.report import run_report
from stabilitylab.runs import load_run
from stabilitylab.runs.folder import RunFolder
from stabilitylab.telemetry import Event

BEGIN, STEPS = 4, 4
SMALL = TrainConfig(
    steps=60,
    model=ModelConfig(vocabulary=1000, layers=2, hidden=32, heads=2, length=64, dropout=0.1),
    objective=ObjectiveConfig(kind="causal"),
    batch=BatchConfig(rows=4),
    monitor=MonitorConfig(every=0, gradients_every=0, tensorboard=False),
    checkpoint=CheckpointConfig(every=0, ring=0),
)


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def both(request, data_folder):
    config = dataclasses.replace(SMALL, precision=request.param)
    data = open_data(data_folder)
    trainer = trainer_of(config, data, ())
    trainer.advance(BEGIN)
    state = trainer.state().copied()
    loop = ForkLoop(config, data)
    ours = Forks(loop, LoopState(BEGIN, state, LoopState.of(loop, 0).randomness))
    seen = Observation(BEGIN, BEGIN + 2)
    control = ours.control(STEPS, seen)
    ours.usual = Usual.of(seen)
    ours.yardstick = Yardstick(
        begin=BEGIN, onset=BEGIN, end=BEGIN + STEPS, base=0, noise=1, height=1e3, area=1e3
    )
    return ReplayForks(config, data, state), ours, control


def test_the_watched_control_is_the_original(both):
    forks, _, control = both
    assert control == forks.train(Change(), steps=STEPS).losses


@pytest.mark.parametrize(
    ("change", "without"),
    [
        (Change(hold=("embedding",)), Without(kind="updates", sites=("embedding.weight",))),
        (Change(rate_factor=0.5), Without(kind="rate")),
        (Change(skip=(BEGIN + 1,)), Without(kind="batch", rows=(BEGIN + 1,))),
        (Change(renew_second_moments=("*",)), Without(kind="past of moments")),
    ],
)
def test_interventions_by_hooks_are_those_of_the_trainer(both, change, without):
    forks, ours, control = both
    fork = ours.train(without)
    assert not fork.error
    theirs = forks.train(change, steps=STEPS).losses
    # A rounded factor on v apart, they are the same bits.
    exact = without.kind != "past of moments"
    assert list(fork.values) == (theirs if exact else pytest.approx(theirs, rel=1e-3))
    assert list(fork.values) != control


def test_clipping_and_rows(both):
    _, ours, control = both
    for without in (
        Without(kind="norm"),
        Without(kind="tensor norms", sites=tuple(ours.subject.parameters)),
        Without(kind="stale moments"),
        Without(kind="batch rows", rows=(BEGIN + 1, 2)),
        Without(kind="rows of updates", sites=("embedding.weight",), rows=(1, 2)),
        Without(kind="rounding", sites=("layers.0.feed_forward.down",)),
    ):
        fork = ours.train(without)
        assert not fork.error, without
        assert len(fork.values) == STEPS
    assert ours.control(STEPS) == control
    assert len(ours.loop.row_losses(BEGIN + STEPS)) == 4


@pytest.fixture(scope="module")
def lost(data_folder, tmp_path_factory):
    """A run at a rate that no model bears, with its events."""
    out = tmp_path_factory.mktemp("lost") / "run"
    config = dataclasses.replace(
        SMALL,
        model=dataclasses.replace(SMALL.model, vocabulary=None, norm="pre"),
        schedule=ScheduleConfig(peak=30.0, warmup=40, shape="constant"),
        optimizer=dataclasses.replace(SMALL.optimizer, clip=0.0),
        checkpoint=CheckpointConfig(every=0, ring=8, ring_every=5),
    )
    train(TrainCommand(config=config, data=data_folder, out=out), console=Console(quiet=True))
    return out


def _kept(run):
    """The forks that are kept, by file, without the line that says of what they are."""
    files = sorted((run / "attribution").glob("event-1*.jsonl"))
    return {file.name: [json.loads(line) for line in file.read_text().splitlines()[1:]] for file in files}


def test_the_command(lost, tmp_path, capsys, monkeypatch):
    page = tmp_path / "proof.html"
    # How far a search gets within seconds depends on the machine, and where it begins on how its torch rounds. So time is up once
    # a certain fork has been trained: first one without updates, then any that begins earlier.
    before: dict[str, list] = {}

    def monotonic():
        forks = [fork for file, kept in _kept(lost).items() if file not in before for fork in kept]
        return 1000.0 * any(before or fork["without"]["kind"] == "updates" for fork in forks)

    monkeypatch.setattr("stabilitylab.attribution.search.time", SimpleNamespace(monotonic=monotonic))
    words = [
        str(lost),
        "--event",
        "1",
        "--budget",
        "100s",
        "--processes",
        "1",
        "--json",
        "--html",
        str(page),
    ]
    assert attribute_command(words) == 0
    said = capsys.readouterr()
    proof = json.loads(said.out)
    assert proof["repeats"] is True
    assert "fork 1" in said.err
    first = {fork["words"] for fork in proof["forks"]}
    assert "updates of all parameters" in first
    assert "updates of all parameters" in page.read_text()
    (event,) = [e for e in RunFolder(lost).read_events() if e.kind == "attribution"]
    assert event.data["sentence"] == proof["sentence"]
    assert "What forks prove" in [section.title for section in run_report(load_run(lost)).sections]
    before |= (kept := _kept(lost))
    assert attribute_command(words) == 0
    again = capsys.readouterr()
    # The search goes on where the budget ended: kept forks stay, and it trains nothing twice. Where it finds no cause it begins
    # earlier, if there is an earlier state; its forks from there have the same names, in a file of their own.
    later, second = _kept(lost), json.loads(again.out)
    went_back = set(later) > set(kept)
    assert went_back or second["cause"] != "unknown" or second["begin"] == 0
    for file, forks in kept.items():
        assert later[file][: len(forks)] == forks
    for forks in later.values():
        assert len({json.dumps(fork["without"]) for fork in forks}) == len(forks)
    new = sum(map(len, later.values())) - sum(map(len, kept.values()))
    assert len(re.findall(r"^fork \d+  ", again.err, re.MULTILINE)) == new
    assert (second["begin"] < proof["begin"]) == went_back


def test_forks_compute_where_the_run_did(lost, tmp_path, monkeypatch):
    run = load_run(lost)
    assert machine_of(run)["device"].partition(" ")[0] == device_of(run).type
    other = RunFolder(tmp_path / "other")
    other.path.mkdir()
    recorded = {**machine(), "device": "cuda (NVIDIA H200)"}
    other.append_events([Event(step=0, kind="run-start", data=recorded)])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    there = load_run(other.path)
    assert device_of(there) == torch.device("cpu")
    assert otherwise(there) == "the device cpu, the run cuda (NVIDIA H200)"
    with pytest.raises(InputError, match="--device gpu cannot be used here"):
        device_of(there, "gpu")
    seen = []

    def stub(loop, *args, **kwargs):
        seen.append((loop.model.embedding.weight.device, kwargs["otherwise"]))
        raise InputError("seen")

    monkeypatch.setattr("glm.train.attribute.attribute", stub)
    with pytest.raises(InputError, match="seen"):
        attribute_command([str(lost), "--event", "1", "--device", "cpu"])
    assert seen[0][0] == torch.device("cpu")
    with pytest.raises(InputError, match="--device gpu"):
        attribute_command([str(lost), "--event", "1", "--device", "gpu"])


def test_forks_have_the_threads_of_the_run(lost, tmp_path, monkeypatch):
    run = load_run(lost)
    here = torch.get_num_threads()
    assert threads_of(run) == here
    other = RunFolder(tmp_path / "other")
    other.path.mkdir()
    start = Event(
        step=0, kind="run-start", data={"torch": "1.0", "machine": machine()["machine"], "threads": here + 1}
    )
    other.append_events([start])
    said = otherwise(load_run(other.path))
    assert said == f"{here} threads, the run {here + 1}; torch {torch.__version__}, the run 1.0"
    with threads(threads_of(load_run(other.path))):
        assert torch.get_num_threads() == here + 1
        assert "threads" not in otherwise(load_run(other.path))
    assert torch.get_num_threads() == here
    seen = []

    def stub(*args, **kwargs):
        seen.append((torch.get_num_threads(), kwargs["processes"], kwargs["otherwise"]))
        raise InputError("seen")

    monkeypatch.setattr("glm.train.attribute.attribute", stub)
    for words, number in (((), here), (("--threads", str(here + 1)), here + 1)):
        with pytest.raises(InputError, match="seen"):
            attribute_command([str(lost), "--event", "1", *words])
        assert seen[-1][0] == number
        assert seen[-1][2] == ("" if number == here else f"{number} threads, the run {here}")
    with pytest.raises(InputError, match="--threads are at least 1"):
        attribute_command([str(lost), "--event", "1", "--threads", "0"])


def test_refusals(lost, data_folder, tmp_path, capsys):
    """One line each, and exit code 2."""

    def refused(match, *words):
        capsys.readouterr()
        assert main(["attribute", *map(str, words)]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert re.search(match, line)

    refused("choose one of 1", lost, "--event", 99)
    refused("is not a time", lost, "--event", 1, "--budget", "soon")
    refused("too small for one fork", lost, "--event", 1, "--budget", "0.001s", "--processes", 1)
    refused("matches no parameter", lost, "--event", 1, "--group", "layers.7", "--processes", 1)
    config = json.loads((lost / "config.json").read_text())
    other = RunFolder(tmp_path / "other")
    other.path.mkdir()
    data = {
        "episode": 1,
        "phase": "onset",
        "signal": "train/-/loss",
        "onset": 500,
        "peak": 500,
        "end": None,
        "height": 1.0,
    }
    start = Event(step=0, kind="run-start", data={"data": str(data_folder)})
    other.append_events([start])
    other.config.write_text(json.dumps(config))
    refused("has no event 1: it has none", other.path, "--event", 1)
    other.append_events([Event(step=500, kind="spike", data=data)])
    refused("--checkpoint.ring 4", other.path, "--event", 1)
    other.config.write_text(json.dumps(config | {"brain": 1}))
    refused("does not fit this version", other.path, "--event", 1)
    assert (seconds_of("90"), seconds_of("1.5m"), seconds_of("1h")) == (90, 90, 3600)
