"""Number formats, rotations and a user's own schemes: what they compute, store and refuse."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from stabilitylab.cli import main
from stabilitylab.errors import InputError
from stabilitylab.formats import dequantize, quantize
from stabilitylab.models import open_text_model
from stabilitylab.quantization.applying import quantize_layers
from stabilitylab.quantization.format_scheme import FormatLinear
from stabilitylab.quantization.loading import open_quantized
from stabilitylab.quantization.plan import load_plan
from stabilitylab.quantization.schemes import _REGISTERED, register_scheme, scheme_of
from tests.stabilitylab.quantization.folders import TEXT

FORMATS = [
    "fp8-e4m3-tensor/fp8-e4m3-tensor",
    "fp8-e4m3-row/fp8-e4m3-row",
    "fp8-e5m2-row",
    "fp8-e4m3-block128/fp8-e4m3-tile128",
    "mxfp8-e4m3/mxfp8-e4m3",
    "mxfp6-e2m3",
    "mxfp4",
    "nvfp4",
    "nvfp4/nvfp4",
]


def tensors(rows: int = 24, columns: int = 96) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W [N, K], b [N], x [M, K] with a channel forty times larger than the rest."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=draw)
    x = torch.randn(7, columns, generator=draw)
    x[:, 5] *= 40
    return weight, torch.randn(rows, generator=draw), x


@pytest.mark.parametrize("name", FORMATS)
def test_a_layer_is_the_float64_product_of_the_rounded_numbers(name):
    weight, bias, x = tensors()
    scheme = scheme_of(name)
    assert scheme.name == name
    layer = scheme.layer(weight, bias=bias)
    weights, _, activations = name.partition("/")
    wide = x if not activations else dequantize(quantize(x, activations))
    expected = wide.double() @ dequantize(quantize(weight, weights)).double().T + bias.double()
    # A float32 sum of K products: each of K + 1 roundings is at most a unit in the last place of the sum of magnitudes.
    size = wide.double().abs() @ weight.double().abs().T + bias.double().abs()
    assert bool(((layer(x).double() - expected).abs() <= 97 * 2.0**-23 * size).all())


@pytest.mark.parametrize(("name", "bits"), [("fp8-e4m3-block128", 8), ("mxfp4", 4.25), ("nvfp4", 4.5)])
def test_bytes_are_those_of_the_format(name, bits):
    layer = scheme_of(name).layer(torch.randn(64, 256))
    extra = 4 if name == "nvfp4" else 0  # its scale of the tensor
    scales = 4 * 2 if name.startswith("fp8") else 0  # of 128 x 128 blocks, one row of them cut short
    assert layer.nbytes == 64 * 256 * bits / 8 + extra + scales


def test_a_rotation_changes_nothing_but_the_rounding():
    weight, bias, x = tensors()
    exact = nn.functional.linear(x.double(), weight.double(), bias.double())

    def error(name: str) -> float:
        off = scheme_of(name).layer(weight, bias=bias)(x).double() - exact
        return float(off.norm() / exact.norm())

    # 11 bits of mantissa: without rounding to speak of, rotated and unrotated products agree.
    assert error("fp16-had") < 1e-3
    assert error("w8a8-tensor-had") < error("w8a8-tensor") / 2
    assert error("nvfp4/nvfp4-had") < error("nvfp4/nvfp4")


def test_copies_moves_and_formats_keep_codes():
    layer = scheme_of("nvfp4").layer(torch.randn(16, 64), bias=torch.randn(16))
    again = copy.deepcopy(layer).to(torch.bfloat16)
    assert again.bias.dtype == torch.bfloat16
    assert torch.equal(again.codes, layer.codes)
    assert again.scales.dtype == layer.scales.dtype
    with pytest.raises(RuntimeError, match="no gradient"):
        layer(torch.randn(2, 64, requires_grad=True))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fp9", "there is no scheme 'fp9'"),
        ("nvfp4/", "there is no scheme"),
        ("int4-row-had-had", "there is no scheme"),
    ],
)
def test_names_that_are_none(name, said):
    with pytest.raises(InputError, match=said):
        scheme_of(name)


def test_what_a_layer_cannot_take():
    with pytest.raises(InputError, match="odd number"):
        scheme_of("int8-row-had").layer(torch.randn(4, 7), name="h.0")
    with pytest.raises(InputError, match="one of the two"):
        scheme_of("smoothquant-had").layer(torch.randn(4, 8))
    with pytest.raises(InputError, match="NaN or infinity"):
        scheme_of("mxfp4").layer(torch.full((4, 32), torch.nan))


@pytest.fixture
def own():
    class Signs:
        """Weights of one bit."""

        name = "signs"

        def layer(self, weight, *, bias=None, largest=None, name="the layer"):
            made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
            made.weight.data = weight.sign() * weight.abs().mean()
            if bias is not None:
                made.bias.data = bias
            made.nbytes = weight.numel() // 8
            return made.requires_grad_(False)

    register_scheme(Signs())
    yield Signs
    del _REGISTERED["signs"]


def planned(folder, model, *schemes, budget="0.45", **more):
    (folder / "text").write_text(TEXT)
    arguments = ["quantize", str(model), "--text", str(folder / "text"), "--plan", str(folder / "plan.json")]
    arguments += ["--budget-memory", budget, "--tokens", "32", "--verify-tokens", "64", "--length", "32"]
    for name, value in more.items():
        arguments += [f"--{name}", str(value)]
    return main([*arguments, "--schemes", *schemes])


def test_formats_are_planned_written_and_opened(llama_folder, tmp_path):
    schemes = ("nvfp4", "fp8-e4m3-row/fp8-e4m3-row", "int4-g32-asym-had")
    assert planned(tmp_path, llama_folder, *schemes, apply=tmp_path / "out", html=tmp_path / "p.html") == 0
    plan, opened = load_plan(tmp_path / "plan.json"), open_quantized(tmp_path / "out")
    original = open_text_model(llama_folder)
    quantize_layers(original.module, plan.schemes)
    for window in original.windows([TEXT], 32, 64):
        assert torch.equal(opened.run(window), original.run(window))
    assert any(isinstance(layer, FormatLinear) for layer in opened.module.modules())


def test_the_outcome_is_told_on_a_third_text(llama_folder, tmp_path):
    """Not on the text that chose the plan; the test measures it again, by other means."""
    assert planned(tmp_path, llama_folder, "int4-row", "int8-row", budget="0.4") == 0
    plan = load_plan(tmp_path / "plan.json")
    assert (plan.tokens, plan.told_tokens) == ((32, 64), 64)
    model = open_text_model(llama_folder)
    third = list(model.windows([TEXT], 32, 160))[3:]

    def loss() -> float:
        sums = [model.loss(window) for window in third]
        return sum(total for total, _ in sums) / sum(count for _, count in sums)

    before = loss()
    quantize_layers(model.module, plan.schemes)
    assert plan.loss == pytest.approx(before, abs=1e-9)
    assert plan.planned.loss == pytest.approx(loss() - before, abs=1e-9)
    assert any("on the third" in note for note in plan.notes)


def test_a_scheme_of_ones_own(own, llama_folder, tmp_path, capsys):
    assert planned(tmp_path, llama_folder, "signs", "int8-row", budget="0.3") == 0
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert "signs" in plan["singles"]
    assert any(layer["scheme"] == "signs" for layer in plan["layers"].values())
    capsys.readouterr()
    again = ["quantize", str(llama_folder), "--plan", str(tmp_path / "plan.json")]
    assert main([*again, "--apply", str(tmp_path / "out")]) == 2
    assert "signs is none of this package's" in capsys.readouterr().err
    with pytest.raises(InputError, match="already"):
        register_scheme(own())
