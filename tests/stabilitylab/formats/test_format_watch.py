"""The watch measures a model's operands as what_if does, and changes nothing about the model."""

import copy

import pytest
import torch
from torch import nn

from stabilitylab import Monitor
from stabilitylab.errors import InputError
from stabilitylab.formats import FormatWatch, what_if

FORMATS = ("fp8-e4m3-tensor", "mxfp4")


def test_operands_are_measured_and_the_model_is_what_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 32))
    twin = copy.deepcopy(model)
    x = torch.randn(8, 32)
    with FormatWatch(model, FORMATS) as watch:
        y = model(x)
        y.square().sum().backward()
    twin(x).square().sum().backward()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    found = watch.errors()
    assert {(path, operand) for path, operand, _ in found} == {
        (path, operand) for path in ("0", "3") for operand in ("input", "weight", "gradient")
    }
    hidden = twin[2](twin[1](twin[0](x)))
    for name in FORMATS:
        assert found["0", "input", name] == what_if(x, name)
        assert found["3", "input", name] == what_if(hidden, name)
        assert found["3", "weight", name] == what_if(twin[3].weight, name)
        assert found["3", "gradient", name] == what_if(2 * y, name)
    assert not any(module._forward_hooks for module in model.modules())


def test_readings_are_telemetry():
    model = nn.Sequential(nn.Linear(32, 32))
    monitor = Monitor(model)
    with FormatWatch(model, FORMATS, sites="0") as watch:
        model(torch.randn(4, 32)).sum().backward()
    readings = watch.readings()
    assert len(readings) == 3 * 2 * 3
    assert 0 < readings["format/0:weight/mxfp4_error"] < 0.3
    monitor.step(0, loss=1.0, **readings)
    monitor.close()


def test_what_is_not_there_is_refused():
    with pytest.raises(InputError, match="no layer"):
        FormatWatch(nn.GELU(), FORMATS)
    with pytest.raises(InputError, match="choose one of"):
        FormatWatch(nn.Linear(2, 2), ("fp3",))
