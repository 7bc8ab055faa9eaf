"""Mixtures of experts, taken apart: the linear layers compute what the fused experts did."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
import transformers

from stabilitylab.model_structure import linear_layers, stacks, weights_outside_layers
from stabilitylab.models import open_text_model
from stabilitylab.models.fused_experts import SplitExperts, split_experts
from stabilitylab.outliers.scan import scan_outliers
from stabilitylab.quantization.plan import Budget
from stabilitylab.quantization.plan_making import make_plan
from stabilitylab.quantization.schemes import scheme_of
from tests.stabilitylab.models import tiny

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SMALL = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


def mixture(kind: str, **options: object):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **options})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model


KINDS = {
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8},
    "Mixtral": {"num_local_experts": 4},
    "GptOss": {"num_local_experts": 4, "head_dim": 8, "layer_types": ["full_attention"] * 2},
    "Olmoe": {"num_experts": 4},
}


@pytest.mark.parametrize("unsaid", [(), ("has_post_expert_norm",), ("has_post_expert_norm", "has_gate")])
@pytest.mark.parametrize("kind", KINDS)
def test_split_experts_compute_what_the_fused_ones_did(kind, unsaid):
    model = mixture(kind, **KINDS[kind])
    tokens = torch.randint(0, 32, (2, 15), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(tokens).logits
        size = sum(parameter.numel() for parameter in model.parameters())
        for module in model.modules():
            for name in unsaid:  # what releases of transformers from 5.0 on did not leave on it yet
                vars(module).pop(name, None)
        assert split_experts(model) == 2
        after = model(tokens).logits
    # The same products, summed in another order: some units in the last place of float32, through two layers.
    torch.testing.assert_close(after, before, rtol=2e-5, atol=2e-5)
    assert sum(parameter.numel() for parameter in model.parameters()) == size
    assert len(linear_layers(model)) == 2 * (4 + 4 * 2) + 1
    assert [len(stack.blocks) for stack in stacks(model)] == [2]
    share, names = weights_outside_layers(model)
    assert len(names) == 2  # routers
    assert share < 0.02


def test_a_mixture_is_measured_expert_by_expert(tmp_path, text):
    path = tiny.save(mixture("Qwen3Moe", **KINDS["Qwen3Moe"]), tmp_path / "moe")
    model = open_text_model(path)
    assert isinstance(model.module.model.layers[0].mlp.experts, SplitExperts)
    scan = scan_outliers(model, text, tokens=200)
    seen = {site.path for site, _ in scan.sites} | {f"{path}:input" for path in scan.skipped}
    assert {f"model.layers.1.mlp.experts.down_proj.{expert}:input" for expert in range(4)} <= seen
    assert any("mlp.gate.weight" in note for note in scan.notes)


def test_experts_that_stay_fused_are_told_of(tmp_path):
    config = transformers.JetMoeConfig(**SMALL, num_local_experts=4, kv_channels=8)
    path = tiny.save(transformers.JetMoeForCausalLM(config), tmp_path / "moe")
    model = open_text_model(path)
    assert any("layers of experts" in note and "(JetMoeParallelExperts)" in note for note in model.notes)


@pytest.mark.parametrize("kind", ["Llama4", "Phimoe"])
def test_routers_that_return_a_choice_are_no_linear_layers(tmp_path, text, kind):
    """Llama 4's and Phi-MoE's are subclasses of ``nn.Linear``; Llama 4's experts are fused without transformers' decorator."""
    options = {"num_local_experts": 4, "head_dim": 8}
    if kind == "Llama4":
        options |= {"intermediate_size_mlp": 24, "interleave_moe_layer_step": 1}
    config = getattr(transformers, {"Llama4": "Llama4TextConfig"}.get(kind, f"{kind}Config"))
    torch.manual_seed(0)
    own = getattr(transformers, f"{kind}ForCausalLM")(config(**{**SMALL, **options})).eval()
    with torch.no_grad():
        for parameter in own.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    model = open_text_model(tiny.save(own, tmp_path / "moe"))
    window = next(model.windows(text, 24, 24))
    with torch.no_grad():
        torch.testing.assert_close(model.run(window), own(**window.inputs).logits, rtol=2e-5, atol=2e-5)
    layers = linear_layers(model.module)
    assert not any("router" in path for path in layers)
    assert any("router.weight" in note for note in model.notes)
    assert len([path for path in layers if ".experts." in path]) == 2 * 2 * 4
    # Every layer's gradient and input are seen, and a scheme can stand in the place of each.
    plan = make_plan(
        model,
        text,
        Budget(kind="memory", value=0.6),
        [scheme_of("int8-row")],
        tokens=48,
        verify_tokens=24,
        length=24,
    )
    planned = {path for path, layer in plan.layers.items() if layer.scheme == "int8-row"}
    assert len([path for path in planned if ".experts." in path]) == 2 * 2 * 4


def test_experts_of_another_layout_stay_and_are_counted():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(8, 8)
            self.experts = nn.Parameter(torch.zeros(3, 8, 8))

    model = Own()
    assert split_experts(model) == 0
    share, names = weights_outside_layers(model)
    assert names == ["experts"]
    assert share == pytest.approx(192 / (192 + 72))
