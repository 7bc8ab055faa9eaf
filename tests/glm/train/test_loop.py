"""The loop: events come in the order of its pseudocode; watching changes nothing; resuming changes nothing."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from glm.data.loader import Loader
from glm.data.shards import open_data
from glm.errors import InputError
from glm.model.config import AttentionConfig, ExpertsConfig, FeedForwardConfig, ModelConfig
from glm.train import events
from glm.train.config import BatchConfig, CheckpointConfig, MonitorConfig, TrainConfig, differences, from_json
from glm.train.engine import LocalEngine
from glm.train.events import Callback
from glm.train.loop import Trainer
from glm.train.monitoring import MonitorCallback
from glm.train.update_rules.config import GuardConfig, OptimizerConfig
from stabilitylab.runs import load_run
from stabilitylab.runs.folder import RunFolder

TINY = TrainConfig(
    steps=6,
    precision="fp16",
    model=ModelConfig(vocabulary=1000, layers=2, hidden=32, heads=2, length=64, dropout=0.1),
    batch=BatchConfig(rows=4, micro_rows=2),
    monitor=MonitorConfig(every=2, tensorboard=False),
    checkpoint=CheckpointConfig(every=2, keep=10),
)


def trainer(config, data, *, run=None, callbacks=()):
    loader = Loader(data, config.objective, config.sampling, length=config.model.length, seed=config.seed)
    return Trainer(config, LocalEngine(config), loader, run=run, callbacks=callbacks)


def weights(trained):
    return {name: tensor.detach().clone() for name, tensor in trained.engine.tensors()[0].items()}


def identical(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Recorder(Callback):
    """Writes down which event came when, and how many micro-batches lay between."""

    def __init__(self):
        self.seen = []

    def train_start(self, trainer):
        self.seen.append("train_start")
        trainer.engine.model.embedding.register_forward_hook(lambda *_: self.seen.append("forward"))

    def step_start(self, step):
        self.seen.append("step_start")

    def gradients_ready(self, step, gradients):
        self.seen.append("gradients_ready")

    def step_end(self, info):
        self.seen.append("step_end")
        return ()

    def train_end(self):
        self.seen.append("train_end")


def test_events_come_in_the_pseudocodes_order(data):
    lines = re.findall(r"^    ( *)(\w+)", events.__doc__, re.M)
    assert [word for _, word in lines if word.startswith(("train", "step", "gradients"))] == [
        *("train_start", "step_start", "gradients_ready", "step_end", "train_end")
    ]
    recorder = Recorder()
    trainer(dataclasses.replace(TINY, steps=2), data, callbacks=(recorder,)).train()
    step = ["step_start", "forward", "forward", "gradients_ready", "step_end"]
    assert recorder.seen == ["train_start", *step, *step, "train_end"]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_watched_run_equals_an_unwatched_one(data, tmp_path, precision):
    config = dataclasses.replace(TINY, precision=precision)
    bare = trainer(config, data)
    bare.train()
    run = RunFolder(tmp_path / "run")
    run.claim()
    watched = trainer(config, data, run=run, callbacks=(MonitorCallback(run, config.monitor),))
    watched.train()
    run.release()
    assert identical(weights(bare), weights(watched))
    recorded = load_run(run.path)
    assert len(recorded.series("train/-/loss")) == 6
    assert recorded.matrix("attention", "score_max", index="max").shape == (2, 3)
    # The parts' squared norms are the whole's: fp32 sums of at most 40,000 terms.
    parts = recorded.matrix("gradient", "l2").pow(2).sum().pow(0.5)
    whole = recorded.series("train/-/gradient_norm")
    assert ((parts / whole - 1).abs() < 1e-4).all()


def test_a_resumed_run_ends_with_the_same_weights(data, tmp_path):
    whole = trainer(TINY, data)
    whole.train()
    run = RunFolder(tmp_path / "run")
    first = trainer(TINY, data, run=run)
    first.train(until=4)
    second = trainer(TINY, data, run=run)
    from glm.train import checkpoint as checkpoints

    second.restore(checkpoints.load_newest(run.checkpoints)[0])
    assert second.step == 4
    second.train()
    assert identical(weights(whole), weights(second))


def test_micro_batches_give_the_whole_batchs_gradient(data):
    # Without dropout the gradient of the mean does not depend on the split; fp32 sums in another order differ by rounding.
    model = dataclasses.replace(TINY.model, dropout=0.0)
    norms = []
    for micro in (4, 2, 1):
        config = dataclasses.replace(
            TINY, precision="fp32", model=model, batch=BatchConfig(rows=4, micro_rows=micro)
        )
        engine = LocalEngine(config)
        loader = Loader(data, config.objective, config.sampling, length=64, seed=0)
        loss = engine.forward_backward(loader.samples(range(4)), 0)
        norms.append((loss, engine.gradients().global_norm))
    for loss, norm in norms[1:]:
        assert loss == pytest.approx(norms[0][0], rel=1e-5)
        assert norm == pytest.approx(norms[0][1], rel=1e-4)


def test_a_gradient_that_overflows_is_skipped_and_the_scale_falls(data):
    config = dataclasses.replace(
        TINY, loss_scale=dataclasses.replace(TINY.loss_scale, initial=2.0**40, hysteresis=1)
    )
    before = weights(trained := trainer(config, data))
    seen = []

    class Watch(Callback):
        def step_end(self, info):
            seen.append(info)
            return ()

    trained.callbacks = (Watch(),)
    trained.train()
    assert all(info.skipped for info in seen)
    assert [info.loss_scale for info in seen] == [2.0 ** (40 - i) for i in range(6)]
    assert identical(before, weights(trained))


def test_the_config_survives_json(tmp_path):
    assert from_json(TINY.to_json(), source=tmp_path) == TINY
    with pytest.raises(InputError, match="does not fit this version"):
        from_json('{"nonsense": 1}', source=tmp_path)
    with pytest.raises(InputError, match="is not JSON"):
        from_json("{", source=tmp_path)


def test_differences_name_the_field():
    old, new = {"model": {"norm": "pre", "layers": 2}}, {"model": {"norm": "post", "layers": 2}}
    assert differences(old, new) == ["model.norm: pre -> post"]


def test_a_batch_ramp_grows_by_micro_batches():
    ramp = BatchConfig(rows=12, micro_rows=2, ramp_from=4, ramp_samples=80)
    assert [ramp.rows_at(s) for s in (0, 20, 40, 79, 80, 1000)] == [4, 6, 8, 10, 12, 12]


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"rows": 4, "micro_rows": 3}, {"rows": 4, "ramp_from": 8}])
def test_batches_that_do_not_divide_are_refused(wrong):
    with pytest.raises(InputError, match=r"batch\."):
        BatchConfig(**wrong)


@pytest.mark.parametrize(
    "model",
    [
        {"feed_forward": FeedForwardConfig(experts=ExpertsConfig(count=4, bias_rate=0.01))},
        {"attention": AttentionConfig(qk_clip=0.05)},
        {"z_loss": 0.1},
    ],
    ids=["experts", "qk-clip", "skip-step"],
)
def test_the_pass_that_measures_curvature_leaves_nothing_that_an_update_goes_by(data, model):
    """Neither loads, nor largest scores, nor the loss that a guard remembers and the loop reports."""
    ends = []
    for every in (0, 1):
        watching = MonitorConfig(every=0, gradients_every=0, curvature_every=every, tensorboard=False)
        config = dataclasses.replace(
            TINY,
            precision="fp32",
            steps=4,
            monitor=watching,
            model=dataclasses.replace(TINY.model, **model),
            optimizer=OptimizerConfig(guard=GuardConfig(skip_step=3.0)),
        )
        record = Levers()
        trained = trainer(config, data, callbacks=[MonitorCallback(None, watching), record])
        trained.train()
        ends.append((weights(trained), trained.engine.state_dict(), record.told))
    assert identical(ends[0][0], ends[1][0])
    assert ends[0][1:] == ends[1][1:]


class Levers(Callback):
    """Records what the levers report of every step."""

    def __init__(self):
        self.told = []

    def step_end(self, info):
        self.told.append({name: float(value) for name, value in info.levers.items()})
        return ()


def test_weights_and_curvature_are_measured_and_change_nothing(data_folder, tmp_path):
    plain = dataclasses.replace(TINY, precision="fp32", steps=8)
    watching = MonitorConfig(
        every=0, gradients_every=0, weights_every=2, curvature_every=3, recorder=4, tensorboard=False
    )
    config, data = dataclasses.replace(plain, monitor=watching), open_data(data_folder)
    run = RunFolder(tmp_path / "run")
    run.claim()
    watched, alone = trainer(config, data, callbacks=[MonitorCallback(run, watching)]), trainer(plain, data)
    watched.train()
    alone.train()
    run.release()
    assert identical(weights(watched), weights(alone))
    told = load_run(run.path)
    assert told.series("curvature/-/margin").index.tolist() == [3, 6]
    assert set(told.rows("weight", "stable_rank")["step"]) == {0, 2, 4, 6}
    with pytest.raises(InputError, match="needs --precision fp32"):
        dataclasses.replace(config, precision="bf16")
