"""Models opened from folders: what they are, what they compute, and which ones are refused."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from stabilitylab.errors import InputError
from stabilitylab.models import linear_layers, linear_weight, loading, open_text_model
from tests.stabilitylab.models import tiny

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def edited(folder: Path, out: Path, **tensors: torch.Tensor | None) -> Path:
    """A copy with tensors replaced, or left out where None."""
    shutil.copytree(folder, out)
    file = out / "model.safetensors"
    held = load_file(file)
    for name, tensor in tensors.items():
        name = name.replace("__", ".")
        if tensor is None:
            del held[name]
        else:
            held[name] = tensor
    save_file(held, file, metadata={"format": "pt"})
    return out


def test_a_decoder_has_logits_and_the_loss_of_a_float64_softmax(saved, text):
    model = open_text_model(saved["llama"])
    assert model.predicts
    assert model.longest == 64
    assert model.shared == (("model.embed_tokens.weight", "lm_head.weight"),)
    window = next(model.windows(text, 20))
    logits_BTV = model.run(window)
    assert logits_BTV.shape == (1, 20, 32)
    log_TV = logits_BTV[0].double().log_softmax(-1)
    tokens_T = window.inputs["input_ids"][0]
    expected = -sum(float(log_TV[t, tokens_T[t + 1]]) for t in range(19))
    total, count = model.loss(window)
    assert count == 19
    # 19 float32 log-softmaxes, each to a few units in the last place of a number near 3.
    assert total == pytest.approx(expected, abs=19 * 3 * 1e-6)


def test_it_computes_what_the_saved_model_computes(saved, text):
    model = open_text_model(saved["llama"])
    window = next(model.windows(text, 20))
    with torch.no_grad():
        expected = tiny.llama()(**window.inputs).logits
    torch.testing.assert_close(model.run(window), expected)
    assert not any(parameter.requires_grad for parameter in model.module.parameters())
    assert not model.module.training


def test_an_encoder_has_hidden_states_and_no_loss(saved, text):
    model = open_text_model(saved["bert"])
    assert not model.predicts
    assert model.longest == 48
    window = next(model.windows(text, 20))
    assert window.inputs["input_ids"][0, [0, -1]].tolist() == [1, 2]  # [CLS] ... [SEP] around every window
    assert model.run(window).shape == (1, 20, 32)
    with pytest.raises(InputError, match="error of its output"):
        model.loss(window)


def test_conv1d_is_a_linear_layer(saved):
    layers = linear_layers(open_text_model(saved["gpt2"]).module)
    assert list(layers)[:4] == [
        f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    layer = layers["transformer.h.0.attn.c_attn"]
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(layer(x), F.linear(x, linear_weight(layer), layer.bias))


def test_an_attention_projection_that_torch_never_calls_is_left_out():
    assert list(linear_layers(torch.nn.MultiheadAttention(8, 2))) == []


def test_the_fingerprint_is_the_models_own(saved, tmp_path):
    model = open_text_model(saved["llama"])
    assert open_text_model(saved["llama"], dtype=torch.bfloat16).fingerprint == model.fingerprint
    name = "model.layers.1.mlp.down_proj.weight"
    changed = edited(
        saved["llama"],
        tmp_path / "changed",
        **{name: 2 * load_file(saved["llama"] / "model.safetensors")[name]},
    )
    assert open_text_model(changed).fingerprint != model.fingerprint


def test_a_missing_pooler_is_taken_off_and_no_random_weights_stay(saved, tmp_path):
    path = edited(saved["bert"], tmp_path / "b", **{"pooler.dense.weight": None, "pooler.dense.bias": None})
    assert "pooler.dense" in linear_layers(open_text_model(saved["bert"]).module)
    assert "pooler.dense" not in linear_layers(open_text_model(path).module)


def test_plain_pickled_weights_are_read_and_others_never_run(saved, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(saved["llama"], plain)
    torch.save(load_file(plain / "model.safetensors"), plain / "pytorch_model.bin")
    (plain / "model.safetensors").unlink()
    assert open_text_model(plain).fingerprint == open_text_model(saved["llama"]).fingerprint

    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "it ran",))

    with (plain / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"weight": Trap()}, file)
    with pytest.raises(InputError, match="weights"):
        open_text_model(plain)
    assert not (tmp_path / "it ran").exists()


def test_code_beside_the_weights_is_not_run(saved, tmp_path):
    path = tmp_path / "remote"
    shutil.copytree(saved["llama"], path)
    config = json.loads((path / "config.json").read_text())
    config["model_type"] = "of-its-own"
    config["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (path / "config.json").write_text(json.dumps(config))
    (path / "own.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'it ran')!r}).touch()\n")
    with pytest.raises(InputError, match="config"):
        open_text_model(path)
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (
            {"model.layers.0.mlp.up_proj.weight": None},
            "lacks 1 weights, among them model.layers.0.mlp.up_proj",
        ),
        ({"model.layers.0.mlp.up_proj.weight": torch.full((48, 32), torch.nan)}, "up_proj.weight holds NaN"),
        (
            {"model.layers.0.mlp.up_proj.weight": torch.zeros(3, 3)},
            r"up_proj.weight is \(3, 3\) in the files and \(48, 32\) by its config: .* give the whole",
        ),
    ],
    ids=["missing", "NaN", "shape"],
)
def test_weights_that_do_not_fit_are_refused(saved, tmp_path, tensors, said):
    with pytest.raises(InputError, match=said) as caught:
        open_text_model(edited(saved["llama"], tmp_path / "m", **tensors))
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_refused(saved, tmp_path, monkeypatch):
    cut = tmp_path / "cut"
    shutil.copytree(saved["llama"], cut)
    whole = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cut off: 65,988 bytes of 131,976"):
        open_text_model(cut)

    wordless = tmp_path / "wordless"
    shutil.copytree(saved["llama"], wordless)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (wordless / name).unlink()
    # transformers 5.0 makes one out of nothing, later ones raise.
    with pytest.raises(InputError, match="cannot read its tokenizer"):
        open_text_model(wordless)

    with pytest.raises(InputError, match="does not exist"):
        open_text_model(tmp_path / "nowhere")
    with pytest.raises(InputError, match="neither a HuggingFace folder"):
        open_text_model(tmp_path)
    entry = EntryPoint("own", "of_a_package_that_is_not_here:open", "stabilitylab.models")
    monkeypatch.setattr(loading, "entry_points", lambda group: [entry])
    with pytest.raises(
        InputError, match="models of own cannot be opened here: No module named 'of_a_package"
    ):
        open_text_model(tmp_path)
    monkeypatch.setattr(loading, "entry_points", lambda group: [])
    with pytest.raises(
        InputError, match=r"no package is installed that opens others \(in a clone: pip install \.\)"
    ):
        open_text_model(tmp_path)


def test_an_old_transformers_is_refused(saved, monkeypatch):
    import transformers

    monkeypatch.setattr(transformers, "__version__", "4.57.1")
    with pytest.raises(
        InputError, match=r"needs transformers 5 to be read, and 4\.57\.1 is here: pip install"
    ):
        open_text_model(saved["llama"])


def test_encoder_decoders_are_refused(tmp_path):
    from transformers import T5Config

    T5Config().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="encoder-decoder"):
        open_text_model(tmp_path)


@pytest.mark.parametrize("told", [False, True])
def test_the_encoder_of_one_alone_is_opened(tmp_path, told):
    """Its config may still call it an encoder-decoder model, as those of text-to-image models do."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    config = T5Config(vocab_size=32, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8)
    own = T5EncoderModel(config).eval()
    folder = tiny.save(own, tmp_path / "t5", framed=True)
    held = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**held, "is_encoder_decoder": told}))
    model = open_text_model(folder)
    window = next(model.windows([tiny.TEXT], 16, 16))
    with torch.no_grad():
        assert torch.equal(model.run(window), own(**window.inputs).last_hidden_state)


def test_gguf_files_that_cannot_be_read_are_refused(tmp_path):
    gguf = pytest.importorskip("gguf")
    for name in ("one", "two"):
        writer = gguf.GGUFWriter(str(tmp_path / f"{name}.gguf"), "of-its-own")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    with pytest.raises(InputError, match="holds 2 GGUF files"):
        open_text_model(tmp_path)
    with pytest.raises(InputError, match="of-its-own is not supported"):
        open_text_model(tmp_path / "one.gguf")
    (tmp_path / "noise.gguf").write_bytes(b"noise" * 100)
    with pytest.raises(InputError, match="cannot read"):
        open_text_model(tmp_path / "noise.gguf")
    whole = (tmp_path / "one.gguf").read_bytes()
    for end in range(0, len(whole), 3):  # a download that broke off, at any byte
        (tmp_path / "cut.gguf").write_bytes(whole[:end])
        with pytest.raises(InputError, match="cannot read"):
            open_text_model(tmp_path / "cut.gguf")


def test_a_module_without_linear_layers_is_refused(tmp_path):
    from stabilitylab.models import TextModel

    with pytest.raises(InputError, match="no linear layers"):
        TextModel.of(
            torch.nn.Embedding(3, 3), path=tmp_path, predicts=False, longest=None, cut=lambda *_: iter(())
        )


def test_installed_packages_open_their_own(tmp_path, monkeypatch):
    """A real distribution on the path, as pip would leave it."""
    package = tmp_path / "packages"
    info = package / "mine-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[stabilitylab.models]\nmine = mine_opening:open_mine\n")
    (package / "mine_opening.py").write_text(
        "import torch\nfrom stabilitylab.models import TextModel\n"
        "def open_mine(path, dtype):\n"
        "    if path.suffix != '.mine':\n        return None\n"
        "    return TextModel.of(torch.nn.Linear(2, 2).to(dtype), path=path, predicts=False, longest=4, cut=lambda *_: iter(()))\n"
    )
    monkeypatch.syspath_prepend(str(package))
    file = tmp_path / "a.mine"
    file.touch()
    model = open_text_model(file, dtype=torch.float64)
    assert model.name == "a.mine"
    assert isinstance(sys.modules["mine_opening"], ModuleType)
    assert model.module.weight.dtype == torch.float64
    with pytest.raises(InputError, match=r"nor anything that .*mine.* opens"):
        open_text_model(tmp_path)


def test_a_part_of_a_split_gguf_is_refused(tmp_path):
    (tmp_path / "m-00001-of-00002.gguf").write_bytes(b"GGUF")
    for path in (tmp_path, tmp_path / "m-00001-of-00002.gguf"):
        with pytest.raises(InputError, match="part 1 of 2"):
            open_text_model(path)


def test_gguf_is_read_once_and_left_as_it_was(tmp_path):
    """Readers and tables are shared while a file is open, and gone afterwards."""
    gguf = pytest.importorskip("gguf")
    from stabilitylab.models.gguf_file import opened_once

    writer = gguf.GGUFWriter(str(tmp_path / "a.gguf"), "llama")
    writer.add_token_list(["a", "bc", "ü"])
    values = np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 32)
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("t.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    plain = gguf.GGUFReader(tmp_path / "a.gguf")
    before = gguf.GGUFReader
    with opened_once():
        one, again = gguf.GGUFReader(tmp_path / "a.gguf"), gguf.GGUFReader(tmp_path / "a.gguf")
        assert one is again
        for mine, theirs in zip(one.tensors, plain.tensors, strict=True):
            assert mine.name == theirs.name
            assert np.array_equal(mine.data, theirs.data)
        assert {k: v.contents() for k, v in one.fields.items()} == {
            k: v.contents() for k, v in plain.fields.items()
        }
    assert gguf.GGUFReader is before
