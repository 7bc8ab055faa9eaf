"""The loop carries out decisions: it reports what it did, charges the budget only for that, and takes a user's own policy."""

import dataclasses
import math
import re
from pathlib import Path

import pytest

from glm.data.loader import Loader
from glm.data.shards import open_data
from glm.model.config import ModelConfig
from glm.train.config import BatchConfig, CheckpointConfig, MonitorConfig, TrainConfig
from glm.train.engine import LocalEngine
from glm.train.events import Callback
from glm.train.loop import Trainer
from stabilitylab.spikes import Decision, ResponderConfig
from stabilitylab.telemetry import Event

TINY = TrainConfig(
    steps=8,
    model=ModelConfig(vocabulary=1000, layers=1, hidden=16, heads=2, length=64),
    batch=BatchConfig(rows=2),
    monitor=MonitorConfig(every=0, gradients_every=0, tensorboard=False),
    checkpoint=CheckpointConfig(every=0, ring=0),
    responder=ResponderConfig(policy="roll-back", rollback_steps=3, skip_batches=1, cooldown=0),
)
PAGE = Path(__file__).parents[3] / "docs" / "responder.md"


class Alarm(Callback):
    """Raises a spike at given steps, the first time that each is reached; keeps the reported events."""

    def __init__(self, *steps, kind="spike"):
        self.steps, self.kind, self.told = list(steps), kind, []

    def step_end(self, info):
        if info.step not in self.steps:
            return ()
        self.steps.remove(info.step)
        data = {"phase": "onset", "signal": "train/-/loss", "onset": info.step, "episode": 1}
        return [Event(step=info.step, kind=self.kind, data=data)]

    def event(self, event):
        if event.kind in ("response", "rewind"):
            self.told.append((event.kind, event.data.get("back_to", event.step)))


def training(data_folder, *callbacks, config=TINY, **how):
    loader = Loader(open_data(data_folder), config.objective, config.sampling, length=64, seed=0)
    return Trainer(config, LocalEngine(config), loader, callbacks=callbacks, **how)


def test_a_decision_is_told_when_it_is_done_and_as_it_was_done(data_folder):
    alarm = Alarm(5)
    assert training(data_folder, alarm).train()
    assert alarm.told == [("rewind", 2), ("response", 2)]


def test_a_resumed_run_has_a_state_to_go_back_to(data_folder):
    first = training(data_folder)
    first.train(until=5)
    state, alarm = first.state().copied(), Alarm(5)
    resumed = training(data_folder, alarm)
    resumed.restore(state)
    assert resumed.train()
    # Two steps back are not to be had: the state it began with is.
    assert alarm.told == [("rewind", 5), ("response", 5)]


def test_where_nothing_can_be_done_nothing_is_told_or_paid(data_folder):
    alarm = Alarm(5)
    trainer = training(data_folder, alarm)
    trainer._ring = None
    assert trainer.train()
    assert alarm.told == []
    assert trainer.responder.state_dict()["used"] == 0


class Steps(Callback):
    def __init__(self):
        self.infos = []

    def step_end(self, info):
        self.infos.append(info)
        return ()


def test_auxiliary_terms_of_the_loss_have_names_of_their_own(data_folder):
    infos = []
    for z_loss in (0.0, 0.01):
        seen = Steps()
        config = dataclasses.replace(TINY, model=dataclasses.replace(TINY.model, z_loss=z_loss))
        training(data_folder, seen, config=config).train(until=2)
        infos.append(seen.infos)
    (plain, later), (with_term, _) = infos
    # The same weights have the same loss, whatever z-loss adds to it. The logits are near 0, so z is a little over ln 1000.
    assert with_term.loss == pytest.approx(plain.loss, rel=1e-6)
    assert with_term.levers["z_loss"] == pytest.approx(0.01 * math.log(1000) ** 2, rel=0.05)
    assert "z_loss" not in later.levers


def test_a_step_copies_no_state_of_the_responder(data_folder, monkeypatch):
    trainer = training(data_folder)
    monkeypatch.setattr(trainer.responder, "state_dict", lambda: pytest.fail("copied"))
    trainer._respond([], 0)


@pytest.fixture
def halve_once():
    names: dict = {"Decision": Decision}
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    exec(code, names)
    return names["HalveOnce"]()


def test_the_pages_own_policy_works_and_is_resumed(data_folder, halve_once):
    config = dataclasses.replace(TINY, responder=ResponderConfig())
    trainer = training(data_folder, Alarm(2, 4, kind="divergence"), config=config, responder=halve_once)
    trainer.train(until=6)
    assert trainer.intervention.rate_factor == 0.5
    assert trainer.state().state["responder"] == {"done": True}
