"""Scaled formats against their formulas in float64, and against torchao's reference where it is installed."""

import itertools

import numpy as np
import pytest
import torch

from stabilitylab.errors import InputError
from stabilitylab.formats import (
    E2M1,
    E4M3,
    SCALED_FORMATS,
    dequantize,
    fake_quantize,
    number_format,
    pack_4bit,
    quantize,
    rotate,
    rotation_signs,
    scaled_format,
    unrotate,
    what_if,
)
from stabilitylab.formats.reference import reference_codes, reference_values


def sample(rows: int = 48, columns: int = 160, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator) * 0.02
    x[:, 3] *= 60
    x[5] *= 1e-4
    x[7] = 0
    return x


def naive(x: torch.Tensor, name: str) -> np.ndarray:
    """Block by block, elements by the list of all numbers, scales by their formulas."""
    kind = scaled_format(name)
    element, values = kind.element, x.numpy()
    result = np.zeros(values.shape)
    rows, columns = (side or size for side, size in zip(kind.block, values.shape, strict=True))
    tensor_scale = np.float32(np.float32(abs(values).max()) / np.float32(448 * 6))
    for r, k in itertools.product(range(0, values.shape[0], rows), range(0, values.shape[1], columns)):
        block = values[r : r + rows, k : k + columns]
        largest = np.float32(abs(block).max())
        if kind.scale == "none":
            scale = divided = None
            divided, scale = block, 1.0
        elif kind.scale == "fp32":
            scale = np.float32(largest / np.float32(element.largest)) if largest else np.float32(1)
            divided = block / scale
        elif kind.scale == "e8m0":
            if largest == 0:
                exponent = -127
            elif kind.round_up:
                exponent = int(np.ceil(np.log2(float(np.float32(largest / np.float32(element.largest))))))
            else:
                exponent = int(np.floor(np.log2(float(largest)))) - element.largest_exponent
            scale = 2.0 ** max(exponent, -127)
            divided = block / scale
        else:
            ratio = np.float32(np.float32(largest / np.float32(6)) / tensor_scale)
            stored = reference_values(reference_codes(np.array([float(ratio)]), E4M3), E4M3)[0]
            scale = np.float32(tensor_scale * np.float32(stored))
            divided = (
                block * np.float32(np.float32(np.float32(1) / tensor_scale) / np.float32(stored))
                if stored
                else 0 * block
            )
        codes = reference_codes(np.asarray(divided, dtype=np.float64), element)
        result[r : r + rows, k : k + columns] = reference_values(codes, element) * float(scale)
    return result


@pytest.mark.parametrize("name", [name for name in SCALED_FORMATS if name not in ("fp16", "bf16")])
@pytest.mark.parametrize("shape", [(48, 160), (21, 37)])
def test_every_format_is_its_formula(name, shape):
    x = sample(*shape)
    mine = fake_quantize(x, name).double().numpy()
    # s * code is rounded once more, to fp32.
    np.testing.assert_allclose(mine, naive(x, name), rtol=2.0**-23, atol=0)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("name", SCALED_FORMATS)
def test_without_codes_it_is_the_same_to_the_bit(name, rounding):
    x = sample(12, 40).view(3, 4, 40)
    x[1, 2, 7] = torch.inf
    one, other = (torch.Generator().manual_seed(1) for _ in range(2))
    codes = quantize(x, name, rounding=rounding, generator=one)
    direct = fake_quantize(x, name, rounding=rounding, generator=other)
    assert codes.codes.shape == x.shape
    torch.testing.assert_close(dequantize(codes), direct, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", [name for name, one in SCALED_FORMATS.items() if one.scale != "none"])
def test_edges(name):
    assert torch.equal(fake_quantize(torch.zeros(4, 32), name), torch.zeros(4, 32))
    assert fake_quantize(torch.zeros(0, 32), name).shape == (0, 32)
    assert fake_quantize(torch.tensor([1.0, -2.0]), name).shape == (2,)
    # Codes, scaled by what their own largest gives, come back: a format holds its own numbers.
    x = fake_quantize(sample(), name)
    if scaled_format(name).scale != "e4m3":
        assert torch.equal(fake_quantize(x, name), x)
    x = sample()
    x[0, 0] = torch.nan
    rounded = fake_quantize(x, name)
    assert rounded[0, 0].isnan()
    assert fake_quantize(torch.full((2, 32), 1e-44), name).isfinite().all()
    assert fake_quantize(torch.full((2, 32), 2e38), name).isfinite().all()


def test_a_non_finite_number_takes_its_block_and_no_other():
    x = torch.ones(2, 64)
    x[0, 5] = torch.inf
    for name, lost in {"mxfp4": 32, "fp8-e4m3-row": 64, "nvfp4": 128}.items():
        assert fake_quantize(x, name).isnan().sum() == lost


@pytest.mark.parametrize("element", ["e4m3", "e5m2", "e2m3", "e3m2", "e2m1"])
@pytest.mark.parametrize("mode", ["FLOOR", "RCEIL"])
def test_mx_is_torchaos(element, mode):
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    constants = pytest.importorskip("torchao.prototype.mx_formats.constants")
    torchaos = {
        "e4m3": torch.float8_e4m3fn,
        "e5m2": torch.float8_e5m2,
        "e2m3": constants.DTYPE_FP6_E2M3,
        "e3m2": constants.DTYPE_FP6_E3M2,
        "e2m1": torch.float4_e2m1fn_x2,
    }[element]
    name = next(
        n
        for n, f in SCALED_FORMATS.items()
        if f.element.name == element and f.scale == "e8m0" and f.round_up == (mode == "RCEIL")
    )
    x = sample(64, 128)
    scale, data = mx.to_mx(x, torchaos, 32, mx.ScaleCalculationMode[mode])
    mine = quantize(x, name)
    assert torch.equal(mine.scales.view(torch.uint8), scale.view(torch.uint8).view(mine.scales.shape))
    codes = pack_4bit(mine.codes) if element == "e2m1" else mine.codes
    assert torch.equal(codes, data.view(torch.uint8).view(codes.shape))


def test_nvfp4_is_torchaos():
    nvfp4 = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    # torchao cuts block scales off below 2^-6 of the largest: blocks that reach that are compared.
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(3)) * 0.02
    tensor_scale = nvfp4.per_tensor_amax_to_scale(x.abs().amax())
    scales, data = nvfp4.nvfp4_quantize(x, per_tensor_scale=tensor_scale)
    mine = quantize(x, "nvfp4")
    assert torch.equal(mine.tensor_scale, tensor_scale)
    assert torch.equal(mine.scales.view(torch.uint8), scales.view(torch.uint8).view(mine.scales.shape))
    assert torch.equal(pack_4bit(mine.codes), data.view(torch.uint8).view(64, 64))


def test_names_are_read_and_the_unknown_is_refused():
    assert scaled_format("fp8-e5m2-tile64").block == (1, 64)
    assert scaled_format("fp8-e4m3-block32").block == (32, 32)
    assert scaled_format("mxfp4").bits == 4.25
    assert scaled_format("nvfp4").bits == 4.5
    for name in ("fp3", "fp8-e4m3-tile0", "nvfp5"):
        with pytest.raises(InputError, match="choose one of"):
            scaled_format(name)
    assert scaled_format("e2m1").element == E2M1 == number_format("e2m1")


def test_hadamard_is_orthogonal_and_leaves_products():
    signs = rotation_signs(16, seed=4)
    x, w = torch.randn(6, 64, dtype=torch.float64), torch.randn(5, 64, dtype=torch.float64)
    torch.testing.assert_close(unrotate(rotate(x, signs), signs), x)
    torch.testing.assert_close(rotate(x, signs) @ rotate(w, signs).T, x @ w.T)
    spike = torch.zeros(1, 16)
    spike[0, 3] = 8
    assert torch.equal(rotate(spike, signs).abs(), torch.full((1, 16), 2.0))
    with pytest.raises(InputError, match="power of two"):
        rotation_signs(12, seed=0)
    with pytest.raises(InputError, match="divides"):
        rotate(torch.ones(2, 20), signs)


@pytest.mark.parametrize("name", ["fp8-e4m3-tensor", "mxfp4", "nvfp4", "e4m3", "fp16"])
def test_what_if_counts_what_is_lost(name):
    x = sample()
    x[0, 0] = 3e5
    found = what_if(x, name)
    rounded = fake_quantize(x, name).double()
    expected = (rounded - x).norm() / x.double().norm()
    assert found.error == pytest.approx(float(expected), rel=1e-5)
    assert found.underflow == pytest.approx(float(((rounded == 0) & (x != 0)).double().mean()), rel=1e-6)
    assert (found.overflow > 0) == (name != "fp8-e4m3-tensor")
    x[0, 1] = torch.nan
    assert what_if(x, name).overflow >= 1 / x.numel() * (1 - 1e-6)
    assert what_if(torch.zeros(3, 3), name).error == 0
