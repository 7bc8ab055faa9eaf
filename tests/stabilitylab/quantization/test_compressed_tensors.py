"""A plan written as compressed-tensors: its numbers are the plan's, and the real library opens them."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from stabilitylab.errors import InputError
from stabilitylab.formats import Quantized, dequantize
from stabilitylab.models import open_text_model
from stabilitylab.quantization.compressed_tensors import _packed, save_compressed_tensors
from stabilitylab.quantization.exports import save_as
from stabilitylab.quantization.plan import Budget, PlannedLayer, load_plan
from stabilitylab.quantization.plan_making import make_plan
from stabilitylab.quantization.replacement import quantizable_layers
from stabilitylab.quantization.schemes import scheme_of
from tests.stabilitylab.quantization.folders import TEXT

WEIGHTS_ALONE = [
    "int8-row",
    "int4-row",
    "int4-g32",
    "int4-g32-asym",
    "int8-row-asym",
    "fp8-e4m3-tensor",
    "fp8-e4m3-row",
    "fp8-e4m3-block128",
    "mxfp4",
    "nvfp4",
]
ROUNDED = [
    "int8-row-gptq",
    "int4-g32-gptq",
    "int4-g32-asym-gptqo",
    "w8a8-token-gptq",
    "fp8-e4m3-row-gptq",
    "mxfp4-mse-gptq",
    "nvfp4-mse-gptqo",
]
WITH_ACTIVATIONS = ["w8a8-token", "fp8-e4m3-row/fp8-e4m3-row", "w8a8-tensor", "mxfp8-e4m3/mxfp8-e4m3"]


def plan_of(model, tmp_path, schemes, *, embeddings=False):
    """A plan whose layers have the schemes in turn."""
    text = tmp_path / "text"
    text.write_text(TEXT)
    made = make_plan(
        model,
        text,
        Budget(kind="memory", value=0.9),
        [scheme_of("int8-row")],
        tokens=32,
        verify_tokens=32,
        length=32,
        embeddings=embeddings,
    )
    layers = {
        path: PlannedLayer(scheme=schemes[i % len(schemes)], reason="in turn")
        for i, path in enumerate(made.layers)
    }
    return dataclasses.replace(made, layers=layers)


def plan_for(model, tmp_path, name):
    """A plan of one scheme, which may round for the text's inputs."""
    if name not in ROUNDED:
        return plan_of(model, tmp_path, [name])
    text, file = tmp_path / "text", tmp_path / "plan.json"
    text.write_text(TEXT)
    budget = Budget(kind="memory", value=0.6)
    made = make_plan(
        model,
        text,
        budget,
        [scheme_of(name)],
        tokens=32,
        verify_tokens=32,
        length=32,
        work=file,
        embeddings=False,
    )
    made.write(file)
    return load_plan(file)


def test_words_are_packed_low_first():
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 15, 9]])
    assert _packed(codes, 4).tolist() == [[0xF7654321 - (1 << 32), 9]]


def test_a_mixed_plan_keeps_its_numbers(llama_folder, tmp_path):
    """Our own reader of stored formats reads them back, where it knows the format."""
    model = open_text_model(llama_folder)
    schemes = ["fp8-e4m3-row", "mxfp4", "nvfp4", "w8a8-token", "fp8-e4m3-tensor"]
    plan = plan_of(model, tmp_path, schemes)
    save_compressed_tensors(model, plan, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert {t for group in config["config_groups"].values() for t in group["targets"]} == set(plan.layers)
    read = open_text_model(tmp_path / "out")
    expected = {
        path: scheme_of(layer.scheme).layer(quantizable_layers(model.module)[path].weight)
        for path, layer in plan.layers.items()
    }
    for path, layer in expected.items():
        eye = torch.eye(layer.in_features)
        scheme = plan.layers[path].scheme
        wanted = layer.stored.dequantize() if scheme == "w8a8-token" else layer(eye).T
        # A scale's inverse, stored in fp32, is off by its rounding.
        torch.testing.assert_close(
            read.module.get_submodule(path).weight, wanted, rtol=2e-7 if scheme == "nvfp4" else 0, atol=0
        )
    assert "| in turn |" in (tmp_path / "out" / "QUANTIZATION.md").read_text()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*WEIGHTS_ALONE, *WITH_ACTIVATIONS, *ROUNDED])
def test_the_real_library_opens_it(llama_folder, tmp_path, name):
    """One scheme at a time: transformers 5.23 decompresses all dense layers by that of the first group."""
    pytest.importorskip("compressed_tensors")
    import transformers

    model = open_text_model(llama_folder)
    plan = plan_for(model, tmp_path, name)
    assert name not in ROUNDED or name in plan.planned.schemes
    save_compressed_tensors(model, plan, tmp_path / "out")
    opened = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out",
        dtype=torch.float32,
        quantization_config=transformers.CompressedTensorsConfig(run_compressed=False),
    )
    with torch.no_grad():
        for path in plan.schemes:
            layer = quantizable_layers(model.module)[path]
            twin = plan.schemes[path].layer(layer.weight)
            stored = twin.stored
            own = dequantize(stored) if isinstance(stored, Quantized) else stored.dequantize()
            read = opened.get_submodule(path).weight.float()
            # A product that the library rounds to bf16, where its scales lie in it.
            torch.testing.assert_close(read, own, rtol=2**-8, atol=0)
            layer.weight.data = read
        # Without its kernels the library leaves activations as they are.
        window = next(model.windows([TEXT], 32, 32))
        torch.testing.assert_close(opened(**window.inputs).logits, model.run(window))


@pytest.mark.parametrize("name", ["w8a8-token-had", "mixed", "mxfp6-e2m3", "nvfp4/nvfp4"])
def test_what_has_no_form_is_refused(llama_folder, tmp_path, name):
    model = open_text_model(llama_folder)
    plan = plan_of(model, tmp_path, [name])
    with pytest.raises(InputError, match="has no exact form in compressed-tensors"):
        save_compressed_tensors(model, plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["compressed-tensors", "torchao"])
def test_a_quantized_embedding_is_refused(llama_folder, tmp_path, format):
    pytest.importorskip("torchao" if format == "torchao" else "safetensors")
    model = open_text_model(llama_folder)
    plan = plan_of(model, tmp_path, ["int8-row"], embeddings=True)
    with pytest.raises(InputError, match=r"model.embed_tokens is an embedding in int8-row.*--no-embeddings"):
        save_as(format, model, plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()
