"""Each criterion on sites with known outliers."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from stabilitylab.outliers import criteria
from stabilitylab.outliers.channels import ChannelStatistics
from stabilitylab.outliers.criteria import CRITERIA, MarkedShare, reading, three_part_mask
from stabilitylab.outliers.scan_sites import RESIDUAL_STREAM, Site

MEASURE = {criterion.name: criterion.measure for criterion in CRITERIA}


def site(layer: int, x: torch.Tensor, role: str = "up") -> tuple[Site, ChannelStatistics]:
    one = ChannelStatistics(x.shape[-1])
    one.add(x)
    return Site(path=f"layers.{layer}.{role}:input", layer=layer, role=role), one


def calm(rows: int = 100, channels: int = 50) -> torch.Tensor:
    """Every channel reaches 1 and no more."""
    x = torch.rand(rows, channels, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x[0] = 1.0
    return x


def test_the_three_part_rule_needs_all_three_parts():
    layers = []
    for layer in range(8):
        x = calm()
        if layer < 2:  # a quarter of the layers; 24 % of the positions there are 6 % in all
            x[:24, 0] = 6.0
            x[:23, 1] = 6.0
            x[:100, 2] = 5.9
        if layer < 1:
            x[:100, 3] = 50.0  # 12.5 % of the layers
        layers.append(site(layer, x))
        layers.append(site(layer, 9 * calm(channels=64), role="down"))  # of another width: left out
        layers.append(site(layer, calm(), role=RESIDUAL_STREAM))
    assert np.flatnonzero(three_part_mask(layers)).tolist() == [0]
    assert MEASURE["llm.int8"](layers) == MarkedShare(marked=1, total=50)


def test_the_three_part_rule_does_not_apply_without_layers():
    _, one = site(0, calm())
    alone = [(Site(path="head:input", layer=None, role="head"), one)]
    assert MEASURE["llm.int8"](alone).share is None
    assert len(three_part_mask(alone)) == 0


def test_dimensions_by_the_other_rules():
    x = calm()
    x[1, 0], x[1, 1], x[1, 2], x[1, 3] = 3.0, 9.99, 10.0, 100.0
    one = [site(0, x), site(1, calm())]
    assert MEASURE["3x-median"](one) == MarkedShare(marked=4, total=100)
    assert MEASURE["10x-median"](one) == MarkedShare(marked=2, total=100)
    assert MEASURE["100x-median"](one) == MarkedShare(marked=1, total=100)
    assert MEASURE["over-6"](one) == MarkedShare(marked=3, total=100)


def test_three_sigma_goes_by_rms():
    x = calm()
    x[:, 4] *= 20
    rms = x.double().pow(2).mean(0).sqrt().numpy()
    expected = int((rms > rms.mean() + 3 * rms.std()).sum())
    assert expected == 1
    assert MEASURE["3-sigma"]([site(0, x)]) == MarkedShare(marked=1, total=50)


def test_values():
    x = calm()
    x[5:8, 9] = 6.0
    x[9, 9] = 2000.0
    found = [site(0, x)]
    assert MEASURE["values-over-6"](found) == MarkedShare(marked=4, total=5000)
    assert MEASURE["massive"](found) == MarkedShare(marked=1, total=5000)
    assert MEASURE["values-6-sigma"](found) == MarkedShare(marked=1, total=5000)


@pytest.mark.parametrize(
    ("marked", "said"),
    [
        (0, "none"),
        (1, "fewer"),
        (4, "OPT, BLOOM"),
        (30, "OPT, BLOOM"),
        (31, "between"),
        (1000, "GLM-130B"),
        (8999, "GLM-130B"),
        (9001, "nearly all"),
    ],
)
def test_a_share_is_read_within_a_factor_of_three(marked, said):
    assert reading(MarkedShare(marked=marked, total=10_000)) == said
    assert reading(MarkedShare(marked=0, total=0)) == "–"


def test_the_table_of_criteria_is_what_is_applied():
    rows = re.findall(r"^\| ([\w.\-]+) \| (\w+) \| ", criteria.__doc__, re.M)
    assert [row for row in rows if row[0] != "name"] == [(c.name, c.marks) for c in CRITERIA]
