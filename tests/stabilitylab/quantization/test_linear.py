"""Quantized layers against the float64 reference, at the edges of their kernels, and as modules."""

from __future__ import annotations

import copy
import io
from dataclasses import replace

import pytest
import torch
from torch import nn

from stabilitylab.errors import InputError
from stabilitylab.quantization import QuantizedLinear, Scheme, quantize_weight, reference_linear
from stabilitylab.quantization.kernels import fbgemm, packed, tiles
from stabilitylab.quantization.kernels.cuda import cuda_int4_agrees, cuda_int8_agrees
from stabilitylab.quantization.scheme import NAMED

SCHEMES = [
    *NAMED,
    "int8-row",
    "int8-row-asym",
    "int8-g64",
    "int8-g128-asym",
    "int4-row",
    "int4-row-asym",
    "int4-g32",
    "int4-g64-asym",
    "int4-g128-asym-mse",
]
SHAPES = [(1, 1), (7, 33), (40, 100), (65, 256), (64, 130)]


def make(name: str, shape: tuple[int, int], rows: int, *, bias: bool = True, outliers: int = 1):
    generator = torch.Generator().manual_seed(rows)
    linear = nn.Linear(shape[1], shape[0], bias=bias)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(shape, generator=generator))
    x = torch.randn(rows, shape[1], generator=generator)
    x[:, : min(outliers, shape[1])] *= 25
    quantized = QuantizedLinear.from_linear(linear, Scheme.parse(name), largest=x.abs().amax(0))
    return linear, quantized, x


def tolerance(quantized: QuantizedLinear, x: torch.Tensor) -> torch.Tensor:
    """What rounding inside a kernel may cost, element by element.

    Sums of K products in float32 err by at most K 2^-24 of the sum of magnitudes, scaling by a few 2^-24 more. Kernels that take
    bf16, of 8 significant bits, round x and the result (2^-8 each); int4 also rounds a term 8 scale x.
    """
    rows = x.double().abs().reshape(-1, quantized.in_features)
    if quantized.smooth is not None:
        rows = rows / quantized.smooth.double()
    stored = quantized.stored
    weights = stored.dequantize(torch.float64).abs()
    terms = rows @ weights.T + (0 if quantized.bias is None else quantized.bias.double().abs())
    unit = (quantized.in_features + 8) * 2.0**-24
    if quantized.scheme.activations is not None:
        # The largest code of a token may err in its last bit; the digits of the mixed scheme stop at 1 / (2 * 127 * 254).
        largest = rows.amax(1, keepdim=True) * weights.sum(1)
        return unit * (terms + largest) + (2.0**-15 * largest if quantized.scheme.threshold else 0)
    few = x.reshape(-1, quantized.in_features).shape[0] <= packed.few_rows(quantized.scheme.bits)
    if few:
        span = stored.scales.double().amax() * 8 * rows.sum(1, keepdim=True) if stored.bits == 4 else 0
        return 2.0**-7 * (terms + span)
    return unit * (terms + rows.sum(1, keepdim=True) * stored.scales.double().amax() * 8)


def check(quantized: QuantizedLinear, x: torch.Tensor) -> None:
    y = quantized(x)
    expected = reference_linear(
        x, quantized.stored, quantized.scheme, smooth=quantized.smooth, bias=quantized.bias
    )
    assert y.shape == expected.shape
    assert y.dtype == x.dtype
    error = (y.double() - expected).abs()
    allowed = tolerance(quantized, x).view_as(error)
    assert bool((error <= allowed).all()), float((error / allowed).max())


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 3, 17, 140])
def test_a_layer_computes_its_reference(name, shape, rows):
    _, quantized, x = make(name, shape, rows, bias=rows != 3)
    check(quantized, x)


@pytest.mark.parametrize("name", SCHEMES)
def test_without_torchs_kernels_the_same(name, monkeypatch):
    """Other processors: everything through dequantized tiles."""
    for module, what in (
        (fbgemm, "fbgemm_agrees"),
        (packed, "packed_int8_agrees"),
        (packed, "packed_int4_agrees"),
    ):
        monkeypatch.setattr(f"stabilitylab.quantization.kernels.dispatch.{what}", lambda: None)
        assert hasattr(module, what)
    for rows in (1, 20):
        _, quantized, x = make(name, (40, 100), rows)
        quantized(x)
        assert type(quantized._kernel).__name__ in ("TiledWeight", "TiledInt8")
        check(quantized, x)


def in_a_mapped_file(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers at 8 bytes beyond a multiple of 64, where a file may put them."""
    room = torch.empty(tensor.nbytes + 128, dtype=torch.uint8)
    start = -room.data_ptr() % 64 + 8
    placed = room[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return placed.copy_(tensor)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("rows", [1, 16, 140])
def test_memory_that_is_not_aligned(name, rows):
    """Wherever weights and activations lie, the products are the same."""
    _, quantized, x = make(name, (64, 64), rows, bias=False)
    expected = quantized(x)
    quantized.release()
    stored = replace(
        quantized.stored,
        values=in_a_mapped_file(quantized.stored.values),
        scales=in_a_mapped_file(quantized.stored.scales),
    )
    again = QuantizedLinear(stored, quantized.scheme, smooth=quantized.smooth)
    assert torch.equal(again(in_a_mapped_file(x)), expected)


def test_largest_codes_do_not_saturate():
    """127 times 127 in every place: what instructions that add two products in 16 bits get wrong."""
    linear = nn.Linear(512, 40, bias=False)
    nn.init.constant_(linear.weight, 0.127)
    x = torch.full((3, 512), 12.7)
    x[1] *= -1
    x[2, ::2] *= -1
    y = QuantizedLinear.from_linear(linear, Scheme.parse("w8a8-token"))(x)
    expected = torch.tensor([1.0, -1.0, 0.0])[:, None].expand(3, 40) * 12.7 * 0.127 * 512 * (127 / 127.5) ** 2
    # All products are exact in integers; three scalings of 2^-24 each remain.
    torch.testing.assert_close(y, expected, rtol=2**-21, atol=0)


@pytest.mark.parametrize("columns", [1, 2, 131, 256])
def test_pairs_are_clipped_to_what_sixteen_bits_hold(columns):
    values = torch.randint(-127, 128, (40, columns), generator=torch.Generator().manual_seed(0)).to(
        torch.int8
    )
    kept = fbgemm.clip_pairs(values)
    wide, before = kept.to(torch.int64), values.to(torch.int64)
    sums = torch.nn.functional.pad(wide.abs(), (0, columns % 2)).view(40, -1, 2).sum(-1)
    assert int(sums.max()) <= 128
    # Nothing grows or changes its sign, and pairs within the bound stay.
    assert bool((wide.abs() <= before.abs()).all())
    assert bool((wide * before >= 0).all())
    fits = torch.nn.functional.pad(before.abs(), (0, columns % 2)).view(40, -1, 2).sum(-1) <= 128
    assert torch.equal((kept == values)[:, ::2][:, : fits.shape[1]] | ~fits, torch.ones_like(fits))


@pytest.mark.parametrize("way", ["corrected", "split"])
@pytest.mark.parametrize(("columns", "power"), [(131, 3), (1040, 3), (1040, 0)])
def test_integer_products_are_exact_in_every_way(way, columns, power, monkeypatch):
    """Heavy-tailed weights leave few corrections, weights that are all 127 too many of them: then the sign is split."""
    if fbgemm.fbgemm_agrees() not in ("direct", way, "corrected"):
        pytest.skip("FBGEMM is not exact in this way here")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(65, columns, generator=generator) ** power
    stored = quantize_weight(weight, Scheme.parse("w8a8-token"))
    monkeypatch.setattr(fbgemm, "fbgemm_agrees", lambda: way)
    kernel = fbgemm.FbgemmInt8(stored)
    assert (kernel._correction is not None) == (way == "corrected" and power == 3)
    codes = torch.randint(-127, 128, (19, columns), generator=generator).float()
    codes[:2] = 127.0
    codes[2] *= -1
    exact = (codes.double() @ stored.values.double().T) * stored.scales.double().view(-1)
    # Whole numbers below 2^24 are exact; beyond, and in two scalings, roundings of 2^-24 each.
    assert bool(((kernel(codes, 19).double() - exact).abs() <= 4 * 2**-24 * exact.abs().amax()).all())
    assert torch.equal(kernel.values(), stored.values)


@pytest.mark.parametrize("outliers", [1, 2, 3, 50, 100])
@pytest.mark.parametrize("rows", [1, 4, 30])
def test_mixed_keeps_outlier_channels(outliers, rows):
    """Few channels beside their dequantized weights, many as two digits: at most the weights' own error either way."""
    linear, quantized, x = make("mixed", (40, 100), rows, outliers=outliers)
    check(quantized, x)
    y, exact = quantized(x), reference_linear(x, quantized.stored, Scheme(), bias=quantized.bias)
    plain = QuantizedLinear.from_linear(linear, Scheme.parse("w8a8-token"))(x)
    if outliers < 100:
        assert (y - exact).norm() < 0.5 * (plain - exact).norm()


def test_smoothquant_moves_range_into_the_weights():
    linear, quantized, x = make("smoothquant", (65, 256), 40)
    factor = x.abs().amax(0) ** 0.5 / linear.weight.detach().abs().amax(0) ** 0.5
    torch.testing.assert_close(quantized.smooth, factor)
    plain = QuantizedLinear.from_linear(linear, Scheme.parse("w8a8-token"))
    with torch.no_grad():
        exact = linear(x)
    assert (quantized(x) - exact).norm() < 0.6 * (plain(x) - exact).norm()
    with pytest.raises(InputError, match="SmoothQuant needs"):
        QuantizedLinear.from_linear(linear, Scheme.parse("smoothquant"))


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_formats_of_the_model(name, dtype):
    linear, _, x = make(name, (40, 100), 20)
    linear, x = linear.to(dtype), x.to(dtype)
    quantized = QuantizedLinear.from_linear(linear, Scheme.parse(name), largest=x.abs().amax(0))
    y = quantized(x)
    assert y.dtype == dtype
    expected = reference_linear(
        x, quantized.stored, quantized.scheme, smooth=quantized.smooth, bias=linear.bias
    )
    # The result is rounded to the model's format, of at least 8 bits; inside nothing is coarser than that.
    assert (y.double() - expected).norm() <= 2**-8 * expected.norm()


@pytest.mark.parametrize("name", SCHEMES)
def test_shapes_and_strides_of_activations(name):
    _, quantized, x = make(name, (40, 100), 24)
    flat = quantized(x)
    # One scale a tensor or other kernels for other row counts would differ: the same 24 rows, differently laid out.
    assert torch.equal(quantized(x.view(2, 3, 4, 100)), flat.view(2, 3, 4, 40))
    strided = torch.empty(100, 24).T.copy_(x)
    assert torch.equal(quantized(strided), flat)
    assert quantized(x[:0]).shape == (0, 40)
    assert quantized(x.new_empty(2, 0, 100)).shape == (2, 0, 40)
    with pytest.raises(RuntimeError, match="takes 100 columns"):
        quantized(x[:, :99])


@pytest.mark.parametrize("name", SCHEMES)
def test_zero_and_broken_activations(name):
    _, quantized, x = make(name, (40, 100), 5)
    assert quantized.bias is not None
    torch.testing.assert_close(quantized(torch.zeros(5, 100)), quantized.bias.expand(5, 40))
    x[2, 7] = float("nan")
    assert bool(quantized(x)[2].isnan().all())
    x[2, 7] = float("inf")
    assert not bool(quantized(x)[2].isfinite().any())


def test_gradients_are_refused():
    _, quantized, x = make("int8-row", (40, 100), 2)
    with pytest.raises(RuntimeError, match="no_grad"):
        quantized(x.requires_grad_())
    with torch.no_grad():
        quantized(x)


@pytest.mark.parametrize("name", SCHEMES)
def test_copies_state_and_moves_keep_the_weights(name):
    _, quantized, x = make(name, (40, 100), 5)
    y = quantized(x)
    copies = {"copy": copy.deepcopy(quantized)}
    file = io.BytesIO()
    torch.save(quantized.state_dict(), file)
    file.seek(0)
    other = QuantizedLinear.from_linear(nn.Linear(100, 40), Scheme.parse(name), largest=x.abs().amax(0))
    other(x)
    other.load_state_dict(torch.load(file, weights_only=True))
    copies["state"] = other
    copies["moved"] = quantized.to("cpu").half().float()
    for what, module in copies.items():
        if what == "moved":
            assert module.scales.dtype != torch.float16
            continue
        assert torch.equal(module(x), y), what
    assert torch.equal(quantized.stored.values, other.stored.values)
    assert quantized.nbytes == quantized.stored.nbytes + (0 if quantized.smooth is None else 400)


def test_the_kernel_holds_the_only_copy():
    """Memory of a layer in use is that of its weights: nothing is kept twice."""
    for name in ("int4-g128", "w8a8-token"):
        _, quantized, x = make(name, (64, 256), 3)
        quantized(x)
        assert quantized.values.numel() == 0


def test_tiles_are_reused():
    first = tiles.scratch((64, 8), torch.float32, torch.device("cpu"))
    again = tiles.scratch((32, 16), torch.float32, torch.device("cpu"))
    assert first.data_ptr() == again.data_ptr()


@pytest.mark.parametrize("name", SCHEMES)
def test_inference_mode_and_back(name):
    """What a call in inference mode keeps works in calls outside of it."""
    _, quantized, x = make(name, (40, 300), 200)
    tiles._scratch.__dict__.clear()
    with torch.inference_mode():
        inside = quantized(x)
    assert torch.equal(quantized(x), inside)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("rows", [1, 40, 100])
def test_cuda_computes_the_reference(name, rows):
    _, quantized, x = make(name, (64, 256), rows)
    x = x.to(torch.bfloat16).to(x.dtype)
    expected = reference_linear(
        x, quantized.stored, quantized.scheme, smooth=quantized.smooth, bias=quantized.bias
    )
    y = quantized.to("cuda")(x.to("cuda", torch.bfloat16)).cpu().double()
    # The result and int4's scales are rounded to bf16, 2^-9 each, and int8 codes of x over a scale may differ by one.
    assert (y - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_kernels_are_in_use():
    device = torch.device("cuda", torch.cuda.current_device())
    assert cuda_int8_agrees(device)
    assert cuda_int4_agrees(device) or torch.cuda.get_device_capability() < (8, 0)


@pytest.mark.parametrize("rows", [64, 192, 208])
def test_codes_are_packed_alike_in_pieces(monkeypatch, rows):
    codes = torch.randint(0, 16, (rows, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    whole = packed._pack(codes)
    monkeypatch.setattr(packed, "_CODES_AT_ONCE", 64 * 64)
    assert torch.equal(packed._pack(codes), whole)
