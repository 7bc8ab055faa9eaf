"""A GLM opened with quantized layers has those that quantizing it in memory gives, by scheme, by plan, and from an applied plan."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import entry_points

import pytest
import torch
from safetensors.torch import load_file, save_file

from glm.cli import main
from glm.distributed.process_group import SingleProcess
from glm.errors import InputError
from glm.inference.decoding import DecodingConfig
from glm.inference.generation import fill
from glm.inference.loading import OpenedModel, open_model
from glm.inference.model_export import export_model
from glm.inference.quantized_model import NAMED, open_quantized
from glm.train import checkpoint as checkpoints
from glm.train.async_checkpoint import CheckpointWriter
from stabilitylab.cli import main as stabilitylab
from stabilitylab.models.loading import GROUP
from stabilitylab.quantization.applying import quantize_layers
from stabilitylab.quantization.plan import load_plan

TEXT = "The import statement, 训练[MASK]中断。 The import statement is a statement. " * 20


@pytest.fixture(scope="module")
def export(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "model"
    export_model(run, folder)
    return folder


@pytest.fixture(scope="module")
def planned(export, tmp_path_factory):
    """A plan for the export and the folder it was applied to."""
    if not entry_points(group=GROUP, name="glm"):
        pytest.skip(
            "the project is on the path but not installed, so that stabilitylab cannot know of glm's models"
        )
    folder = tmp_path_factory.mktemp("planned")
    (folder / "text").write_text(TEXT, encoding="utf-8")
    command = ["quantize", str(export), "--text", str(folder / "text"), "--plan", str(folder / "plan.json")]
    command += ["--tokens", "32", "--verify-tokens", "32", "--length", "32", "--budget-memory", "0.4"]
    command += [
        "--schemes",
        "smoothquant",
        "int4-g32-asym",
        "int4-g32-asym-gptqo",
        "--apply",
        str(folder / "out"),
    ]
    assert stabilitylab(command) == 0
    return folder


def same(one: OpenedModel, other: OpenedModel) -> None:
    texts = [fill(opened, "The [MASK] statement", DecodingConfig(tokens=6)) for opened in (one, other)]
    for span, other_span in zip(texts[0].spans, texts[1].spans, strict=True):
        assert span.tokens == other_span.tokens
        # Equal weights at other addresses: fp32 sums may be taken in another order.
        assert span.log_probability == pytest.approx(other_span.log_probability, rel=1e-5)
    ours, theirs = one.model.state_dict(), other.model.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
        assert tensor.dtype == theirs[name].dtype, name


@pytest.fixture(scope="module")
def in_parts(run, tmp_path_factory):
    """The run, its newest checkpoint as several processes write it."""
    copy = shutil.copytree(run, tmp_path_factory.mktemp("parts") / "run")
    (step, path), folder = checkpoints.list_checkpoints(copy / "checkpoints")[-1], copy / "checkpoints"
    whole = checkpoints.load(path)
    names = sorted(whole.model)
    files = {f"model-{i:05d}.safetensors": {n: whole.model[n] for n in names[i::2]} for i in range(2)}
    files["optimizer-00001.safetensors"] = whole.optimizer
    assert step == whole.step
    CheckpointWriter(folder, whole, files, SingleProcess(), background=False).publish(keep=1)
    assert not (path / "model.safetensors").exists()
    return copy


@pytest.mark.parametrize("how", ["int8", "int4"])
def test_layer_by_layer_is_as_in_memory(export, run, in_parts, how):
    for folder in (export, run, in_parts):
        whole = open_model(folder)
        linear = [
            f"layers.{n}.{part}"
            for n in range(2)
            for part in (
                "attention.query_key_value",
                "attention.output",
                "feed_forward.up",
                "feed_forward.down",
            )
        ]
        quantize_layers(whole.model, dict.fromkeys(linear, NAMED[how]))
        same(open_quantized(folder, how), whole)


def test_a_plan_is_followed_and_what_it_was_applied_to_opens(export, planned):
    plan = load_plan(planned / "plan.json")
    assert set(plan.layers) == {
        f"layers.{n}.{part}"
        for n in range(2)
        for part in ("attention.query_key_value", "attention.output", "feed_forward.up", "feed_forward.down")
    }
    assert (
        plan.planned.schemes["int4-g32-asym-gptqo"] > 0
    )  # rounded once, for the text, and kept beside the plan
    assert open_quantized(export, str(planned / "plan.json"), precision="bf16")
    followed = open_quantized(export, str(planned / "plan.json"))
    same(followed, open_quantized(planned / "out", None))
    whole = open_model(export)
    smooth = {path: torch.tensor(layer.smooth) for path, layer in plan.layers.items() if layer.smooth}
    quantize_layers(whole.model, plan.schemes, smooth)
    same(followed, whole)


def test_the_precision_is_that_of_what_is_not_quantized(export):
    model = open_quantized(export, "int8", precision="bf16").model
    assert model.embedding.weight.dtype == torch.bfloat16
    layer = model.get_submodule("layers.0.feed_forward.down")
    assert layer.bias.dtype == torch.bfloat16
    assert layer.stored.scales.dtype == torch.bfloat16


def test_generate_and_evaluate_take_it(run, planned, task_data, capsys):
    command = ["generate", str(run), "--prompt", "The [MASK] statement", "--tokens", "4", "--json"]
    assert main([*command, "--quantize", "int4"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = fill(open_quantized(run, "int4"), "The [MASK] statement", DecodingConfig(tokens=4))
    assert found["text"] == expected.text
    assert main(["generate", str(planned / "out"), *command[2:]]) == 0
    command = [
        "evaluate",
        str(run),
        "--data",
        str(task_data),
        "--parts",
        "perplexity",
        "--rows",
        "2",
        "--json",
    ]
    assert main([*command, "--quantize", "int8"]) == 0
    quantized = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["perplexity"] != quantized["perplexity"]


def test_a_checkpoint_of_several_processes_needs_no_export(
    run, in_parts, planned, task_data, capsys, tmp_path
):
    def said(*words):
        capsys.readouterr()
        assert main([*map(str, words), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    what = ["--prompt", "The [MASK] statement", "--tokens", "4", "--quantize"]
    for how in ("int4", planned / "plan.json"):
        ours, theirs = (said("generate", one, *what, how) for one in (in_parts, run))
        assert ours["text"] == theirs["text"]
    what = ["--data", task_data, "--parts", "perplexity", "--rows", "2", "--quantize", "int8"]
    ours, theirs = (said("evaluate", one, *what) for one in (in_parts, run))
    assert ours["perplexity"] == theirs["perplexity"]
    for one in (run, in_parts):
        export_model(one, tmp_path / one.parent.name / "export")
    files = [tmp_path / one.parent.name / "export" / "model.safetensors" for one in (run, in_parts)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_wrong_input_is_one_line(run, export, planned, tmp_path, capsys):
    def refused(model, how, *said):
        capsys.readouterr()
        quantize = [] if how is None else ["--quantize", str(how)]
        assert main(["generate", str(model), "--prompt", "a[MASK]", *quantize]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        for part in said:
            assert part in line

    refused(run, "int3", "--quantize int3", "choose int8, int4, or the file of a plan")
    refused(planned / "out", "int4", "is quantized already")
    shutil.copytree(export, tmp_path / "other")
    file = tmp_path / "other" / "model.safetensors"
    tensors = load_file(file)
    tensors["layers.0.feed_forward.up.weight"][0, 0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    refused(tmp_path / "other", planned / "plan.json", "the plan was made for", "not for")
    tensors["layers.0.feed_forward.up.weight"][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    refused(tmp_path / "other", "int8", "layers.0.feed_forward.up.weight", "NaN")
    del tensors["layers.0.feed_forward.up.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    refused(tmp_path / "other", "int8", "lacks 1 of")
    file.write_bytes(b"\0" * 8)
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        open_quantized(tmp_path / "other", "int8")


def test_a_checkpoint_has_no_configuration_to_take_along(run, planned, tmp_path, capsys):
    checkpoint = max((run / "checkpoints").iterdir())
    command = [
        "quantize",
        str(checkpoint),
        "--plan",
        str(planned / "plan.json"),
        "--apply",
        str(tmp_path / "out"),
    ]
    capsys.readouterr()
    assert stabilitylab(command) == 2
    assert "give the run or export that it belongs to" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
