"""A large matrix some rows at a time: every number and scale is that of the whole, to the bit."""

import pytest
import torch

from stabilitylab.formats import (
    SCALED_FORMATS,
    dequantize,
    quantize,
    quantize_rows,
    quantize_searched,
    row_parts,
    some_rows,
)

NAMES = [*SCALED_FORMATS, "fp8-e4m3-block48", "fp8-e5m2-tile24"]


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.setattr("stabilitylab.formats.chunked_rounding._WHOLE", 1000)
    monkeypatch.setattr("stabilitylab.formats.chunked_rounding._AT_ONCE", 800)


def sample(rows=301, columns=40):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02
    x[200:] *= 50
    x[7] = 0
    return x


def _equal(one, other):
    assert one.format == other.format
    assert torch.equal(one.codes, other.codes)
    for a, b in ((one.scales, other.scales), (one.tensor_scale, other.tensor_scale)):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            assert torch.equal(a.float(), b.float())


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_parts_are_those_of_the_whole(name, search, parts):
    x = sample()
    _equal(quantize_rows(x, name, search=search), (quantize_searched if search else quantize)(x, name))


def test_what_is_not_finite_shows_in_its_block_and_in_the_tensor(parts):
    x = sample()
    x[250, 3] = torch.inf
    for name in ("nvfp4", "mxfp4", "fp8-e4m3-tensor", "fp8-e4m3-row"):
        one, other = (dequantize(made) for made in (quantize_rows(x, name), quantize(x, name)))
        assert torch.equal(one.isnan(), other.isnan())
        assert one.isnan().any()


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_it(name, parts):
    made = quantize(sample(), name)
    whole = dequantize(made)
    cut = list(row_parts(301, 40, made.format))
    assert [row for rows in cut for row in range(301)[rows]] == list(range(301))
    assert len(cut) > 1 or made.format.block[0] in (48, 128)
    assert all(rows.start % (made.format.block[0] or 1) == 0 for rows in cut)
    assert torch.equal(torch.cat([dequantize(some_rows(made, rows)) for rows in cut]), whole)
    some = torch.tensor([300, 0, 7, 129, 129])
    assert torch.equal(dequantize(some_rows(made, some)), whole[some])


def test_each_part_is_told_of_when_it_has_been_read(parts):
    seen = []
    quantize_rows(sample(), "mxfp4", seen=lambda part: seen.append(len(part)))
    assert sum(seen) == 2 * 301  # for its scales, and for its codes
