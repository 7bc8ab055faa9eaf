"""Folders that are not as they should be: refused in one line that names the thing, or read rightly; nothing wrongly in silence."""

import json
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


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: sharded(f, lost=True), "lacks model-00002-of-00002.safetensors, which its index names"),
        (lambda f: sharded(f, promised=["nowhere.weight"]), r"lacks nowhere.weight, which its index promises"),
        (lambda f: sharded(f, twice=True), "both hold lm_head.weight, and which is meant is not said"),
        (lambda f: sharded(f, whole=True), "holds model.safetensors and an index of other files"),
        (lambda f: cast(f, "mlp", lambda t: t > 0), "as BOOL, which is no number format of weights"),
        (lambda f: cast(f, "norm", lambda t: t.to(torch.int8)), "as I8, which is no number format of weights"),
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
    assert "7 weights of the files (30.7% of their numbers)" in open_text_model(folder).notes[0]
