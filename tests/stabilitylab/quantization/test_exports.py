"""A plan written as GGUF and as torchao's tensors: the real libraries open it, and its numbers and logits are the plan's."""

import dataclasses
import json

import pytest
import torch

from stabilitylab.cli import main
from stabilitylab.errors import InputError
from stabilitylab.formats import Quantized, dequantize
from stabilitylab.models import open_text_model
from stabilitylab.quantization.export_forms import held_schemes
from stabilitylab.quantization.exports import save_as
from stabilitylab.quantization.gguf_export import save_gguf
from stabilitylab.quantization.plan import PlannedLayer
from stabilitylab.quantization.replacement import quantizable_layers
from stabilitylab.quantization.schemes import scheme_of
from stabilitylab.quantization.torchao_export import save_torchao
from tests.stabilitylab.quantization.folders import TEXT, write_tokenizer
from tests.stabilitylab.quantization.test_compressed_tensors import plan_for, plan_of


def write(folder, kind):
    """A small model of that type, tied where its kind usually is, biases and norms not as they begin."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(
        kind,
        vocab_size=write_tokenizer(folder),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        # transformers 5.23 reads no width of a head from a qwen3 file, and takes 128.
        head_dim=128 if kind == "qwen3" else 16,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=kind != "llama",
        sliding_window=None,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p) * 0.1)
            else:
                p.copy_(p.half().float() if "down" in name else p.bfloat16().float())
    model.save_pretrained(folder)
    return folder


def with_plans_weights(model, plan):
    """The model with every planned layer's weight as the plan stores it."""
    for path, layer in plan.layers.items():
        if layer.scheme is None:
            continue
        own = model.module.get_submodule(path)
        stored = plan.schemes[path].layer(own.weight).stored
        own.weight.data = dequantize(stored) if isinstance(stored, Quantized) else stored.dequantize()
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_gguf_is_opened_by_transformers(tmp_path, kind):
    pytest.importorskip("gguf")
    import transformers

    model = open_text_model(write(tmp_path / "model", kind))
    schemes = ["int8-g32", "int4-g32", "mxfp4", "int8-row", "int4-g64-mse", "int4-row"]
    plan = plan_of(model, tmp_path, schemes, embeddings=True)
    assert plan.layers["model.embed_tokens"].scheme == "int8-g32"
    first = next(path for path in plan.layers if path != "model.embed_tokens")
    plan = dataclasses.replace(plan, layers={**plan.layers, first: PlannedLayer(scheme=None, reason="kept")})
    size = save_gguf(model, plan, tmp_path / "out")
    assert size == (tmp_path / "out" / "model.gguf").stat().st_size
    opened = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32
    )
    window = next(model.windows([TEXT], 32, 32))
    with_plans_weights(model, plan)
    for name, weight in model.module.state_dict().items():
        assert torch.equal(opened.state_dict()[name], weight), name
    with torch.no_grad():
        torch.testing.assert_close(opened(**window.inputs).logits, model.run(window))
    card = (tmp_path / "out" / "QUANTIZATION.md").read_text()
    assert "tensors Q8_0" in card
    assert "Cost: " in card


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["int8-row-gptq", "int4-g32-gptq", "mxfp4-mse-gptq"])
def test_gguf_holds_weights_that_were_rounded_for_their_inputs(llama_folder, tmp_path, name):
    pytest.importorskip("gguf")
    import transformers

    model = open_text_model(llama_folder)
    plan = plan_for(model, tmp_path, name)
    assert name in plan.planned.schemes
    save_gguf(model, plan, tmp_path / "out")
    opened = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32
    )
    window = next(model.windows([TEXT], 32, 32))
    with_plans_weights(model, plan)
    for path in plan.layers:
        assert torch.equal(opened.get_submodule(path).weight, quantizable_layers(model.module)[path].weight)
    with torch.no_grad():
        torch.testing.assert_close(opened(**window.inputs).logits, model.run(window))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "nvfp4",
            "nvfp4 has no exact form in gguf: --format compressed-tensors or torchao or stabilitylab holds it",
        ),
        ("int4-g32-asym", "no exact form in gguf: --format compressed-tensors or torchao"),
        (
            "w8a8-token-had",
            "no exact form in gguf: --format stabilitylab holds it; .*int8-g32, int4-g32, mxfp4",
        ),
    ],
)
def test_what_gguf_cannot_hold_is_refused(llama_folder, tmp_path, name, message):
    pytest.importorskip("gguf")
    model = open_text_model(llama_folder)
    plan = plan_of(model, tmp_path, ["int8-g32", name])
    with pytest.raises(InputError, match=f"(?s)model.layers.0.self_attn.k_proj: .*{message}"):
        save_as("gguf", model, plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_scales_that_fp16_does_not_hold_and_odd_shapes_are_refused(tmp_path, llama_folder):
    pytest.importorskip("gguf")
    model = open_text_model(llama_folder)
    plan = plan_of(model, tmp_path, ["int8-row"])
    layer = quantizable_layers(model.module)[next(iter(plan.layers))]
    layer.weight.data *= 1e-9
    plan = dataclasses.replace(plan, fingerprint=model.fingerprint)
    with pytest.raises(InputError, match="does not fit its fp16"):
        save_gguf(model, plan, tmp_path / "out")


def test_other_models_are_refused(bert_folder, tmp_path):
    pytest.importorskip("gguf")
    model = open_text_model(bert_folder)
    plan = plan_of(model, tmp_path, ["int8-row"])
    with pytest.raises(InputError, match="is a bert: GGUF is written for llama, mistral, qwen2, qwen3"):
        save_gguf(model, plan, tmp_path / "out")


def test_a_byte_tokenizer_goes_along(llama_folder, tmp_path):
    pytest.importorskip("gguf")
    import shutil

    import tokenizers
    import transformers

    folder = tmp_path / "model"
    shutil.copytree(llama_folder, folder)
    inner = tokenizers.ByteLevelBPETokenizer()
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    inner.train_from_iterator([TEXT], vocab_size=256 + size)
    wanted = inner.encode("the lazy dog").ids
    config = json.loads((folder / "config.json").read_text())
    plain = open_text_model(llama_folder).module
    config["vocab_size"] = 256 + size
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner._tokenizer).save_pretrained(folder)
    plain.resize_token_embeddings(256 + size)
    plain.save_pretrained(folder)
    model = open_text_model(folder)
    save_gguf(model, plan_of(model, tmp_path, ["int8-g32"]), tmp_path / "out")
    read = open_text_model(tmp_path / "out" / "model.gguf")
    window = next(read.windows(["the lazy dog runs away from it and over the fox"], 8, 8))
    assert window.inputs["input_ids"][0, : len(wanted)].tolist() == wanted
    torch.testing.assert_close(
        read.run(window), with_plans_weights(model, plan_of(model, tmp_path, ["int8-g32"])).run(window)
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    ["int8-row", "int4-g32", "int4-g32-asym-mse", "fp8-e4m3-row", "fp8-e4m3-tensor", "nvfp4", "w8a8-token"],
)
def test_torchao_is_opened_by_torchao(llama_folder, tmp_path, name):
    support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    import transformers
    from safetensors import safe_open

    model = open_text_model(llama_folder)
    plan = plan_of(model, tmp_path, [name])
    save_torchao(model, plan, tmp_path / "out")
    file = safe_open(tmp_path / "out" / "model.safetensors", "pt")
    flat = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    state, left = support.unflatten_tensor_state_dict(flat, file.metadata())
    assert not left
    opened = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(tmp_path / "out")
    ).eval()
    opened.load_state_dict(state, strict=False, assign=True)
    opened.tie_weights()
    with_plans_weights(model, plan)
    own = dict(model.module.named_parameters())
    for path in plan.layers:
        weight = opened.get_submodule(path).weight
        assert type(weight).__module__.startswith("torchao")
        torch.testing.assert_close(weight.dequantize().float(), own[f"{path}.weight"], rtol=1e-6, atol=0)
    window = next(model.windows([TEXT], 32, 32))
    with torch.no_grad():
        got = opened(**window.inputs).logits.float()
    # Activations in int8 are off by half a step of 1 / 127 of a token's largest, here and there, through seven layers in a row.
    bound = {"w8a8-token": 0.15}.get(name, 1e-4)
    assert float((got - model.run(window)).norm() / got.norm()) < bound


@pytest.mark.parametrize("name", ["mxfp4", "mixed", "fp8-e4m3-block128"])
def test_what_torchao_cannot_hold_is_refused(llama_folder, tmp_path, name):
    pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    model = open_text_model(llama_folder)
    plan = plan_of(model, tmp_path, [name])
    with pytest.raises(InputError, match="no exact form in torchao"):
        save_torchao(model, plan, tmp_path / "out")


def test_a_refusal_calls_the_scheme_what_the_plan_calls_it(llama_folder, tmp_path):
    pytest.importorskip("gguf")
    model = open_text_model(llama_folder)
    plan = plan_for(model, tmp_path, "int4-g32-asym-gptqo")
    with pytest.raises(InputError, match=r"int4-g32-asym-gptqo has no exact form in gguf"):
        save_gguf(model, plan, tmp_path / "out")


@pytest.mark.parametrize("format", ["gguf", "compressed-tensors", "torchao"])
def test_what_a_format_cannot_hold_is_told_before_anything_is_measured(
    llama_folder, bert_folder, tmp_path, capsys, monkeypatch, format
):
    def measured(*_arguments, **_named):
        raise AssertionError("measured first")

    monkeypatch.setattr("stabilitylab.quantization.commands.make_plan", measured)
    text = tmp_path / "text"
    text.write_text(TEXT)
    command = ["quantize", "--text", str(text), "--plan", str(tmp_path / "plan.json"), "--format", format]
    command += ["--apply", str(tmp_path / "out")]
    assert main([*command, str(llama_folder), "--schemes", "int8-row", "mixed", "int4-row-awq"]) == 2
    assert "no exact form for mixed, int4-row-awq: leave them out" in capsys.readouterr().err
    if format == "gguf":
        assert main([*command, str(bert_folder), "--schemes", "int8-row"]) == 2
        assert "is a bert: GGUF is written for" in capsys.readouterr().err


@pytest.mark.parametrize("format", ["compressed-tensors", "torchao"])
def test_layers_whose_weights_lie_the_other_way_are_refused(tmp_path, format, capsys, monkeypatch):
    """GPT-2's Conv1D: the libraries' readers know nn.Linear alone, and would find a weight of another shape."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torchao" if format == "torchao" else "safetensors")
    monkeypatch.setattr("stabilitylab.quantization.commands.make_plan", None)
    folder, text = tmp_path / "gpt2", tmp_path / "text"
    words = write_tokenizer(folder)
    config = transformers.GPT2Config(
        vocab_size=words, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=0
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    text.write_text(TEXT)
    command = ["quantize", str(folder), "--text", str(text), "--plan", str(tmp_path / "plan.json")]
    command += ["--format", format, "--apply", str(tmp_path / "out"), "--schemes", "int8-row"]
    capsys.readouterr()  # the progress of saving
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "transformer.h.0.attn.c_attn, 8 in all), which" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_schemes_that_are_held_are_those_that_are_written():
    names = [
        "int8-row",
        "int4-g64-asym-mse-gptqo",
        "mixed",
        "smoothquant",
        "w8a8-token",
        "nvfp4",
        "mxfp4-had",
    ]
    schemes = [scheme_of(name) for name in names]
    assert [scheme.name for scheme in held_schemes("gguf", schemes)[0]] == ["int8-row"]
    assert [scheme.name for scheme in held_schemes("torchao", schemes)[0]] == [*names[:2], *names[4:6]]
    assert held_schemes("stabilitylab", schemes) == (schemes, [])
