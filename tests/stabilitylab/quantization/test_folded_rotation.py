"""A rotation folded into weights: the same model, without steady outlier channels, for every kind that is supported."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch

from stabilitylab.cli import main
from stabilitylab.errors import InputError
from stabilitylab.formats import rotate as rotate_rows
from stabilitylab.models import open_text_model
from stabilitylab.models.fused_experts import split_experts
from stabilitylab.quantization import folded_rotation
from stabilitylab.quantization.applying import quantize_layers
from stabilitylab.quantization.plan import load_plan
from stabilitylab.quantization.rotated_linear import signs_for
from stabilitylab.quantization.schemes import scheme_of
from tests.stabilitylab.quantization.folders import TEXT, write_tokenizer

CHANNEL = 7
# A kind and what its config needs besides; 48 = 3 x 16 columns and heads of 12 are no powers of two.
KINDS = {
    "llama": {"head_dim": 12},
    "llama-biased": {"attention_bias": True, "mlp_bias": True},
    "llama-tied": {"tie_word_embeddings": True},
    "mistral": {"head_dim": 16},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8},
    "gemma": {"head_dim": 12},
}


def write_model(folder, name, **more):
    """A tiny model of a kind, with gains and biases that matter and a channel of its stream that stands out on every token."""
    transformers = pytest.importorskip("transformers")
    folder.mkdir()
    kind = name.partition("-")[0]
    config = transformers.AutoConfig.for_model(
        kind,
        vocab_size=write_tokenizer(folder),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        **{"tie_word_embeddings": False, **KINDS.get(name, {})},
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith(("norm.weight", "bias")):
                parameter.add_(torch.randn_like(parameter) * 0.3)
        model.get_input_embeddings().weight[:, CHANNEL] = 30.0
    model.to(more.get("dtype", torch.float32)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("of") / "model", request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("of") / "model", "llama")


def logits(model):
    return torch.cat([model.run(window)[0] for window in model.windows([TEXT], 32, 512)])


def largest_input(module, window, ending, turned=None):
    """The largest number that layers of a name read, as it is or rotated as -had does."""
    found = 0.0

    def see(layer, args):
        nonlocal found
        x = args[0] if turned is None else rotate_rows(args[0], turned)
        found = max(found, float(x.abs().max() / x.pow(2).mean().sqrt()))

    hooks = [
        layer.register_forward_pre_hook(see)
        for path, layer in module.named_modules()
        if path.endswith(ending)
    ]
    with torch.no_grad():
        module(**window.inputs)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("size", [1, 2, 9, 12, 48, 64, 576])
def test_rotations_are_orthogonal_and_flat(size):
    rotation = folded_rotation.orthogonal(size, 3)
    # Sums of ``size`` products of numbers that are off by their cosines' rounding, at most 8 units.
    assert (rotation.T @ rotation - torch.eye(size).double()).abs().max() <= 8 * size * 2.0**-53
    assert rotation.abs().max() <= math.sqrt(2 / size) * (1 + 1e-15)


def test_logits_are_the_same_in_float64(folder):
    module = open_text_model(folder).module.double()
    before = folded_rotation.exact_logits(module)
    embedding = module.get_input_embeddings().weight.clone()
    folded_rotation.rotate(module, seed=1)
    after = folded_rotation.exact_logits(module)
    assert before.dtype == torch.float64
    assert (after - before).abs().max() <= 1e-10 * before.abs().max()
    assert (module.get_input_embeddings().weight - embedding).abs().max() > 1
    assert module.config.tie_word_embeddings is False


def test_fused_experts_rotate_as_those_taken_apart(tmp_path):
    transformers = pytest.importorskip("transformers")
    write_model(tmp_path / "model", "mixtral")
    module = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").double().eval()
    as_it_was = copy.deepcopy(module)
    folded_rotation.rotate(module)
    for one in (module, as_it_was):
        assert split_experts(one) == 3  # transformers' product of all experts at once takes no float64
    before = folded_rotation.exact_logits(as_it_was)
    assert (folded_rotation.exact_logits(module) - before).abs().max() <= 1e-10 * before.abs().max()


@pytest.mark.parametrize("broken", ["o_proj", "down_proj", "lm_head"])
def test_a_wrong_fold_is_seen(llama, broken):
    """The comparison would refuse a model of which one weight were left as it was."""
    module = open_text_model(llama).module.double()
    before, bound = folded_rotation.exact_logits(module), folded_rotation.rounding_bound(module)
    left = {path: layer.weight for path, layer in module.named_modules() if path.endswith(broken)}
    folded_rotation.rotate(module)
    path, weight = next(iter(left.items()))
    module.get_submodule(path).weight = weight
    apart = (folded_rotation.exact_logits(module) - before).abs().max() / before.abs().max()
    assert apart > 1e6 * bound


def test_written_models_are_opened_by_transformers(folder, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "out"
    assert main(["rotate", str(folder), str(out)]) == 0
    said = capsys.readouterr().out
    assert "of weights in fp32)" in said
    before = open_text_model(folder).module.double()
    opened, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(opened).__name__ == type(before).__name__
    assert opened.config.use_cache is True
    wanted = folded_rotation.exact_logits(before)
    # Weights are off by 2^-24 each, and of 3 blocks with ten products of at most 64 each all may add up.
    split_experts(opened)  # transformers' product of all experts at once takes no float64
    found = folded_rotation.exact_logits(opened.double().eval())
    assert (found - wanted).abs().max() <= 3 * 10 * 64 * 2.0**-24 * wanted.abs().max()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer("fox").input_ids == transformers.AutoTokenizer.from_pretrained(folder)("fox").input_ids


def test_outliers_fall_to_what_a_rotation_in_every_call_gives(folder):
    """What q_proj, and where there are no experts gate_proj, reads; in units of its root mean square."""
    model = open_text_model(folder)
    window = next(model.windows([TEXT], 32))
    names = ["q_proj", *(["gate_proj"] if hasattr(model.module.model.layers[0].mlp, "gate_proj") else [])]
    signs = signs_for(48, "the layer")
    had = {name: largest_input(model.module, window, name, signs) for name in names}
    plain = {name: largest_input(model.module, window, name) for name in names}
    folded_rotation.rotate(model.module)
    for name in names:
        folded = largest_input(model.module, window, name)
        assert folded < plain[name]
        assert folded <= math.sqrt(2) * had[name]  # Hartley's largest number beside Hadamard's


def test_quantizing_it_needs_no_rotation_in_calls(llama, tmp_path):
    """w8a8-token of the rotated model moves its logits by no more than w8a8-token-had does the original's."""
    out = tmp_path / "out"
    assert main(["rotate", str(llama), str(out)]) == 0
    errors = {}
    for place, scheme in ((llama, "w8a8-token"), (llama, "w8a8-token-had"), (out, "w8a8-token")):
        model = open_text_model(place)
        before = logits(model)
        layers = [path for path, _ in model.module.named_modules() if path.endswith("_proj")]
        quantize_layers(model.module, {path: scheme_of(scheme) for path in layers})
        errors[place, scheme] = float((logits(model) - before).norm() / before.norm())
    assert errors[out, "w8a8-token"] <= errors[llama, "w8a8-token-had"] < errors[llama, "w8a8-token"]
    (tmp_path / "text").write_text(TEXT)
    plan = tmp_path / "plan.json"
    few = ["--tokens", "64", "--verify-tokens", "64", "--length", "32", "--schemes", "w8a8-token"]
    assert main(["quantize", str(out), "--plan", str(plan), "--text", str(tmp_path / "text"), *few]) == 0
    assert {layer.scheme for layer in load_plan(plan).layers.values()} <= {"w8a8-token", None}


@pytest.mark.parametrize("kind", ["gemma2", "olmo2", "phi3", "gpt2"])
def test_other_kinds_are_refused_in_one_line(tmp_path, capsys, kind):
    write_model(tmp_path / "model", kind)
    capsys.readouterr()
    assert main(["rotate", str(tmp_path / "model"), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: a model of kind {kind} is not rotated")
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_weights_that_no_rule_is_known_for_are_refused(llama):
    module = open_text_model(llama).module
    before = copy.deepcopy(module.state_dict())
    module.model.layers[1].mlp.further = torch.nn.Linear(48, 48)
    with pytest.raises(InputError, match=r"no rule is known for model\.layers\.1\.mlp\.further"):
        folded_rotation.rotate(module)
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in before.items())


def test_what_stands_is_not_overwritten(llama, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert main(["rotate", str(llama), str(tmp_path / "out")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())
    assert main(["rotate", str(llama), str(tmp_path / "other"), "--seed", "-1"]) == 2
    assert "--seed -1 is not a seed" in capsys.readouterr().err


def test_the_format_is_the_files_unless_another_is_asked_for(tmp_path):
    folder = write_model(tmp_path / "model", "llama-tied", dtype=torch.bfloat16)
    assert main(["rotate", str(folder), str(tmp_path / "same")]) == 0
    assert main(["rotate", str(folder), str(tmp_path / "wide"), "--dtype", "fp32"]) == 0
    told = [json.loads((tmp_path / out / "config.json").read_text()) for out in ("same", "wide")]
    assert [one["dtype"] for one in told] == ["bfloat16", "float32"]
    assert [one["tie_word_embeddings"] for one in told] == [False, False]
    same, wide = (open_text_model(tmp_path / out).module.state_dict() for out in ("same", "wide"))
    assert same.keys() == wide.keys()
    assert all(torch.equal(tensor.bfloat16(), same[name].bfloat16()) for name, tensor in wide.items())


def test_a_range_that_is_too_small_is_refused(tmp_path, capsys):
    folder = write_model(tmp_path / "model", "llama")
    module = open_text_model(folder).module
    with torch.no_grad():
        module.model.embed_tokens.weight *= 1e5
    module.save_pretrained(folder)
    assert main(["rotate", str(folder), str(tmp_path / "out"), "--dtype", "fp16"]) == 2
    assert "does not fit fp16 when rotated" in capsys.readouterr().err
    assert [one.name for one in tmp_path.iterdir()] == ["model"]
