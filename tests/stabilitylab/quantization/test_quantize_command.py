"""stabilitylab quantize makes, shows, applies and reopens a plan; every kind of wrong input."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from stabilitylab.cli import main
from stabilitylab.errors import InputError
from stabilitylab.models import open_text_model
from stabilitylab.quantization import QuantizedLinear
from stabilitylab.quantization.applying import quantize_layers
from stabilitylab.quantization.loading import open_quantized
from stabilitylab.quantization.plan import load_plan
from stabilitylab.quantization.plan_checkpoint import SoFar
from stabilitylab.quantization.serialization import save_quantized
from tests.stabilitylab.quantization.folders import TEXT, edit_weight, write_llama


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tied decoder, its plan, the quantized folder and the page, by the command."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "model").mkdir()
    write_llama(folder / "model", tied=True)
    (folder / "text").write_text(TEXT)
    code = main(
        [
            "quantize",
            str(folder / "model"),
            "--text",
            str(folder / "text"),
            "--plan",
            str(folder / "plan.json"),
        ]
        + ["--budget-memory", "0.45", "--tokens", "32", "--verify-tokens", "64", "--length", "32"]
        + ["--schemes", "w8a8-token", "smoothquant", "int4-g32-asym"]
        + ["--apply", str(folder / "out"), "--html", str(folder / "page.html")]
    )
    assert code == 0
    return folder


def test_what_was_written_opens_as_what_was_planned(made):
    """Outputs bit for bit those of the original with the plan's layers; tied weights tied, tensors those of the file."""
    plan, opened = load_plan(made / "plan.json"), open_quantized(made / "out")
    original = open_text_model(made / "model")
    smooth = {path: torch.tensor(layer.smooth) for path, layer in plan.layers.items() if layer.smooth}
    quantize_layers(original.module, plan.schemes, smooth)
    for window in original.windows([TEXT], 32, 64):
        assert torch.equal(opened.run(window), original.run(window))
    assert [window.inputs["input_ids"].tolist() for window in opened.windows([TEXT], 32, 64)] == [
        window.inputs["input_ids"].tolist() for window in original.windows([TEXT], 32, 64)
    ]
    assert opened.fingerprint == plan.fingerprint
    module = opened.module
    found = {path: layer for path, layer in module.named_modules() if isinstance(layer, QuantizedLinear)}
    # The embedding's matrix is the output's too, and in the file once.
    assert torch.equal(found.pop("lm_head").stored.values, found["model.embed_tokens.matrix"].stored.values)
    assert [path.removesuffix(".matrix") for path in found] == list(plan.schemes)
    assert not plan.kept
    stored = load_file(made / "out" / "model.safetensors")
    assert not any(name.startswith("lm_head") for name in stored)
    for path, layer in found.items():
        assert torch.equal(layer.stored.values, stored[f"{path.removesuffix('.matrix')}.values"])


def test_the_page_tells_the_plan(made):
    page = (made / "page.html").read_text()
    plan = load_plan(made / "plan.json")
    for path, layer in plan.layers.items():
        assert path in page
        assert layer.reason.split(";")[0] in page


def test_the_plan_has_all_that_was_measured(made):
    plan = load_plan(made / "plan.json")
    assert plan.planned.bytes <= 0.45 * plan.singles["16-bit"].bytes
    assert plan.tokens == (32, 64)
    for layer in plan.sensitivity.values():
        assert set(layer["effects"]) == {"w8a8-token", "smoothquant", "int4-g32-asym"}
    best = plan.best_single
    assert best is None or plan.planned.loss <= best[1].loss


def test_an_existing_plan_is_applied(made, tmp_path, capsys):
    command = ["quantize", str(made / "model"), "--plan", str(made / "plan.json"), "--json"]
    assert main([*command, "--apply", str(tmp_path / "again")]) == 0
    assert json.loads(capsys.readouterr().out)["fingerprint"] == load_plan(made / "plan.json").fingerprint
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        made / "out" / "model.safetensors"
    ).read_bytes()


def test_a_quantized_file_that_does_not_fit(made, tmp_path):
    shutil.copytree(made / "out", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["num_hidden_layers"] += 1
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"lacks \d+ weights"):
        open_quantized(tmp_path / "out")
    config["num_hidden_layers"] -= 2
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="has not"):
        open_quantized(tmp_path / "out")
    with pytest.raises(InputError, match="is not a quantized model"):
        open_quantized(made / "model")
    with pytest.raises(InputError, match="exists already"):
        save_quantized(open_text_model(made / "model"), load_plan(made / "plan.json"), made / "out")


def refused(capsys, arguments, *said):
    capsys.readouterr()
    assert main(["quantize", *map(str, arguments)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    for part in said:
        assert part in lines[0]


def test_wrong_input_is_one_line(made, tmp_path, capsys):
    model, text, plan = made / "model", made / "text", tmp_path / "plan.json"
    new = [model, "--text", text, "--plan", plan]
    refused(capsys, [model, "--plan", plan], "give --text FILE to make one")
    refused(capsys, [model, "--text", text, "--plan", made / "plan.json"], "exists already")
    refused(capsys, [model, "--plan", made / "plan.json", "--budget-loss", 1], "a budget needs --text")
    refused(capsys, [*new, "--budget-loss", 1, "--budget-memory", 1], "--budget-loss and --budget-memory")
    refused(capsys, [*new, "--budget-memory", "nan"], "must be a number")
    refused(capsys, [*new, "--budget-latency", 0.5, "--batch", 7], "--batch 7", "1, 32, 256")
    refused(capsys, [*new, "--schemes", "int5-row"], "there is no scheme 'int5-row'")
    refused(capsys, [*new, "--tokens", 0], "must be at least 1")
    refused(capsys, [*new, "--apply", made / "out"], "exists already")
    refused(capsys, [*new, "--html", tmp_path / "no" / "page.html"], "there is no folder")
    refused(capsys, [model, "--text", tmp_path / "no", "--plan", plan], "does not exist")
    (tmp_path / "empty").write_text("")
    refused(capsys, [model, "--text", tmp_path / "empty", "--plan", plan], "no window of tokens")
    assert not plan.exists()


def test_a_plan_for_another_model_is_refused(made, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    write_llama(tmp_path / "other", tied=True, seed=1)
    refused(capsys, [tmp_path / "other", "--plan", made / "plan.json"], "made for", "not for other")


def test_a_plan_for_another_tokenizer_is_refused(made, tmp_path, capsys):
    folder = shutil.copytree(made / "model", tmp_path / "model")
    file = folder / "tokenizer.json"
    data = json.loads(file.read_text())
    words = data["model"]["vocab"]
    words["a"], words["e"] = words["e"], words["a"]
    file.write_text(json.dumps(data))
    refused(capsys, [folder, "--plan", made / "plan.json"], "another tokenizer", "make the plan again")


def test_weights_that_are_not_finite_are_refused(made, tmp_path, capsys):
    shutil.copytree(made / "model", tmp_path / "broken")
    edit_weight(tmp_path / "broken", "model.layers.1.mlp.down_proj.weight", float("nan"))
    refused(
        capsys,
        [tmp_path / "broken", "--text", made / "text", "--plan", tmp_path / "plan.json"],
        "model.layers.1.mlp.down_proj.weight holds NaN",
    )


def test_rows_of_zeros_stay_zero(made, tmp_path):
    """No scale of zero, no division by it: the public code of GLM-130B gave NaN."""
    shutil.copytree(made / "model", tmp_path / "zeros")
    file = tmp_path / "zeros" / "model.safetensors"
    from safetensors.torch import save_file

    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"][3:5] = 0.0
    save_file(tensors, file, metadata={"format": "pt"})
    command = [
        "quantize",
        str(tmp_path / "zeros"),
        "--text",
        str(made / "text"),
        "--plan",
        str(tmp_path / "p"),
    ]
    command += ["--tokens", "16", "--verify-tokens", "16", "--length", "16", "--schemes", "int4-row"]
    assert main([*command, "--budget-memory", "0.5", "--apply", str(tmp_path / "out")]) == 0
    opened = open_quantized(tmp_path / "out")
    layer = opened.module.get_submodule("model.layers.0.mlp.up_proj")
    assert bool((layer.stored.dequantize()[3:5] == 0).all())
    assert bool(opened.run(next(iter(opened.windows([TEXT], 16)))).isfinite().all())


def test_weights_rounded_for_their_inputs_are_written_without_the_text(made, tmp_path, capsys):
    """Made once, kept beside the plan, and applied from there to the same numbers."""
    plan = tmp_path / "plan.json"
    command = ["quantize", str(made / "model"), "--plan", str(plan)]
    names = ["int4-g32-asym-gptqo", "nvfp4-mse-awq"]
    tokens = ["--tokens", "64", "--verify-tokens", "32", "--length", "32", "--budget-memory", "0.31"]
    text = ["--text", str(made / "text")]
    assert main([*command, *text, *tokens, "--schemes", *names, "--apply", str(tmp_path / "out")]) == 0
    loaded = load_plan(plan)
    assert set(loaded.planned.schemes) <= set(names)
    files = list((tmp_path / "plan.rounded").iterdir())
    # Of AWQ the embedding is rounded to nearest, so it needs no file.
    embedding = loaded.layers["model.embed_tokens"].scheme
    assert embedding in ("int4-g32-asym-gptqo", "nvfp4-mse")
    assert len(files) == len(loaded.schemes) - (embedding == "nvfp4-mse") > 0
    assert not (tmp_path / "plan.layers.jsonl").exists()
    assert main([*command, "--apply", str(tmp_path / "again")]) == 0
    written = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == written
    opened, original = open_quantized(tmp_path / "out"), open_text_model(made / "model")
    quantize_layers(original.module, loaded.schemes)
    for window in original.windows([TEXT], 32, 64):
        assert torch.equal(opened.run(window), original.run(window))
    shutil.rmtree(tmp_path / "plan.rounded")
    refused(capsys, [*command[1:], "--apply", tmp_path / "third"], "keep the folder beside the plan")


def test_keys_and_values_within_a_budget(made, tmp_path, capsys):
    plan = tmp_path / "plan.json"
    command = ["quantize", str(made / "model"), "--plan", str(plan), "--text", str(made / "text")]
    tokens = ["--tokens", "32", "--verify-tokens", "64", "--length", "64", "--schemes", "int8-row"]
    assert main([*command, *tokens, "--kv-context", "2048", "--budget-kv", "0.55"]) == 0
    said = capsys.readouterr().out
    cache = load_plan(plan).cache
    assert cache["chosen"] in cache["formats"]
    assert cache["formats"][cache["chosen"]]["bytes"] <= 0.55 * cache["bytes_16"]
    assert f"within 0.55: {cache['chosen']}" in said
    for name in cache["formats"]:
        assert name in said
    # Of 64 tokens half would see nothing rounded.
    assert cache["left_out"] == ["int8-kivi", "int4-kivi", "int2-kivi"]
    assert "int8-kivi, int4-kivi, int2-kivi: not measured, for windows of 64 tokens" in said
    again = [str(made / "model"), "--plan", tmp_path / "b.json", "--text", made / "text"]
    refused(capsys, [*again, "--budget-kv", "0.4"], "give --kv-context too")
    refused(capsys, [str(made / "model"), "--plan", plan, "--kv-context", "9"], "needs --text")
    refused(capsys, [*again, "--kv-context", "0"], "at least 1")


def test_bits_a_weight_are_a_share_of_sixteen(made, tmp_path, capsys):
    plan = tmp_path / "plan.json"
    command = [str(made / "model"), "--plan", str(plan), "--text", str(made / "text")]
    tokens = [
        "--tokens",
        "32",
        "--verify-tokens",
        "32",
        "--length",
        "32",
        "--schemes",
        "int8-row",
        "int4-g32-asym",
    ]
    assert main(["quantize", *command, *tokens, "--budget-bits", "7.2"]) == 0
    loaded = load_plan(plan)
    assert loaded.budget.value == 0.45
    weights = sum(layer["shape"][0] * layer["shape"][1] for layer in loaded.sensitivity.values())
    assert 8 * loaded.planned.bytes <= 7.2 * weights
    refused(
        capsys,
        [*command, "--budget-bits", "4", "--budget-memory", "0.3"],
        "--budget-memory and --budget-bits",
    )


def test_a_cache_that_is_none_is_refused_before_anything_is_measured(
    bert_folder, tmp_path, monkeypatch, capsys
):
    def measured(*_arguments, **_named):
        raise AssertionError("measured first")

    monkeypatch.setattr("stabilitylab.quantization.plan_making.layer_inputs", measured)
    (tmp_path / "text").write_text(TEXT)
    command = [str(bert_folder), "--plan", tmp_path / "plan.json", "--text", tmp_path / "text"]
    refused(capsys, [*command, "--kv-context", "64"], "keeps no keys and values of past tokens")


def test_the_share_of_the_whole_model_is_told(made, tmp_path):
    """Without the embedding, which is tied to the output, the plan is of a part of the model."""
    assert not any(note.startswith("shares are") for note in load_plan(made / "plan.json").notes)
    command = [
        "quantize",
        str(made / "model"),
        "--text",
        str(made / "text"),
        "--plan",
        str(tmp_path / "plan.json"),
    ]
    options = ["--tokens", "32", "--verify-tokens", "64", "--length", "32", "--schemes", "int8-row"]
    assert main([*command, *options, "--budget-memory", "0.6", "--no-embeddings"]) == 0
    plan, model = load_plan(tmp_path / "plan.json"), open_text_model(made / "model").module
    assert plan.kept.keys() == {"model.embed_tokens", "lm_head"}
    (note,) = (note for note in plan.notes if note.startswith("shares are of the planned layers"))
    numbers = sum(p.numel() for p in model.parameters())
    planned = sum(model.get_parameter(f"{path}.weight").numel() for path in plan.layers)
    share = (plan.planned.bytes + 2 * (numbers - planned)) / (2 * numbers)
    assert note.endswith(f"takes {share:.3f}")
    assert "model.embed_tokens.weight the largest" in note
    assert share > plan.planned.bytes / plan.singles["16-bit"].bytes


class Killed(BaseException):
    """As a kill: nothing that handles errors sees it."""


def test_a_plan_that_is_killed_in_any_phase_is_taken_up(tmp_path, monkeypatch):
    """After every few numbers that were written down, and before the model is written: the plan is that of an undisturbed run, and
    nothing was measured twice."""
    write_llama(tmp_path, tied=True, layers=2)
    (tmp_path / "text").write_text(TEXT)
    allowed, written = [1 << 30], []
    write = SoFar._write

    def counted(self, data):
        write(self, data)
        written.append("".join(key for key in ("end", "latencies", "plan") if key in data) or data["path"])
        allowed[0] -= 1
        if allowed[0] == 0:
            raise Killed

    monkeypatch.setattr(SoFar, "_write", counted)

    def command(name):
        arguments = [
            "quantize",
            str(tmp_path),
            "--text",
            str(tmp_path / "text"),
            "--plan",
            str(tmp_path / name),
        ]
        arguments += ["--budget-memory", "0.4", "--tokens", "32", "--verify-tokens", "32", "--length", "32"]
        arguments += ["--schemes", "int8-row", "int4-g32-asym-gptqo"]
        return main([*arguments, "--apply", str(tmp_path / f"{name}.out")])

    assert command("whole.json") == 0
    whole, count = load_plan(tmp_path / "whole.json"), len(written)
    assert {"end", "latencies", "plan"} < set(written)
    written.clear()
    for step in (3, 9, 3, 1, 1, 1):
        allowed[0] = step
        with pytest.raises(Killed):
            command("plan.json")
        with (tmp_path / "plan.layers.jsonl").open("a") as file:
            file.write('{"path": "cut o')
    allowed[0] = 1 << 30
    with monkeypatch.context() as killing:

        def kill(*_arguments):
            raise Killed

        killing.setattr("stabilitylab.quantization.commands.save_as", kill)
        with pytest.raises(Killed):
            command("plan.json")
    assert command("plan.json") == 0
    again = load_plan(tmp_path / "plan.json")
    assert len(written) == count
    for name in ("layers", "kept", "sensitivity", "loss", "notes", "tokens", "told_tokens"):
        assert getattr(again, name) == getattr(whole, name), name
    assert again.planned.loss == whole.planned.loss
    assert {name: one.loss for name, one in again.singles.items()} == {
        name: one.loss for name, one in whole.singles.items()
    }
    files = [
        sorted(file.name for file in (tmp_path / f"{one}.rounded").iterdir()) for one in ("whole", "plan")
    ]
    assert files[0] == files[1]
    assert not (tmp_path / "plan.layers.jsonl").exists()
