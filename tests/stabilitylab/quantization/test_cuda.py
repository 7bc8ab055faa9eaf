"""A text model on an accelerator: scanning, measuring and verifying it there gives the numbers of the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from stabilitylab.models import TextModel, open_text_model
from stabilitylab.outliers import scan_outliers
from stabilitylab.quantization import Scheme
from stabilitylab.quantization.ranges import layer_inputs
from stabilitylab.quantization.replacement import quantizable_layers
from stabilitylab.quantization.sensitivity import measure_sensitivity
from tests.stabilitylab.quantization.folders import TEXT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture
def both(llama_folder: Path) -> list[TextModel]:
    models = [open_text_model(llama_folder) for _ in range(2)]
    models[1].module.to("cuda")
    return models


def test_windows_lie_where_the_model_does(both: list[TextModel]) -> None:
    losses = [model.loss(next(model.windows([TEXT], 32, 32))) for model in both]
    assert losses[0][1] == losses[1][1]
    assert losses[1][0] == pytest.approx(losses[0][0], rel=1e-4)


def test_outliers_are_those_of_the_cpu(both: list[TextModel]) -> None:
    here, there = (scan_outliers(model, [TEXT], length=32, tokens=64) for model in both)
    assert [site.path for site, _ in here.sites] == [site.path for site, _ in there.sites]
    for (_, one), (_, other) in zip(here.sites, there.sites, strict=True):
        assert np.allclose(one.largest, other.largest, rtol=1e-3, atol=1e-5)


def test_sensitivities_can_be_measured_there(both: list[TextModel]) -> None:
    schemes = [Scheme.parse(name) for name in ("w8a8-token", "int8-row", "int4-g32-asym")]
    found = []
    for model in both:
        windows = list(model.windows([TEXT], 32, 64))
        largest = layer_inputs(model, windows, quantizable_layers(model.module)).largest
        found.append(measure_sensitivity(model, windows, schemes, largest))
    # Other kernels there, the int4 one in bf16: the same layers and schemes, harm that is a number.
    assert [layer.path for layer in found[0]] == [layer.path for layer in found[1]]
    for layer in found[1]:
        assert all(np.isfinite(effect.harm) for effect in layer.effects.values())
