"""Faulty folders: the reader refuses them in one line that names the fault, or reads them rightly; never wrongly in silence."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from stabilitylab.errors import InputError
from stabilitylab.models import open_text_model
from tests.stabilitylab.quantization.folders import TEXT, write_llama

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("sound"))


def tensors(folder):
    return load_file(folder / WHOLE)


def write(folder, held, name=WHOLE):
    save_file({n: t.contiguous() for n, t in held.items()}, folder / name, metadata={"format": "pt"})


def set_config(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def cast(folder, part, to):
    write(folder, {n: to(t) if part in n else t for n, t in tensors(folder).items()})


def sharded(folder, *, lost=False, promised=(), twice=False, whole=False):
    held = tensors(folder)
    names = sorted(held)
    halves = names[:9], names[9:]
    if not whole:
        (folder / WHOLE).unlink()
    weight_map = {}
    for number, half in enumerate(halves):
        file = f"model-0000{number + 1}-of-00002.safetensors"
        part = {name: held[name] for name in half}
        if twice and number:
            part[names[0]] = 3 * held[names[0]]
        if not (lost and number):
            write(folder, part, file)
        weight_map |= dict.fromkeys(half, file)
    weight_map |= dict.fromkeys(promised, "model-00001-of-00002.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def adapted(folder):
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"})
    )


def fused(folder):
    held = tensors(folder)
    for layer in range(3):
        parts = [held.pop(f"model.layers.{layer}.self_attn.{p}_proj.weight") for p in "qkv"]
        held[f"model.layers.{layer}.self_attn.qkv_proj.weight"] = torch.cat(parts)
    write(folder, held)


def scaled(folder, value, name="weight_scale"):
    held = tensors(folder)
    for weight in [n for n in held if "mlp" in n]:
        held[weight] = (held[weight] * 100).to(torch.float8_e4m3fn)
        held[weight.replace("weight", name)] = torch.tensor(value)
    write(folder, held)


def packed(folder, method):
    held = tensors(folder)
    for name in [n for n in held if "proj" in n]:
        rows, columns = held.pop(name).shape
        base = name.removesuffix("weight")
        held[f"{base}qweight"] = torch.ones(columns // 8, rows, dtype=torch.int32)
        held[f"{base}qzeros"] = torch.zeros(1, rows // 8, dtype=torch.int32)
        held[f"{base}scales"] = torch.ones(1, rows).half()
    write(folder, held)
    set_config(folder, quantization_config={"quant_method": method, "bits": 4, "group_size": 32})


def cut(file, count=100):
    file.write_bytes(file.read_bytes()[:-count])


def only_pickled(folder, part="", to=lambda t: t, **more):
    held = tensors(folder)
    (folder / WHOLE).unlink()
    held = {n: to(t) if part and part in n else t for n, t in held.items()}
    torch.save({**held, **more}, folder / "pytorch_model.bin")


def with_more(folder, **more):
    write(folder, {**tensors(folder), **{name.replace("__", "."): tensor for name, tensor in more.items()}})


def bare_adapter(folder):
    adapted(folder)
    (folder / "config.json").unlink()
    (folder / WHOLE).rename(folder / "adapter_model.safetensors")


def told(folder, **config):
    """E4M3 codes with a scale each, and what a config says beside them."""
    scaled(folder, 0.01)
    set_config(folder, quantization_config={"quant_method": "compressed-tensors", **config})


def rotation(location):
    return {
        "config_groups": {"R4": {"type": "hadamard", "apply": [{"targets": ["x"], "location": location}]}}
    }


def unindexed(folder, *, index=False):
    sharded(folder)
    write(
        folder, {"model.layers.9.mlp.up_proj.weight": torch.ones(64, 32)}, "model-00003-of-00003.safetensors"
    )
    if not index:
        (folder / INDEX).unlink()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: cut(f / WHOLE), "model.safetensors is cut off: 123,108 bytes of 123,208; give the whole"),
        (lambda f: (sharded(f), cut(f / "model-00002-of-00002.safetensors")), "00002.safetensors is cut off"),
        (lambda f: (f / WHOLE).write_bytes((f / WHOLE).read_bytes() + b"abc"), "has 3 bytes too many"),
        (unindexed, "model-00001-of-00002.safetensors and 2 more, and no model.safetensors or .*index.json"),
        (lambda f: (f / WHOLE).rename(f / "consolidated.safetensors"), "a whole file is called model.safetensors"),
        (bare_adapter, "holds an adapter alone .* merge it into its base first"),
        (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json is no JSON object"),
        (lambda f: only_pickled(f, "mlp", lambda t: (100 * t).to(torch.int8)), "as int8, which is not a number format"),
        (lambda f: only_pickled(f, "mlp", lambda t: t.to(torch.float8_e4m3fn)), "as float8_e4m3fn, which is no"),
        (lambda f: only_pickled(f, "mlp", lambda t: t > 0), "as BOOL, which is not a number format"),
        (lambda f: with_more(f, lm_head__bias=torch.ones(34)), "among them lm_head.bias: .* do not belong together"),
        (lambda f: with_more(f, model__norm__bias=torch.ones(32)), "among them model.norm.bias"),
        (lambda f: told(f, transform_config=rotation("input")), "inputs of its layers are transformed .*R4"),
        (lambda f: told(f, sparsity_config={"format": "sparse-24-bitmask"}), "stored sparse"),
        *(
            (lambda f, m=m: set_config(f, quantization_config={"quant_method": m, "bits": 4}), f"by '{m}', and .* plain")
            for m in ("gptq", "awq", "bitsandbytes", "hqq", "aqlm", "quanto", "torchao", "bitnet", "fp_quant")
        ),
        (lambda f: set_config(f, quantization_config={"load_in_8bit": True}), "and not by what"),
        (lambda f: set_config(f, quantization_config=[4]), r"no object \(\[4\]\)"),
        (lambda f: set_config(f, hidden_act="magic"), "'magic' is missing or unknown: fix the config"),
        (lambda f: sharded(f, lost=True), "lacks model-00002-of-00002.safetensors, which its index names"),
        (lambda f: sharded(f, promised=["nowhere.weight"]), r"lacks nowhere.weight, which its index promises"),
        (lambda f: sharded(f, twice=True), "both hold lm_head.weight, and which is meant is not said"),
        (lambda f: sharded(f, whole=True), "holds model.safetensors and an index of other files"),
        (lambda f: cast(f, "mlp", lambda t: t > 0), "as BOOL, which is not a number format of weights"),
        (lambda f: cast(f, "norm", lambda t: t.to(torch.int8)), "as I8, which is not a number format of weights"),
        (lambda f: cast(f, "mlp", lambda t: (100 * t).to(torch.int8)), "codes without scales beside it"),
        (lambda f: cast(f, "mlp", lambda t: t.to(torch.float8_e4m3fn)), "codes without scales beside it"),
        (lambda f: scaled(f, 0.0), "has scales of zero or less"),
        (lambda f: scaled(f, 1.0, name="weight_amax"), "codes without scales beside it"),
        (lambda f: packed(f, "gptq"), "is not understood here"),
        (lambda f: packed(f, "awq"), "is not understood here"),
        (lambda f: set_config(f, quantization_config={"quant_method": "squeezellm"}), "quantized by 'squeezellm'"),
        (adapted, "holds an adapter"),
        (fused, "lacks 9 weights, among them model.layers.0.self_attn.k_proj.weight"),
        (lambda f: write(f, {f"module.{n}": t for n, t in tensors(f).items()}), "lacks 30 weights"),
        (lambda f: write(f, {n: t for n, t in tensors(f).items() if n != "lm_head.weight"}), "lacks 1 weights"),
        (lambda f: set_config(f, num_hidden_layers=4), "lacks 9 weights"),
    ],
)  # fmt: skip
def test_it_is_refused_in_one_line(sound, tmp_path, spoil, said):
    folder = tmp_path / "odd"
    shutil.copytree(sound, folder)
    spoil(folder)
    with pytest.raises(InputError, match=said) as refusal:
        open_text_model(folder)
    assert str(folder) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "change",
    [
        sharded,
        lambda f: write(f, {n: t.double() for n, t in tensors(f).items()}),
        lambda f: set_config(f, tie_word_embeddings=True),  # and yet the files hold a head of their own
        lambda f: torch.save({n: 2 * t for n, t in tensors(f).items()}, f / "pytorch_model.bin"),
        lambda f: write(f, {**tensors(f), "tower.weight": torch.ones(9, 9)}),
        only_pickled,
        lambda f: set_config(f, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]}),
        lambda f: set_config(
            f, quantization_config={"quant_method": "compressed-tensors", "format": "dense"}
        ),
        lambda f: with_more(f, model__rotary_emb__inv_freq=1e4 ** -(torch.arange(0, 8, 2) / 8)),
    ],
)
def test_it_is_read_rightly(sound, tmp_path, change):
    folder = tmp_path / "odd"
    shutil.copytree(sound, folder)
    change(folder)
    model, own = open_text_model(folder), open_text_model(sound)
    window = next(own.windows([TEXT], 32, 32))
    torch.testing.assert_close(model.run(window), own.run(window), rtol=0, atol=0)
    assert len(model.notes) == ("tower.weight" in tensors(folder) if (folder / WHOLE).exists() else 0)


def test_layers_that_the_config_does_not_know_are_counted(sound, tmp_path):
    folder = tmp_path / "odd"
    shutil.copytree(sound, folder)
    set_config(folder, num_hidden_layers=2)
    assert "9 weights of the files (30.9% of their numbers)" in open_text_model(folder).notes[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: unindexed(f, index=True), "model-00003-of-00003.safetensors is a part .* that no index"),
        (lambda f: only_pickled(f, tower=torch.ones(9, 9)), "1 weights of the files .* among them tower"),
        (lambda f: with_more(f, model__embed_norm__weight=torch.ones(32)), "among them model.embed_norm.weight"),
        (lambda f: with_more(f, model__rotary_emb__inv_freq=torch.ones(4)), "other rotary frequencies"),
        (lambda f: set_config(f, auto_map={"AutoModelForCausalLM": "m.M"}), "auto_map .* is not run.*LlamaForC"),
        (lambda f: set_config(f, architectures=["MineForCausalLM"]), "calls it MineForCausalLM, which .* has not"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_said(sound, tmp_path, change, said):
    folder = tmp_path / "odd"
    shutil.copytree(sound, folder)
    change(folder)
    (note,) = open_text_model(folder).notes
    assert re.search(said, note), note


def test_a_rotation_that_is_in_the_weights_already_is_no_hindrance(sound, tmp_path):
    folder = tmp_path / "odd"
    shutil.copytree(sound, folder)
    told(folder, transform_config=rotation("weight_input"), sparsity_config={"format": "dense"})
    assert "stored in fp8" in open_text_model(folder).notes[0]


def test_another_models_tokenizer_is_told_of_where_a_text_uses_its_words(sound, tmp_path):
    folder = tmp_path / "odd"
    shutil.copytree(sound, folder)
    file = folder / "tokenizer.json"
    held = json.loads(file.read_text())
    held["model"]["vocab"]["q"] = 4000
    file.write_text(json.dumps(held))
    model = open_text_model(folder)
    assert len(list(model.windows(["the fox\n" * 20], 32, 32))) == 1
    with pytest.raises(InputError, match="gives token 4000, and the model has 34 words"):
        list(model.windows([TEXT], 32, 32))
