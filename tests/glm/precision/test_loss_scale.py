"""The dynamic loss scale against DeepSpeed's own, on random histories, and at its boundaries."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import warnings

import pytest
import torch

from glm.errors import InputError
from glm.precision import LossScaleConfig, LossScaler


def history(config: LossScaleConfig, overflows: list[bool]) -> list[float]:
    scaler = LossScaler(config)
    return [scaler.update(overflow) for overflow in overflows]


def random_histories():
    for seed in range(40):
        draw = random.Random(seed)
        share = draw.choice([0.02, 0.3, 0.9])
        yield draw, [draw.random() < share for _ in range(120)]


def test_hysteresis_and_minimum_are_deepspeeds(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what its import warns about is not ours
        module = pytest.importorskip("deepspeed.runtime.fp16.loss_scaler")
    monkeypatch.setattr(module.dist, "get_rank", lambda: 1)  # asked only to decide who logs
    for draw, overflows in random_histories():
        # No window ends in this history: DeepSpeed 0.19 raises the scale one update later than it did in GLM-130B's time.
        config = LossScaleConfig(
            initial=2.0 ** draw.randint(4, 16),
            window=1000,
            hysteresis=draw.randint(1, 3),
            minimum=draw.choice([1.0, 4.0]),
        )
        theirs = module.DynamicLossScaler(
            init_scale=config.initial,
            scale_window=config.window,
            min_scale=config.minimum,
            delayed_shift=config.hysteresis,
            consecutive_hysteresis=False,
            raise_error_at_min_scale=False,
        )
        expected = []
        for overflow in overflows:
            theirs.update_scale(overflow)
            expected.append(float(theirs.cur_scale))
        assert history(config, overflows) == expected


def test_windows_are_those_of_torchs_grad_scaler():
    for draw, overflows in random_histories():
        # GradScaler has neither hysteresis nor a minimum.
        config = LossScaleConfig(window=draw.randint(1, 12), hysteresis=1, minimum=2.0**-120)
        scale, tracker = torch.full((), config.initial), torch.zeros((), dtype=torch.int32)
        expected = []
        for overflow in overflows:
            found = torch.tensor(float(overflow))
            torch._amp_update_scale_(scale, tracker, found, config.factor, 1 / config.factor, config.window)
            expected.append(scale.item())
        assert history(config, overflows) == expected


def test_a_window_without_overflow_doubles_and_hysteresis_forgives():
    config = LossScaleConfig(initial=256.0, window=3, hysteresis=2)
    # The first window ends after the updates 0, 1, 2, counted from "-1": the third update raises.
    assert history(config, [False] * 6) == [256, 256, 512, 512, 512, 1024]
    # One overflow is forgiven, the second lowers, and it goes on lowering until a window refills the hysteresis.
    assert history(config, [True, True, True, False, False, False]) == [256, 128, 64, 64, 64, 128]


def test_collapse_is_an_overflow_with_nothing_left_to_lower():
    scaler = LossScaler(LossScaleConfig(initial=4.0, hysteresis=1))
    seen = []
    for _ in range(4):
        scaler.update(overflow=True)
        seen.append((scaler.scale, scaler.collapsed))
    assert seen == [(2.0, False), (1.0, False), (1.0, True), (1.0, True)]
    scaler.update(overflow=False)
    assert not scaler.collapsed


def test_the_scale_itself_stays_finite():
    scaler = LossScaler(LossScaleConfig(initial=2.0**126, window=1))
    for _ in range(5):
        scaler.update(overflow=False)
    assert scaler.scale == 2.0**127
    assert math.isfinite(scaler.scale)


def test_a_saved_state_goes_on_exactly():
    draw = random.Random(3)
    overflows = [draw.random() < 0.2 for _ in range(200)]
    config = LossScaleConfig(window=5)
    whole = history(config, overflows)
    first = LossScaler(config)
    begun = [first.update(overflow) for overflow in overflows[:77]]
    second = LossScaler(config)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert begun + [second.update(overflow) for overflow in overflows[77:]] == whole
    assert second.state_dict().keys() == first.state_dict().keys()


def test_a_state_of_something_else_is_refused():
    with pytest.raises(InputError, match="lacks hysteresis_left, last_overflow"):
        LossScaler().load_state_dict({"scale": 1.0, "updates": 3, "collapsed": False})


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"minimum": 0.0}, "must be positive"),
        ({"minimum": math.nan}, "must be positive"),
        ({"initial": 0.5}, "below the minimum"),
        ({"window": 0}, "at least 1"),
        ({"hysteresis": 0}, "at least 1"),
        ({"factor": 1.0}, "above 1"),
    ],
)
def test_impossible_constants_are_refused(wrong, says):
    with pytest.raises(InputError, match=says):
        dataclasses.replace(LossScaleConfig(), **wrong)
