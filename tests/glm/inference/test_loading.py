"""Models come back from disk bit for bit; what is no model gives one clear line."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from glm.errors import InputError
from glm.inference.loading import open_model, trained_on
from glm.inference.model_export import export_model
from glm.model.transformer import Transformer
from glm.train import checkpoint as checkpoints
from glm.train.config import from_json


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the run, for the test to damage."""
    return shutil.copytree(run, tmp_path / "run")


@pytest.fixture
def exported(run, tmp_path):
    export_model(run, tmp_path / "export")
    return tmp_path / "export"


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_an_export_is_the_newest_checkpoint_bit_for_bit(run, exported):
    newest = checkpoints.load(run / "checkpoints" / "step-00000004")
    for path in (run, exported):
        model, tokenizer, config = open_model(path)
        assert equal(model.state_dict(), newest.model)
        assert not model.training
        assert tokenizer.fingerprint == open_model(run).tokenizer.fingerprint
        assert config.preset == "glm-tiny"
        assert trained_on(path) == newest.state["data"]
    export_model(exported, exported.with_name("again"))
    for file in exported.iterdir():
        assert file.read_bytes() == (exported.with_name("again") / file.name).read_bytes()


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_exports_are_the_weights_rounded_once(run, tmp_path, precision, dtype):
    export_model(run, tmp_path / "half", precision)
    expected = {name: tensor.to(dtype) for name, tensor in open_model(run).model.state_dict().items()}
    assert equal(open_model(tmp_path / "half").model.state_dict(), expected)
    assert equal(open_model(run, precision=precision).model.state_dict(), expected)
    wide = open_model(tmp_path / "half", precision="fp32").model.state_dict()
    assert equal(wide, {name: tensor.float() for name, tensor in expected.items()})


@pytest.mark.parametrize(
    "lever", [{"spectral": True}, {"feed_forward": {"experts": {"count": 4, "bias_rate": 1e-3}}}]
)
def test_what_a_model_remembers_beside_its_weights_is_not_rounded(exported, tmp_path, lever):
    config = json.loads((exported / "config.json").read_text())
    for name, value in lever.items():
        if isinstance(value, dict):
            config["model"][name]["experts"] |= value["experts"]
        else:
            config["model"][name] = value
    (exported / "config.json").write_text(json.dumps(config))
    model = Transformer(from_json(json.dumps(config), source=exported).model, seed=0)
    remembered = dict(model.named_buffers())
    for buffer in remembered.values():
        buffer.uniform_(0.5, 1.0)
    assert remembered
    save_file(model.state_dict(), exported / "model.safetensors")
    export_model(exported, tmp_path / "half", "bf16")
    for opened in (open_model(tmp_path / "half").model, open_model(exported, precision="bf16").model):
        assert opened.embedding.weight.dtype == torch.bfloat16
        assert equal(dict(opened.named_buffers()), remembered)


def test_a_run_is_used_without_its_data_and_from_a_checkpoint_in_it(copy, task_data, tmp_path):
    assert (copy / "tokenizer.model").read_bytes() == (task_data / "tokenizer.model").read_bytes()
    older = open_model(copy / "checkpoints" / "step-00000002").model.state_dict()
    assert not equal(older, open_model(copy).model.state_dict())
    # A run of before tokenizers were kept finds its own where the data lay.
    (copy / "tokenizer.model").unlink()
    assert equal(open_model(copy / "checkpoints" / "step-00000002").model.state_dict(), older)


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(copy, caplog):
    older = checkpoints.load(copy / "checkpoints" / "step-00000002").model
    with (copy / "checkpoints" / "step-00000004" / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with caplog.at_level(logging.WARNING):
        assert equal(open_model(copy).model.state_dict(), older)
    assert "an older one is used" in caplog.text


def damage_weights(change):
    def damage(folder):
        file = folder / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return damage


def spoil(tensors):
    tensors["layers.1.attention.output.weight"][3, 4] = float("nan")


def enlarge(tensors):
    tensors["layers.0.feed_forward.up.weight"] = torch.zeros(7, 32)


def add(tensors):
    tensors["layers.9.attention.output.weight"] = torch.zeros(2)


def smaller_vocabulary(folder):
    config = json.loads((folder / "config.json").read_text())
    config["model"]["vocabulary"] = 700
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (damage_weights(lambda t: t.pop("final_norm.weight")), "lacks 1 of .* tensors, final_norm.weight"),
        (damage_weights(spoil), "1 of 1,024 weights of layers.1.attention.output.weight are not finite"),
        (damage_weights(enlarge), r"layers.0.feed_forward.up.weight is \[7, 32\], but config.json makes it"),
        (damage_weights(add), "holds layers.9.attention.output.weight, which the model .* has not"),
        (lambda f: (f / "model.safetensors").write_bytes(b"nothing"), "cannot be read as safetensors"),
        (lambda f: torch.save({}, f / "model.safetensors"), "is a pickled file"),
        (lambda f: (f / "tokenizer.model").unlink(), "lacks tokenizer.model: export the model again"),
        (lambda f: (f / "tokenizer.model").write_bytes(b"x"), "not a SentencePiece model"),
        (lambda f: (f / "config.json").unlink(), "lacks config.json"),
        (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
        (lambda f: (f / "config.json").write_text('{"model_type": "gpt2"}'), "does not fit this version"),
        (smaller_vocabulary, "has 800 pieces but the model .* 700: it is not the tokenizer"),
    ],
)
def test_a_wrong_export_is_one_clear_line(exported, damage, says):
    damage(exported)
    with pytest.raises(InputError, match=says) as caught:
        open_model(exported)
    assert "\n" not in str(caught.value)


def pickled(folder):
    folder.mkdir()
    torch.save({"a": torch.zeros(1)}, folder / "pytorch_model.bin")
    return folder


def damaged_run(run):
    for file in run.glob("checkpoints/*/model.safetensors"):
        file.write_bytes(b"")
    return run


def without_tokenizer(run):
    (run / "tokenizer.model").unlink()
    (run / "events.jsonl").unlink()
    return run


def emptied(run):
    shutil.rmtree(run / "checkpoints")
    return run


def alone(run):
    return shutil.move(run / "checkpoints" / "step-00000002", run.parent / "step")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda run: run / "nowhere", "does not exist: give a run folder"),
        (lambda run: run / "config.json", "is a file: give a run folder"),
        (lambda run: run / "telemetry", "holds no model"),
        (emptied, "has no checkpoint yet"),
        (damaged_run, "has no undamaged checkpoint among its 2"),
        (without_tokenizer, "has no tokenizer.model"),
        (alone, "a checkpoint is opened where its run left it"),
        (lambda run: pickled(run / "hf"), "is a pickled file, and reading one can run"),
        (lambda run: pickled(run / "hf") / "pytorch_model.bin", "is a pickled file"),
    ],
)
def test_what_is_no_model_is_one_clear_line(copy, make, says):
    with pytest.raises(InputError, match=says):
        open_model(make(copy))


def test_an_export_overwrites_nothing_and_refuses_what_fp16_cannot_hold(copy, exported, tmp_path):
    before = {file.name: file.read_bytes() for file in exported.iterdir()}
    with pytest.raises(InputError, match="exists already"):
        export_model(copy, exported)
    assert before == {file.name: file.read_bytes() for file in exported.iterdir()}
    tensors = load_file(exported / "model.safetensors")
    tensors["final_norm.weight"][0] = 70_000.0
    save_file(tensors, exported / "model.safetensors")
    with pytest.raises(InputError, match=r"final_norm.weight has weights of up to 70,000, beyond fp16"):
        export_model(exported, tmp_path / "half", "fp16")
    assert not list(tmp_path.glob("half*"))
