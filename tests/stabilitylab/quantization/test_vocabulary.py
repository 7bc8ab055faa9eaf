"""Embeddings in plans: one matrix for lookups and for the output tied to it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stabilitylab.models import open_text_model
from stabilitylab.quantization.applying import quantize_layers
from stabilitylab.quantization.input_moments import Moments
from stabilitylab.quantization.linear import QuantizedLinear
from stabilitylab.quantization.ranges import layer_inputs
from stabilitylab.quantization.replacement import quantizable_layers
from stabilitylab.quantization.rounded_weights import RoundedWeights
from stabilitylab.quantization.schemes import scheme_of
from stabilitylab.quantization.verification import Twins
from stabilitylab.quantization.vocabulary import (
    QuantizedEmbedding,
    embedding_matrices,
    rows_of,
)
from stabilitylab.quantization.vocabulary_sensitivity import Ends, output_layers
from tests.stabilitylab.quantization.folders import TEXT, write_bert, write_llama

SCHEMES = [
    "int8-row",
    "int4-g32-asym-mse",
    "w8a8-tensor",
    "fp8-e4m3-row",
    "fp8-e4m3-block128",
    "mxfp4",
    "nvfp4",
]


@pytest.fixture(params=["tied", "own", "encoder"])
def opened(request, tmp_path):
    if request.param == "encoder":
        return open_text_model(write_bert(tmp_path))
    return open_text_model(write_llama(tmp_path, tied=request.param == "tied"))


@pytest.mark.parametrize("name", SCHEMES)
def test_rows_are_those_of_the_whole_matrix(name):
    torch.manual_seed(0)
    weight = torch.randn(300, 64)
    made = scheme_of(name).layer(weight)
    whole = made(torch.eye(64)).T if not isinstance(made, QuantizedLinear) else made.stored.dequantize()
    rows = torch.tensor([0, 7, 127, 128, 299])
    torch.testing.assert_close(rows_of(made, rows), whole[rows], rtol=1e-6, atol=0)


def _with_weight(model, path, weight):
    """The model with numbers of a matrix changed, wherever it is used."""
    model.module.get_submodule(path).weight.data = weight
    return model


@pytest.mark.parametrize("name", ["int8-row", "int4-g32-asym-mse", "mxfp4"])
def test_harm_is_the_divergence_with_all_uses_of_the_matrix(opened, name):
    """Against float64 with the dequantized numbers in the model's own parameter, which both ends read."""
    windows = list(opened.windows([TEXT], 32, 64))
    matrices = embedding_matrices(opened.module)
    ((path, matrix),) = matrices.items()
    inputs = layer_inputs(opened, windows, quantizable_layers(opened.module) | matrix.outputs)
    found = Ends(opened, windows, inputs.largest).embedding(matrix, [scheme_of(name)])
    assert found.also == (("lm_head",) if matrix.outputs else ())
    assert found.timed == bool(matrix.outputs)
    own, other = (open_text_model(opened.path, dtype=torch.float64) for _ in range(2))
    made = scheme_of(name).layer(matrix.weight)
    _with_weight(other, path, rows_of(made, torch.arange(len(matrix.weight))).double())
    harm = count = 0.0
    for window in windows:
        y, z = own.run(window), other.run(window)
        if opened.predicts:
            chosen = window.targets_BT >= 0
            p, q = (F.log_softmax(one[chosen], -1) for one in (y, z))
            harm += float((p.exp() * (p - q)).sum())
            count += int(chosen.sum())
        else:
            harm += float((z - y).square().sum())
            count += float(y.square().sum())
    # int4's kernel multiplies in bf16 on a CPU.
    assert found.effects[name].harm == pytest.approx(harm / count, rel=0.05)
    assert found.effects[name].bytes == made.nbytes
    assert embedding_matrices(opened.module).keys() == {path}  # the model is what it was


def test_an_output_of_its_own_is_measured_and_rounded_for_its_inputs(tmp_path):
    model = open_text_model(write_llama(tmp_path))
    windows = list(model.windows([TEXT], 32, 64))
    outputs = output_layers(model, embedding_matrices(model.module))
    assert outputs.keys() == {"lm_head"}
    inputs = layer_inputs(model, windows, outputs)
    schemes = [scheme_of(name) for name in ("int4-g32-asym", "int4-g32-asym-gptqo")]
    found = Ends(model, windows, inputs.largest).output("lm_head", schemes, None)
    nearest, rounded = (found.effects[scheme.name] for scheme in schemes)
    assert 0 < rounded.harm < nearest.harm
    assert rounded.bytes == nearest.bytes


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("int4-g64-asym-mse-gptqo", "int4-g64-asym-mse-gptqo"),
        ("mixed-gptq", "w8a8-token-gptq"),
        ("mixed", "w8a8-token"),
        ("smoothquant", "w8a8-token"),
        ("nvfp4-mse-awq", "nvfp4-mse"),
        ("int8-row-had", "int8-row"),
    ],
)
def test_what_schemes_mean_for_a_matrix(opened, name, meant):
    (matrix,) = embedding_matrices(opened.module).values()
    # Without an output there are no inputs to round for.
    meant = meant if matrix.outputs else meant.removesuffix("-gptqo").removesuffix("-gptq")
    assert matrix.scheme(scheme_of(name)).name == meant


def test_a_tied_matrix_is_rounded_for_its_outputs_inputs(tmp_path):
    """The rows' own error grows, the logits' shrinks: against float64 with the numbers in the parameter that both ends read."""
    model = open_text_model(write_llama(tmp_path, tied=True))
    windows = list(model.windows([TEXT], 32, 64))
    ((path, matrix),) = embedding_matrices(model.module).items()
    inputs = layer_inputs(model, windows, quantizable_layers(model.module) | matrix.outputs)
    schemes = [scheme_of(name) for name in ("int4-g32-asym", "int4-g32-asym-gptqo")]
    rounded = RoundedWeights(tmp_path / "rounded")
    found = Ends(model, windows, inputs.largest).embedding(matrix, schemes, rounded)
    nearest, own = (found.effects[scheme.name] for scheme in schemes)
    assert own.bytes == nearest.bytes
    assert own.error > nearest.error
    seen = []
    hook = model.module.lm_head.register_forward_pre_hook(
        lambda _module, arguments: seen.append(arguments[0])
    )
    for window in windows:
        model.run(window)
    hook.remove()
    x = torch.cat([one.flatten(0, -2) for one in seen])
    expected = schemes[1].layer(matrix.weight, moments=Moments.of(x))
    kept = rounded.scheme(path, schemes[1]).layer(matrix.weight)
    assert torch.equal(kept.stored.values, expected.stored.values)
    off = [
        x.double() @ (made.stored.dequantize().double() - matrix.weight.double()).T
        for made in (kept, schemes[0].layer(matrix.weight))
    ]
    assert off[0].square().sum() < 0.8 * off[1].square().sum()
    # Twins of a plan come from the file, at both places.
    twins = Twins(model.module, inputs.largest, rounded, {path: matrix}).of({path: schemes[1]})
    assert torch.equal(twins["lm_head"].stored.values, expected.stored.values)
    assert torch.equal(twins[path].matrix.stored.values, expected.stored.values)


def test_both_places_get_the_same_numbers(tmp_path):
    model = open_text_model(write_llama(tmp_path, tied=True))
    quantize_layers(model.module, {"model.embed_tokens": scheme_of("int8-row")})
    table, output = model.module.model.embed_tokens, model.module.lm_head
    assert isinstance(table, QuantizedEmbedding)
    assert torch.equal(table.matrix.stored.values, output.stored.values)
    ids = torch.tensor([[3, 3, 1]])
    assert torch.equal(table(ids), output.stored.dequantize()[ids])
    assert table.nbytes == output.nbytes


class _ReadsItself(nn.Module):
    """Multiplies with the embedding's weight, as GLM does."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 8)

    def forward(self, input_ids):
        return self.embed(input_ids) @ self.embed.weight.T


def test_a_weight_that_the_model_reads_itself_is_left():
    assert not embedding_matrices(_ReadsItself())
