"""transformers' models of many families: watched ones train as bare ones, every gradient is right, the probe sees attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabilitylab import Monitor
from tests.stabilitylab.recording import Recording

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
WIDE = {**GROUPED, "head_dim": 8, "pad_token_id": 0}


def tokens() -> dict[str, Tensor]:
    ids = torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def picture() -> dict[str, Tensor]:
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": pixels, "labels": torch.tensor([0, 1])}


Inputs = Callable[[], dict[str, Tensor]]
# Name of the model's class and of its configuration's, sizes, input, and how many attention modules it has.
FAMILIES: dict[str, tuple[str, str, dict[str, Any], Inputs, int]] = {
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4},
        tokens,
        2,
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED, tokens, 2),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": 8}, tokens, 2),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 8}, tokens, 2),
    "glm4": ("Glm4ForCausalLM", "Glm4Config", WIDE, tokens, 2),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**GROUPED, "num_local_experts": 4}, tokens, 2),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        tokens,
        2,
    ),
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2},
        tokens,
        0,
    ),
    "bert": ("BertForMaskedLM", "BertConfig", SIZES, tokens, 2),
    "albert": ("AlbertForMaskedLM", "AlbertConfig", {**SIZES, "embedding_size": 16}, tokens, 1),
    "mpnet": ("MPNetForMaskedLM", "MPNetConfig", SIZES, tokens, 2),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": 97,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        tokens,
        6,
    ),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        {k: v for k, v in SIZES.items() if "oc" not in k and "pos" not in k}
        | {"image_size": 32, "patch_size": 8},
        picture,
        2,
    ),
    "resnet": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
        picture,
        0,
    ),
}
SDPA = ("gpt2", "llama", "mistral", "qwen3", "glm4", "mixtral", "bert", "albert", "vit")


def build(family: str, attention: str | None) -> nn.Module:
    model, config, sizes, _, _ = FAMILIES[family]
    options = {} if attention is None else {"attn_implementation": attention}
    torch.manual_seed(0)
    built: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**sizes, **options))
    return built.eval()  # dropout would differ between kernels


def train(
    model: nn.Module, inputs: dict[str, Tensor], *, watched: bool
) -> tuple[Recording, list[dict[str, float]]]:
    """Two steps; the gradients' norms of each by parameter."""
    sink, norms = Recording(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    monitor = Monitor(model, optimizer, every=1, sinks=[sink], detector=None) if watched else None
    for step in range(2):
        loss = model(**inputs).loss
        loss.backward()
        norms.append({n: float(p.grad.norm()) for n, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
        optimizer.zero_grad()
        if monitor is not None:
            monitor.step(step, loss=loss)
    if monitor is not None:
        monitor.close()
    return sink, norms


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str) -> None:
    _, _, _, inputs, attentions = FAMILIES[family]
    maxima: dict[str | None, dict[str, list[float]]] = {}
    for attention in ("eager", "sdpa") if family in SDPA else (None,):
        bare, watched = build(family, attention), build(family, attention)
        train(bare, inputs(), watched=False)
        sink, norms = train(watched, inputs(), watched=True)
        for name, weight in bare.named_parameters():
            assert torch.equal(weight, watched.get_parameter(name)), name
        assert not [event for event in sink.events if event.kind == "telemetry-lost"]
        for step, by_name in enumerate(norms):
            for name, norm in by_name.items():
                # Sums of squares in float32, here and there.
                assert sink.rows[step, f"gradient/{name}/l2", -1] == pytest.approx(
                    norm, rel=1e-4, abs=1e-9
                ), name
        sites = {name.split("/")[1] for _, name, _ in sink.rows if name.startswith("attention/")}
        assert len(sites) == attentions
        maxima[attention] = {site: sink.vector(0, f"attention/{site}/score_max") for site in sorted(sites)}
        if attention == "sdpa":
            assert maxima["sdpa"].keys() == maxima["eager"].keys()
            for site, high in maxima["sdpa"].items():
                low = sink.vector(0, f"attention/{site}/score_max_sampled")
                for bounds, exact in zip(zip(low, high, strict=True), maxima["eager"][site], strict=True):
                    slack = 1e-4 * max(1.0, abs(exact))
                    assert bounds[0] <= exact + slack
                    assert exact - slack <= bounds[1] <= exact + math.log(17) + slack
