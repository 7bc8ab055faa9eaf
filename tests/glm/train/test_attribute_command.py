"""``glm attribute`` from a run of ``glm train`` to verdict, page, report and event; planted where trainer and forks are alike."""

import dataclasses
import json
import re
import signal
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from glm.cli import main
from glm.commands.train import TrainCommand, train
from glm.data.loader import Loader
from glm.model.config import AttentionConfig
from glm.train.config import CheckpointConfig
from glm.train.engine import LocalEngine
from glm.train.rate_schedule import ScheduleConfig
from stabilitylab.report import run_report
from stabilitylab.runs import load_run
from stabilitylab.runs.folder import RunFolder
from stabilitylab.spikes.log_scan import listed_episodes
from tests.glm.train.test_attribute import SMALL, lost  # noqa: F401  a fixture

AT, ROW, ROWS = 81, 2, 4


def trained(data_folder, out, peak=3e-3, softmax="fp32", **fields):
    """100 updates at a rate that the model bears."""
    schedule = ScheduleConfig(peak=peak, warmup=5, shape="constant")
    config = dataclasses.replace(
        SMALL,
        steps=100,
        model=dataclasses.replace(
            SMALL.model, vocabulary=None, norm="pre", dropout=0.0, attention=AttentionConfig(softmax=softmax)
        ),
        schedule=schedule,
        checkpoint=CheckpointConfig(every=0, ring=4, ring_every=5),
        **fields,
    )
    train(TrainCommand(config=config, data=data_folder, out=out), console=Console(quiet=True))
    return out


def proven(run, capsys, tmp_path, *more):
    """The planted event's proof, by the command; page, report and event say the same."""
    page = tmp_path / "proof.html"
    onsets = [one.onset for one in listed_episodes(run)]
    number = 1 + next(i for i, onset in enumerate(onsets) if onset >= AT)
    capsys.readouterr()
    words = ["attribute", str(run), "--event", str(number), "--budget", "2m", "--processes", "1", *more]
    assert main([*words, "--json", "--html", str(page)]) == 0
    proof = json.loads(capsys.readouterr().out)
    assert proof["repeats"] is True
    (event,) = [one for one in RunFolder(run).read_events() if one.kind == "attribution"]
    assert event.data["sentence"] == proof["sentence"]
    (section,) = [s for s in run_report(load_run(run)).sections if s.title == "What forks prove"]
    assert section is not None
    assert "What forks prove" in page.read_text()
    return proof


def in_steps(monkeypatch, act):
    """``act(engine, step)`` before each forward pass, of the trainer and of forks."""
    original = LocalEngine.forward_backward

    def planted(self, batch, step, whole=None):
        act(self, step)
        return original(self, batch, step, whole)

    monkeypatch.setattr(LocalEngine, "forward_backward", planted)


def replaced(monkeypatch, path, change):
    """``change(module, forward, x)`` instead of a module's forward from ``AT`` on."""
    original, at = LocalEngine.__init__, [0]

    def made(self, *args, **fields):
        original(self, *args, **fields)
        module = self.model.get_submodule(path)
        forward = module.forward
        module.forward = lambda x: change(module, forward, x) if at[0] >= AT else forward(x)

    monkeypatch.setattr(LocalEngine, "__init__", made)
    in_steps(monkeypatch, lambda engine, step: at.__setitem__(0, step))


@pytest.mark.slow
def test_rows_of_the_embedding(data_folder, tmp_path, monkeypatch, capsys):
    rows = [5, 40, 300]

    @torch.no_grad()
    def act(engine, step):
        if step == AT:
            weight = engine.tensors()[0]["embedding.weight"]
            drawn = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(1)) * 20
            weight[rows] = drawn.to(weight)
            engine.optimizer.publish()

    in_steps(monkeypatch, act)
    proof = proven(trained(data_folder, tmp_path / "run"), capsys, tmp_path)
    assert proof["cause"] == "parameter"
    assert re.match(r"embedding\.weight rows? (5|40|300)", proof["site"])


@pytest.mark.slow
def test_a_row_of_a_batch(data_folder, tmp_path, monkeypatch, capsys):
    """Rows count by sevens; one counts backwards."""
    original = Loader.samples

    def counted(self, numbers):
        batch = original(self, numbers)
        rows = []
        for number in numbers:
            by = -7 if number == AT * ROWS + ROW else 7
            rows.append((13 * number + by * torch.arange(batch.tokens_BT.shape[1] + 1)) % 50)
        rows = torch.stack(rows).to(batch.tokens_BT)
        return dataclasses.replace(
            batch, tokens_BT=rows[:, :-1].contiguous(), targets_BT=rows[:, 1:].contiguous()
        )

    monkeypatch.setattr(Loader, "samples", counted)
    run = trained(data_folder, tmp_path / "run", peak=1e-2)
    assert main(["attribute", str(run), "--event", "1"]) == 2
    assert "a hard batch breaks nothing, so none is written to flight/" in capsys.readouterr().err
    proof = proven(run, capsys, tmp_path, "--from-start")
    assert proof["cause"] == "batch"
    assert proof["remedy"]["rows"] == [AT, ROW]


@pytest.mark.slow
def test_an_overflow_that_one_layer_in_fp32_does_not_have(data_folder, tmp_path, monkeypatch, capsys):
    """A layer at another scale, undone behind it: nothing but fp16 minds."""
    path = "layers.1.feed_forward.down"

    def scaled(module, forward, x):
        return (forward(x * 2.0**14) - module.bias) / 2.0**14 + module.bias

    replaced(monkeypatch, path, scaled)
    proof = proven(trained(data_folder, tmp_path / "run", precision="fp16"), capsys, tmp_path)
    assert (proof["cause"], proof["site"]) == ("overflow", path)
    assert proof["sentence"].startswith(f"With {path} in fp32 ")


@pytest.mark.slow
def test_scores_that_qk_clip_bounds(data_folder, tmp_path, monkeypatch, capsys):
    path = "layers.1.attention.query_key_value"
    third = torch.cat([torch.full((SMALL.model.hidden,), 1e25), torch.ones(2 * SMALL.model.hidden)])
    replaced(monkeypatch, path, lambda module, forward, x: forward(x) * third.to(x.device))
    proof = proven(trained(data_folder, tmp_path / "run", softmax="fused"), capsys, tmp_path)
    # The projection's output and the scores that are made of it: bounding either is a cure.
    assert proof["cause"] in ("attention", "activation")
    assert proof["site"].startswith("layers.1.attention")
    cures = [fork["words"] for fork in proof["forks"] if fork["verdict"] == "prevents"]
    assert any("scores" in words for words in cures), proof["forks"]


@pytest.mark.slow
def test_killed_and_taken_up(lost, capsys):  # noqa: F811
    words = ["attribute", str(lost), "--event", "1", "--budget", "60s", "--processes", "1", "--json"]
    process = subprocess.Popen([sys.executable, "-m", "glm", *words], stderr=subprocess.PIPE, text=True)
    done = []
    for line in process.stderr:
        if line.startswith("fork "):
            done.append(line.partition("without ")[2].rpartition("  ")[0])
        if len(done) == 2:
            process.send_signal(signal.SIGKILL)
            break
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    file = lost / "attribution" / "event-1.jsonl"
    kept = file.read_text().splitlines()[:-1]  # the last one may have been cut short
    assert not [e for e in RunFolder(lost).read_events() if e.kind == "attribution"]
    assert main(words) == 0
    forks = file.read_text().splitlines()
    assert len(kept) >= 2  # what they are of, and the first
    assert forks[: len(kept)] == kept
    trained = [json.dumps(json.loads(line).get("without")) for line in forks]
    assert len(set(trained)) == len(trained)
    words = {fork["words"] for fork in json.loads(capsys.readouterr().out)["forks"]}
    assert done[0] in words
    assert [e for e in RunFolder(lost).read_events() if e.kind == "attribution"]
