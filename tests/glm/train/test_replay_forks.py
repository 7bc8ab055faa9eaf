"""Forks of one state: held parameters stay to the bit, the rest moves as it did, and an unchanged fork is the original."""

import dataclasses

import pytest
import torch

from glm.data.config import ObjectiveConfig
from glm.data.shards import open_data
from glm.errors import InputError
from glm.model.config import ModelConfig
from glm.train.config import BatchConfig, CheckpointConfig, MonitorConfig, TrainConfig
from glm.train.replay_forks import Change, ReplayForks, groups_of, matching, trainer_of
from glm.train.update_rules.adam import MOMENTS

BEGIN = 4
SMALL = TrainConfig(
    steps=20,
    model=ModelConfig(vocabulary=1000, layers=2, hidden=32, heads=2, length=64, dropout=0.1),
    objective=ObjectiveConfig(kind="causal"),
    batch=BatchConfig(rows=2),
    monitor=MonitorConfig(every=0, gradients_every=0, tensorboard=False),
    checkpoint=CheckpointConfig(every=0, ring=0),
)


def begun(data_folder, precision):
    config = dataclasses.replace(SMALL, precision=precision)
    trainer = trainer_of(config, open_data(data_folder), ())
    trainer.advance(BEGIN)
    return trainer


@pytest.fixture(scope="module", params=["fp32", "bf16", "fp16"])
def forks(request, data_folder):
    trainer = begun(data_folder, request.param)
    return ReplayForks(trainer.config, trainer.loader.data, trainer.state())


@pytest.fixture(scope="module")
def fp32(data_folder):
    trainer = begun(data_folder, "fp32")
    return ReplayForks(trainer.config, trainer.loader.data, trainer.state())


def tensors(state):
    return {**state.model, **state.optimizer}


def moved(forks, fork):
    """Parameters whose weights or moments have changed."""
    before, after = tensors(forks.state), tensors(fork.state)
    return {name.rpartition("/")[2] for name in before if not torch.equal(before[name], after[name])}


def test_many_forks_leave_the_control_as_the_original_to_the_bit(data_folder):
    original = begun(data_folder, "fp32")
    forks = ReplayForks(original.config, original.loader.data, original.state())
    original.advance(BEGIN + 6)
    first = forks.train(Change(), steps=6)
    changes = [
        Change(hold=("embedding",)),
        Change(only=("layers.0",), hold_steps=2),
        Change(rate_factor=0.1),
        Change(skip=(5,)),
        Change(renew_second_moments=("*",)),
        Change(config=dataclasses.replace(SMALL, precision="bf16")),
    ]
    changed = [forks.train(change, steps=6) for change in changes]
    again = forks.train(Change(), steps=6)
    for control in (first, again):
        assert all(
            torch.equal(t, tensors(control.state)[name]) for name, t in tensors(original.state()).items()
        )
        assert control.losses == first.losses
    assert all(fork.losses != first.losses for fork in changed)
    assert [info.step for info in again.steps] == list(range(BEGIN, BEGIN + 6))


def test_what_is_held_stays_to_the_bit_and_the_rest_moves_as_it_did(forks):
    control = forks.train(Change(), steps=1)
    held = forks.train(Change(hold=("layers.0.attention", "*.bias")), steps=1)
    names = set(forks.state.model)
    expected = {n for n in names if n.startswith("layers.0.attention.") or n.endswith(".bias")}
    assert moved(forks, control) == names
    assert moved(forks, held) == names - expected
    for name in names - expected:
        assert torch.equal(held.state.model[name], control.state.model[name])
        for moment in MOMENTS:
            key = f"{moment}/{name}"
            assert torch.equal(held.state.optimizer[key], control.state.optimizer[key])


def test_the_half_precision_weights_of_what_is_held_stay_too(data_folder):
    trainer = begun(data_folder, "fp16")
    Change(hold=("layers.1.*",)).apply(trainer)
    before = {name: p.detach().clone() for name, p in trainer.engine.model.named_parameters()}
    trainer.advance(BEGIN + 3)
    for name, parameter in trainer.engine.model.named_parameters():
        if name.startswith("layers.1."):
            assert torch.equal(before[name], parameter), name
    # Norms move by less than fp16 shows next to 1; matrices do not.
    assert not torch.equal(before["embedding.weight"], trainer.engine.model.embedding.weight)


def test_only_the_named_are_updated(forks):
    fork = forks.train(Change(only=("embedding", "final_norm.weight")), steps=3)
    assert moved(forks, fork) == {"embedding.weight", "final_norm.weight"}


def test_a_hold_ends_after_its_steps(fp32):
    held = fp32.train(Change(hold=("embedding",), hold_steps=2), steps=2)
    released = fp32.train(Change(hold=("embedding",), hold_steps=2), steps=3)
    assert "embedding.weight" not in moved(fp32, held)
    assert "embedding.weight" in moved(fp32, released)


def test_renewed_second_moments_are_those_of_the_next_gradient(fp32):
    fork = fp32.train(Change(renew_second_moments=("layers.0.feed_forward.up",)), steps=1)
    control = fp32.train(Change(), steps=1)
    name, beta1, beta2 = "layers.0.feed_forward.up.weight", 0.9, SMALL.optimizer.beta2
    # The clipped gradient, from the first moment: m' = b1 m + (1 - b1) g. It is divided by .1: fp32's rounding grows tenfold.
    first = [fork.state.optimizer[f"exp_avg/{name}"], fp32.state.optimizer[f"exp_avg/{name}"]]
    gradient = (first[0].double() - beta1 * first[1].double()) / (1 - beta1)
    second = fork.state.optimizer[f"exp_avg_sq/{name}"].double() / (1 - beta2 ** (BEGIN + 1))
    assert torch.allclose(second.sqrt(), gradient.abs(), rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))
    other = "exp_avg_sq/embedding.weight"
    assert torch.equal(fork.state.optimizer[other], control.state.optimizer[other])


def test_a_rate_factor_scales_the_rate(fp32):
    control, slower = (fp32.train(change, steps=2) for change in (Change(), Change(rate_factor=0.25)))
    assert [i.learning_rate for i in slower.steps] == [0.25 * i.learning_rate for i in control.steps]


def test_globs_without_a_match_name_the_groups():
    names = [f"layers.{i}.{part}" for i in range(3) for part in ("norm.weight", "up.weight", "up.bias")]
    assert matching(["layers.1", "*.bias"], names, "--hold") == [
        *("layers.0.up.bias", "layers.1.norm.weight", "layers.1.up.weight", "layers.1.up.bias"),
        "layers.2.up.bias",
    ]
    assert groups_of([*names, "scale"]) == "layers.*.norm, layers.*.up, scale"
    with pytest.raises(InputError, match=r"--hold 'layer\.1' matches no parameter .* layers\.\*\.norm"):
        matching(["layers.1", "layer.1"], names, "--hold")


@pytest.mark.parametrize(
    ("wrong", "flag"),
    [
        ({"hold": ("a",), "hold_steps": 0}, "--hold-steps"),
        ({"hold_steps": 3}, "--hold-steps"),
        ({"rate_factor": 0.0}, "--rate-factor"),
    ],
)
def test_a_change_that_makes_no_sense_is_refused(wrong, flag):
    with pytest.raises(InputError, match=flag):
        Change(**wrong)
