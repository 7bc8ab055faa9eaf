"""Codes and numbers against torch's own types, ml_dtypes, and a list of all numbers in float64."""

import numpy as np
import pytest
import torch

from stabilitylab.errors import InputError
from stabilitylab.formats import (
    BF16,
    NUMBER_FORMATS,
    NumberFormat,
    decode,
    encode,
    number_format,
    pack_4bit,
    round_to,
    unpack_4bit,
)
from stabilitylab.formats.number_format import TORCH_TYPES
from stabilitylab.formats.reference import finite_numbers, reference_codes, reference_values

SMALL = [one for one in NUMBER_FORMATS.values() if one.bits <= 8]


def numbers_around(format: NumberFormat) -> torch.Tensor:
    """Every number, every middle between two and what lies beside it in fp32, and numbers over the whole range."""
    grid = finite_numbers(format)
    middle = ((grid[1:] + grid[:-1]) / 2).astype(np.float32)
    beside = [np.nextafter(middle, np.float32(side)) for side in (0, np.inf)]
    rng = np.random.default_rng(0)
    spread = rng.standard_normal(2000) * np.exp2(rng.uniform(-30, 20, 2000))
    x = np.concatenate([grid, middle, *beside, spread]).astype(np.float32)
    return torch.from_numpy(np.concatenate([x, -x]))


@pytest.mark.parametrize("format", SMALL, ids=lambda one: one.name)
def test_codes_are_those_of_the_list_of_all_numbers(format):
    x = numbers_around(format)
    codes = encode(x, format)
    assert np.array_equal(codes.numpy(), reference_codes(x.double().numpy(), format))
    assert np.array_equal(decode(codes, format).numpy(), reference_values(codes.long().numpy(), format))
    assert torch.equal(decode(codes, format), round_to(x, format))


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_bit_patterns_are_torchs(name):
    format, own = NUMBER_FORMATS[name], TORCH_TYPES[name]
    every = torch.arange(256, dtype=torch.uint8)
    torch.testing.assert_close(decode(every, format), every.view(own).float(), rtol=0, atol=0, equal_nan=True)
    x = numbers_around(format).clamp(-format.largest, format.largest)
    assert torch.equal(encode(x, format), x.to(own).view(torch.uint8))


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_wide_formats_round_as_torch_does(name):
    format, own = NUMBER_FORMATS[name], TORCH_TYPES[name]
    every = torch.arange(1 << 16, dtype=torch.int32)
    torch.testing.assert_close(
        decode(every, format), every.to(torch.uint16).view(own).float(), rtol=0, atol=0, equal_nan=True
    )
    x = torch.randn(1000) * torch.randn(1000).exp().pow(8)
    assert torch.equal(round_to(x, format, saturate=False), x.to(own).float())


@pytest.mark.parametrize("format", SMALL, ids=lambda one: one.name)
def test_ml_dtypes_has_the_same_numbers(format):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    names = {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}
    own = getattr(ml_dtypes, names.get(format.name) or f"float{format.bits}_{format.name}fn")
    every = np.arange(1 << format.bits, dtype=np.uint8)
    mine = decode(torch.from_numpy(every), format).numpy()
    np.testing.assert_array_equal(mine, every.view(own).astype(np.float32))
    x = numbers_around(format)
    for saturate in (True, False):
        if not saturate and format.specials == "none":
            continue
        limited = x.clamp(-format.largest, format.largest) if saturate else x
        mine = round_to(x, format, saturate=saturate).numpy()
        np.testing.assert_array_equal(mine, limited.numpy().astype(own).astype(np.float32))


def test_what_is_not_finite_stays_so_where_it_can():
    x = torch.tensor([torch.inf, -torch.inf, torch.nan])
    for name, expected in {
        "e5m2": [torch.inf, -torch.inf, torch.nan],
        "e4m3": [torch.nan] * 3,
        "bf16": [torch.inf, -torch.inf, torch.nan],
    }.items():
        format = number_format(name)
        torch.testing.assert_close(
            round_to(x, format), torch.tensor(expected), rtol=0, atol=0, equal_nan=True
        )
        torch.testing.assert_close(
            decode(encode(x, format), format), torch.tensor(expected), rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("format", NUMBER_FORMATS.values(), ids=lambda one: one.name)
def test_stochastic_rounding_takes_a_neighbour_and_is_right_on_average(format):
    generator = torch.Generator().manual_seed(0)
    step = format.smallest if format is not BF16 else 2.0**-7
    x = torch.tensor([0.25, -1.75, 1.0, 2.125]) * step + (1.0 if format is BF16 else 0.0)
    draws = 4000
    drawn = round_to(x.expand(draws, -1), format, rounding="stochastic", generator=generator)
    assert ((drawn - x).abs() < step).all()
    # The mean of draws that are 0 or 1 step away: four deviations of sqrt(1/4 / draws).
    assert ((drawn.double().mean(0) - x).abs() <= 4 * step / (2 * draws**0.5)).all()


def test_two_codes_share_a_byte_and_come_back():
    codes = torch.arange(16, dtype=torch.uint8).repeat(3, 1)
    packed = pack_4bit(codes)
    assert packed.shape == (3, 8)
    assert packed[0, 0] == 0x10
    assert torch.equal(unpack_4bit(packed), codes)
    with pytest.raises(InputError, match="even"):
        pack_4bit(codes[:, :3])


def test_an_unknown_format_is_refused_with_the_names_there_are():
    with pytest.raises(InputError, match="e4m3"):
        number_format("e9m9")
