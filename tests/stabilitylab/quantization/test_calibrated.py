"""Rounding for a layer's inputs against naive twins in float64: no factor, no blocks, the surgeon's step written out."""

from __future__ import annotations

import pytest
import torch

from stabilitylab.errors import InputError
from stabilitylab.formats import (
    dequantize,
    quantize,
    quantize_searched,
    rotate,
    rotation_signs,
    scaled_format,
)
from stabilitylab.formats.number_format import decode, encode
from stabilitylab.quantization import Scheme, quantize_weight
from stabilitylab.quantization.awq import awq_scales
from stabilitylab.quantization.calibrated import CalibratedScheme, needs_moments
from stabilitylab.quantization.gptq_factors import RowsFactor
from stabilitylab.quantization.input_moments import Moments
from stabilitylab.quantization.schemes import scheme_of

N, K, T = 24, 160, 600


@pytest.fixture(scope="module")
def layer():
    """A weight and inputs whose channels go together and differ in size; channel 7 is never used."""
    draw = torch.Generator().manual_seed(0)
    mix_KK = torch.randn(K, K, generator=draw) / K**0.5 + torch.eye(K)
    x_TK = torch.randn(T, K, generator=draw) @ mix_KK
    x_TK[:, 3] *= 30
    x_TK[:, 7] = 0
    return torch.randn(N, K, generator=draw), x_TK


def surgeon(weight, x, round_column, *, order, group=K):
    """Optimal brain surgeon, one column after another, every inverse computed anew."""
    left = weight.double().clone()
    second = x.double().T @ x.double() / len(x)
    dead = second.diagonal() == 0
    second[dead, dead] = 1.0
    shrunk = 4 * K / (4 * K + T)
    second = (1 - shrunk) * second + shrunk * torch.diag(second.diagonal())
    second += 0.01 * second.diagonal().mean() * torch.eye(K, dtype=torch.float64)
    columns = second.diagonal().argsort(descending=True, stable=True).tolist() if order else list(range(K))
    result = torch.zeros_like(left)
    for place, k in enumerate(columns):
        if not order and k % group == 0:
            round_column.open(k, left[:, k : k + group])
        rest = columns[place:]
        inverse = torch.linalg.inv(second[rest][:, rest])
        result[:, k] = round_column(left[:, k], k)
        error = (left[:, k] - result[:, k]) / inverse[0, 0]
        left[:, rest] -= error[:, None] * inverse[0]
    return result


class Affine:
    """int4 with zero points in groups, its scales from whatever weights it is opened with, by the same definition as
    stored_weight.py."""

    def __init__(self, weight, scheme, group):
        self.scheme, self.group = scheme, group
        self.scale, self.zero = torch.ones(N, K, dtype=torch.float64), torch.zeros(N, K, dtype=torch.float64)
        for start in range(0, K, group):
            self.open(start, weight[:, start : start + group])

    def open(self, start, part):
        stored = quantize_weight(part.float(), self.scheme)
        self.scale[:, start : start + self.group] = stored.scales.double()
        self.zero[:, start : start + self.group] = stored.zeros.double()

    def __call__(self, column, k):
        code = (column / self.scale[:, k]).round() + self.zero[:, k]
        return (code.clamp(0, 15) - self.zero[:, k]) * self.scale[:, k]


@pytest.mark.parametrize("method", ["gptq", "gptqo"])
@pytest.mark.parametrize("name", ["int4-g32-asym-mse", "int4-g64-asym", "int4-row-asym"])
def test_integers_are_those_of_the_naive_surgeon(layer, name, method):
    weight, x = layer
    scheme = scheme_of(f"{name}-{method}")
    made = scheme.layer(weight, moments=Moments.of(x, torch.float64))
    inner = Scheme.parse(name)
    group = inner.share if isinstance(inner.share, int) else K
    expected = surgeon(weight, x, Affine(weight, inner, group), order=method == "gptqo", group=group)
    # The same numbers of the grid, bit for bit: in float64 no quotient of random numbers lies at a tie.
    assert torch.equal(made.stored.dequantize(), expected.float())
    assert made.stored.nbytes == quantize_weight(weight, inner).nbytes


class Floats:
    def __init__(self, weight, format):
        like = quantize(weight, format)
        self.element = scaled_format(format).element
        scales = like.scales.double() * (1 if like.tensor_scale is None else like.tensor_scale.double())
        self.scale = scales.repeat_interleave(K // scales.shape[1], 1)

    def open(self, start, part):
        pass

    def __call__(self, column, k):
        code = encode((column / self.scale[:, k]).float(), self.element)
        return decode(code, self.element).double() * self.scale[:, k]


@pytest.mark.parametrize("method", ["gptq", "gptqo"])
@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "fp8-e4m3-row"])
def test_floats_are_those_of_the_naive_surgeon(layer, name, method):
    weight, x = layer
    made = scheme_of(f"{name}-{method}").layer(weight, moments=Moments.of(x, torch.float64))
    expected = surgeon(weight, x, Floats(weight, name), order=method == "gptqo")
    # A scale is one fp32 number here, a product of two in float64 there.
    assert torch.allclose(dequantize(made.stored).double(), expected, rtol=2**-22, atol=0)


@pytest.mark.parametrize(
    "name", ["int4-g64-asym-mse", "int4-g128", "int8-row", "nvfp4", "nvfp4-mse", "mxfp4", "w8a8-token"]
)
def test_the_output_is_nearer_than_by_rounding_to_nearest(layer, name):
    weight, x = layer
    own = x.double() @ weight.double().T

    def error(scheme):
        made = scheme_of(scheme)
        twin = made.layer(weight, moments=Moments.of(x)) if needs_moments(made) else made.layer(weight)
        held = dequantize(twin.stored) if hasattr(twin, "format") else twin.stored.dequantize()
        held = held if twin.smooth is None else held / twin.smooth
        return float((x.double() @ held.double().T - own).square().sum())

    nearest = error(name)
    assert error(f"{name}-gptq") < 0.8 * nearest
    assert error(f"{name}-gptqo") < 0.8 * nearest
    assert error(f"{name}-awq") <= nearest


def test_a_layer_that_rounds_for_its_inputs_computes_what_it_stores(layer):
    weight, x = layer
    for name in ("int4-g32-asym-awq", "nvfp4-awq", "nvfp4-gptq", "int4-g32-gptqo-had"):
        twin = scheme_of(name).layer(weight, bias=torch.ones(N), moments=Moments.of(x))
        inner = getattr(twin, "layer", twin)
        held = dequantize(inner.stored) if hasattr(inner, "format") else inner.stored.dequantize()
        rows = rotate(x, twin.signs) if hasattr(twin, "signs") else x
        rows = rows if inner.smooth is None else rows / inner.smooth
        expected = rows.double() @ held.double().T + 1
        # Kernels take bf16 inputs where that is quicker: 2^-8 of each product at most.
        bound = 2**-8 * (rows.double().abs() @ held.double().abs().T + 1)
        assert bool(((twin(x) - expected).abs() <= bound).all())


def test_awq_takes_the_best_exponent(layer):
    weight, x = layer
    scheme = Scheme.parse("int4-g32-asym")

    def rounded(part):
        return quantize_weight(part, scheme).dequantize()

    def error(scale):
        off = rounded(weight * scale) / scale - weight
        return float((x.double() @ off.double().T).square().sum())

    size = x.abs().mean(0)
    used = size > 0
    tried = [torch.ones(K)]
    for step in range(1, 11):
        scale = torch.where(used, size, 1.0) ** (step / 10)
        scale /= (scale[used].max() * scale[used].min()).sqrt()
        tried.append(torch.where(used, scale, 1.0))
    best = min(tried, key=error)
    assert not torch.equal(best, tried[0])
    assert torch.allclose(awq_scales(weight, Moments.of(x), rounded), best, rtol=1e-6)


def _some_rows_at_a_time(monkeypatch, rows):
    for place in ("stabilitylab.quantization.calibrated", "stabilitylab.formats.chunked_rounding"):
        monkeypatch.setattr(f"{place}._WHOLE", rows * K)
        monkeypatch.setattr(f"{place}._AT_ONCE", rows * K)


@pytest.mark.parametrize("name", ["int4-g32-asym-mse-gptqo", "int8-row-gptq"])
def test_rows_may_be_rounded_some_at_a_time(layer, name, monkeypatch):
    weight, x = layer
    moments = Moments.of(x, torch.float64)
    whole = scheme_of(name).layer(weight, moments=moments).stored
    _some_rows_at_a_time(monkeypatch, 7)
    parts = scheme_of(name).layer(weight, moments=moments).stored
    assert parts.shape == whole.shape
    assert parts.fingerprint == whole.fingerprint
    assert torch.equal(parts.dequantize(), whole.dequantize())


@pytest.mark.parametrize(
    "name", ["nvfp4-gptqo", "nvfp4-mse-gptq", "mxfp4-gptqo", "fp8-e4m3-row-gptq", "nvfp4"]
)
def test_rows_of_floats_may_be_rounded_and_multiplied_some_at_a_time(layer, name, monkeypatch):
    weight, x = layer
    moments = Moments.of(x, torch.float64) if "gptq" in name else None

    def made():
        scheme = scheme_of(name)
        return scheme.layer(weight, moments=moments) if moments else scheme.layer(weight)

    whole = made()
    expected = whole(x)
    _some_rows_at_a_time(monkeypatch, 7)
    parts = made()
    assert parts.fingerprint == whole.fingerprint
    assert torch.equal(parts.codes, whole.codes)
    assert torch.equal(parts.scales.float(), whole.scales.float())
    # Products of fewer rows may be added up in another order.
    bound = 2 * K * torch.finfo(torch.float32).eps * x.abs() @ dequantize(whole.stored).abs().T
    assert ((parts(x) - expected).abs() <= bound).all()


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("rows", [1, 17, 64])
def test_rows_of_the_factor_are_those_of_the_whole_one(rows, order):
    """Fewer rows than columns: U from a diagonal and the rows' span, against inverse and Cholesky factor in float64."""
    columns = 90
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows), dtype=torch.float64)
    x *= torch.linspace(0.1, 5, columns)
    x[:, 7] = 0
    second = x.T @ x / rows
    diagonal = torch.where(second.diagonal() == 0, 1.0, second.diagonal())
    matrix = second * rows / (rows + 4 * columns)
    matrix.diagonal().copy_(diagonal + 0.01 * diagonal.mean())
    made = {
        dtype: Moments.of(x.to(dtype), dtype).factor(order=order) for dtype in (torch.float64, torch.float32)
    }
    at = made[torch.float64].order
    assert at.tolist() == (
        torch.argsort(diagonal, descending=True, stable=True).tolist() if order else list(range(columns))
    )
    whole = torch.linalg.cholesky(torch.linalg.inv(matrix[at][:, at]), upper=True)
    for dtype, factor in made.items():
        assert isinstance(factor, RowsFactor)
        found = torch.zeros(columns, columns, dtype=dtype)
        for first, last, part in factor.blocks(32):
            found[first:last, first:] = part
        assert torch.allclose(found.double(), whole, rtol=0, atol=1e3 * torch.finfo(dtype).eps)


def test_moments_are_those_of_all_rows(layer):
    _, x = layer
    made = Moments(K, torch.float64)
    for part in x.split(70):
        made.add(part[None])
    assert torch.allclose(made.second, x.double().T @ x.double() / T)
    assert torch.allclose(made.mean, x.double().abs().mean(0))
    signs = rotation_signs(32, 0)
    turned = rotate(x.double(), signs)
    assert torch.allclose(made.rotated(signs).second, turned.T @ turned / T)
    off = torch.randn(5, K)
    assert float(made.output_error(off)) == pytest.approx(
        float((x.double() @ off.double().T).square().sum()) / T, rel=1e-9
    )


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "fp8-e4m3-row", "fp8-e4m3-block128", "mxfp8-e4m3"])
def test_searched_scales_are_nowhere_worse(layer, name):
    weight = layer[0] * torch.linspace(0.1, 3, N)[:, None]
    kind = scaled_format(name)
    width = kind.block[1] or K

    def errors(made):
        return (dequantize(made) - weight).square().view(N, -1, min(width, 32)).sum(-1)

    usual, searched = quantize(weight, name), quantize_searched(weight, name)
    assert searched.scales.shape == usual.scales.shape
    assert searched.scales.dtype == usual.scales.dtype
    if width <= 32:
        assert bool((errors(searched) <= errors(usual)).all())
    assert float(errors(searched).sum()) <= float(errors(usual).sum())
    if name in ("nvfp4", "mxfp4"):
        assert float(errors(searched).sum()) < 0.95 * float(errors(usual).sum())


def test_what_is_not_finite_shows_after_a_search():
    weight = torch.randn(2, 64)
    weight[0, 3] = torch.inf
    for name in ("nvfp4", "mxfp4"):
        found = dequantize(quantize_searched(weight, name))
        assert bool(found[0].isnan().any())


def test_names_are_read_back():
    for name in (
        "int4-g64-asym-mse-gptq",
        "nvfp4-mse-gptqo-had",
        "mxfp4-mse/mxfp8-e4m3-awq",
        "nvfp4-mse",
        "w8a8-token-gptq",
    ):
        assert scheme_of(name).name == name
    assert isinstance(scheme_of("int4-row-gptq"), CalibratedScheme)
    assert needs_moments(scheme_of("int4-row-gptq-had"))
    assert not needs_moments(scheme_of("int4-row-had"))
    for name in (
        "smoothquant-gptq",
        "w8a8-tensor-gptq",
        "int4-row-gptq-awq",
        "int4-row-had-gptq",
        "e2m1-gptqx",
    ):
        with pytest.raises(InputError):
            scheme_of(name)


def test_without_moments_it_says_what_is_missing(layer):
    with pytest.raises(InputError, match=r"head: int4-row-gptq rounds for a text's inputs: .*--text"):
        scheme_of("int4-row-gptq").layer(layer[0], name="head")
    broken = layer[0].clone()
    broken[0, 0] = torch.nan
    with pytest.raises(InputError, match="NaN"):
        scheme_of("int4-row-gptq").layer(broken, moments=Moments.of(layer[1]))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        *(
            "int8-row-gptq",
            "int4-g32-asym-mse-gptqo",
            "nvfp4-gptq",
            "mxfp4-mse-awq",
            "int4-g32-asym-awq",
            "int8-row-had",
        ),
        *(
            "w8a8-tensor",
            "smoothquant",
            "int4-g32-asym-mse",
            "fp8-e4m3-block128",
            "nvfp4-mse",
            "w8a8-token-gptq-had",
        ),
    ],
)
def test_the_weight_stays_what_it_was(name, turned):
    """For GPT-2's layers schemes get a transposed view of the model's own numbers."""
    torch.manual_seed(0)
    held = torch.randn(64, 96)
    weight = held.T if turned else held
    before = held.clone()
    # Channels in descending order, so that act-order changes none.
    x = torch.randn(128, weight.shape[1]) * torch.linspace(3, 1, weight.shape[1])
    scheme = scheme_of(name)
    given = {"moments": Moments.of(x)} if needs_moments(scheme) else {}
    scheme.layer(weight, largest=x.abs().amax(0), **given)
    assert torch.equal(held, before)
