"""A model that a device cannot hold is refused with the planner's number."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from glm.errors import InputError
from glm.planning import device_memory
from glm.presets import PRESETS


def model_of(preset: str):
    return dataclasses.replace(PRESETS[preset].model, vocabulary=150_528)


def test_glm_130b_does_not_fit_and_the_number_is_said(monkeypatch):
    """130 G parameters in fp16: 2 + 2 bytes of weights and gradients, 12 of masters and moments, 16 each."""
    monkeypatch.setattr(device_memory, "device_memory", lambda _: 64 * 2**30)
    with pytest.raises(InputError, match=r"needs ([\d,]+) GiB .* has 64 GiB: .*`glm plan`") as error:
        device_memory.check_fits(model_of("glm-130b"), "fp16", torch.device("cpu"))
    (said,) = re.findall(r"needs ([\d,]+) GiB", str(error.value))
    assert int(said.replace(",", "")) == pytest.approx(16 * 130e9 / 2**30, rel=0.03)


def test_what_fits_is_let_through():
    device_memory.check_fits(model_of("glm-tiny"), "fp32", torch.device("cpu"))
    assert device_memory.device_memory(torch.device("cpu")) > 2**30
    assert device_memory.device_memory(torch.device("meta")) is None
