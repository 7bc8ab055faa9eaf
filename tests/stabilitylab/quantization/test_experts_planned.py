"""Experts that are one parameter in the model's own form get one scheme, whatever each of them would bear."""

from __future__ import annotations

import pytest

from stabilitylab.cli import main
from stabilitylab.models import open_text_model
from stabilitylab.models.fused_experts import expert_groups
from stabilitylab.quantization.plan import load_plan
from tests.stabilitylab.quantization.folders import TEXT, write_tokenizer


def test_fused_experts_are_one_decision(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "model"
    folder.mkdir()
    config = transformers.Qwen3MoeConfig(
        vocab_size=write_tokenizer(folder),
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.2,
        max_position_embeddings=64,
    )
    transformers.set_seed(0)
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder)
    groups = expert_groups(open_text_model(folder).module)
    assert len(groups) == 2 * 2 * 4
    assert len(set(groups.values())) == 4
    (tmp_path / "text").write_text(TEXT)
    plan = tmp_path / "plan.json"
    command = ["quantize", str(folder), "--plan", str(plan), "--text", str(tmp_path / "text")]
    tokens = ["--tokens", "64", "--verify-tokens", "64", "--length", "32", "--budget-memory", "0.4"]
    assert main([*command, *tokens, "--schemes", "int8-row", "int4-g32-asym", "int4-g32-gptqo"]) == 0
    layers = load_plan(plan).layers
    of_group = {}
    for path, group in groups.items():
        if path in layers:
            of_group.setdefault(group, set()).add(layers[path].scheme)
    assert len(of_group) == 4
    assert all(len(schemes) == 1 for schemes in of_group.values())
