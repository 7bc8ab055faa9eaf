"""The stored form against definitions: bounds of rounding, zeros, nibbles, names."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stabilitylab.errors import InputError
from stabilitylab.quantization import Scheme, quantize_weight
from stabilitylab.quantization.scheme import GROUPS, NAMED
from stabilitylab.quantization.stored_weight import pack_nibbles, unpack_nibbles

WEIGHT_ONLY = [
    f"int{bits}-{share}{zero}{search}"
    for bits, share, zero, search in itertools.product(
        (8, 4), ("row", "g32", "g64", "g128"), ("", "-asym"), ("", "-mse")
    )
]


@pytest.mark.parametrize("name", [*NAMED, *WEIGHT_ONLY])
def test_a_scheme_is_its_name(name):
    assert Scheme.parse(name).name == name


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(activations="token", threshold=5.5),
        Scheme(activations="tensor", smooth=0.25, threshold=6.0),
        Scheme(share="tensor", activations="token"),
    ],
)
def test_a_scheme_without_a_short_name_is_written_out(scheme):
    assert Scheme.parse(scheme.name) == scheme


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 3},
        {"share": 48},
        {"threshold": 6.0},
        {"share": "tensor"},
        {"bits": 4, "activations": "token"},
        {"activations": "token", "asymmetric": True},
        {"activations": "token", "threshold": 0.0},
        {"activations": "token", "smooth": 1.5},
    ],
)
def test_what_does_not_go_together_is_refused(settings):
    with pytest.raises(InputError):
        Scheme(**settings)


@pytest.mark.parametrize("name", ["int3-row", "int4-g48", "w8a8", "", "int4-row-mse-asym"])
def test_unknown_names_are_refused(name):
    with pytest.raises(InputError, match=r"no scheme|not supported"):
        Scheme.parse(name)


@given(rows=st.integers(1, 5), columns=st.integers(1, 9), seed=st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_nibbles_there_and_back(rows, columns, seed):
    codes = torch.randint(0, 16, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(
        torch.uint8
    )
    packed = pack_nibbles(codes)
    assert packed.shape == (rows, -(-columns // 2))
    assert torch.equal(unpack_nibbles(packed, columns), codes)


@pytest.mark.parametrize("name", [*NAMED, *[name for name in WEIGHT_ONLY if not name.endswith("mse")]])
def test_rounding_is_to_the_nearest_code(name):
    """|w - w_q| <= scale / 2, whatever scale and zero point were rounded to. (w / scale is rounded in float32: 2^-24 of 127.)"""
    scheme = Scheme.parse(name)
    weight = torch.randn(37, 131, generator=torch.Generator().manual_seed(0)) * 3
    stored = quantize_weight(weight, scheme)
    error = (weight.double() - stored.dequantize(torch.float64)).abs()
    group = stored.group
    scales = stored.scales.double()
    scales = scales.repeat_interleave(group, 1)[:, :131] if scales.shape[1] > 1 else scales
    assert bool((error <= scales * (0.5 + 255 * 2**-24)).all())


@pytest.mark.parametrize("name", [*NAMED, *WEIGHT_ONLY])
@pytest.mark.parametrize("shape", [(3, 70), (1, 1), (2, 128)])
def test_zeros_stay_zero(name, shape):
    weight = torch.zeros(shape)
    assert torch.equal(quantize_weight(weight, Scheme.parse(name)).dequantize(), weight)
    weight[0, 0] = -2.5
    restored = quantize_weight(weight, Scheme.parse(name)).dequantize()
    assert torch.equal(restored == 0, weight == 0)
    assert bool(restored.isfinite().all())


@pytest.mark.parametrize("name", ["w8a8-token", "int8-row", "int4-g32", "int4-g32-asym"])
def test_weights_too_small_to_divide_by(name):
    weight = torch.full((2, 64), 1e-44)
    weight[1] = 1e-38
    restored = quantize_weight(weight, Scheme.parse(name)).dequantize()
    assert bool(restored.isfinite().all())
    assert float((restored - weight).abs().max()) <= 1.2e-38


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("share", ["row", *GROUPS])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_the_search_never_does_worse(bits, share, asymmetric):
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(1)) ** 3
    errors = [
        (
            quantize_weight(
                weight, Scheme(bits=bits, share=share, asymmetric=asymmetric, search=s)
            ).dequantize()
            - weight
        )
        .square()
        .sum()
        for s in (False, True)
    ]
    assert errors[1] <= errors[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value):
    weight = torch.ones(4, 4)
    weight[2, 1] = value
    with pytest.raises(InputError, match="layer 3 holds NaN or infinity"):
        quantize_weight(weight, Scheme(), name="layer 3")


def test_bytes_are_the_tensors_and_int4_is_at_most_28_hundredths_of_fp16():
    weight = torch.randn(512, 1024)
    for name in ("int4-row", "int4-g128", "int4-g128-asym", "int4-g64", "int4-g64-asym"):
        assert quantize_weight(weight, Scheme.parse(name)).nbytes <= 0.28 * 2 * weight.numel()


def test_chunks_do_not_show(monkeypatch):
    weight = torch.randn(64, 96)
    for name in ("int4-g32-asym-mse", "w8a8-tensor", "int8-row"):
        whole = quantize_weight(weight, Scheme.parse(name))
        monkeypatch.setattr("stabilitylab.quantization.stored_weight._CHUNK", 96 * 5)
        parts = quantize_weight(weight, Scheme.parse(name))
        monkeypatch.undo()
        assert torch.equal(whole.values, parts.values)
        assert torch.equal(whole.scales, parts.scales)
        assert whole.fingerprint == parts.fingerprint


def test_the_fingerprint_is_of_the_numbers_not_their_format():
    weight = torch.randn(8, 8).bfloat16()
    made = [quantize_weight(w, Scheme()).fingerprint for w in (weight, weight.float(), weight + 1)]
    assert made[0] == made[1] != made[2]
