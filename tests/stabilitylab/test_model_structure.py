"""Blocks, stacks, embeddings, linear layers and tied weights of real architectures, built small from their configurations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from glm.presets import PRESETS
from stabilitylab import model_structure as structure

transformers = pytest.importorskip("transformers")

SMALL = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, vocab_size=50)  # noqa: C408
WIDE = dict(SMALL, intermediate_size=32, num_key_value_heads=2)
MOE = dict(WIDE, num_experts_per_tok=2, moe_intermediate_size=8, decoder_sparse_step=1)


def hugging_face(config: object, kind: str) -> nn.Module:
    model: nn.Module = getattr(transformers, kind).from_config(config)
    return model


# configuration, class, {stack: blocks}, embeddings
HUGGING_FACE = {
    "gpt2": (
        lambda: transformers.GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=50),
        "AutoModelForCausalLM",
        {"transformer.h": 3},
        ["transformer.wte.weight"],
    ),
    "llama": (
        lambda: transformers.LlamaConfig(**WIDE),
        "AutoModelForCausalLM",
        {"model.layers": 3},
        ["model.embed_tokens.weight"],
    ),
    "bert": (
        lambda: transformers.BertConfig(**SMALL, intermediate_size=32),
        "AutoModelForMaskedLM",
        {"bert.encoder.layer": 3},
        ["bert.embeddings.word_embeddings.weight"],
    ),
    "t5": (
        lambda: transformers.T5Config(d_model=16, num_layers=3, num_decoder_layers=2, num_heads=2, d_kv=8, vocab_size=50),
        "AutoModelForSeq2SeqLM",
        {"encoder.block": 3, "decoder.block": 2},
        ["shared.weight"],
    ),
    "mixtral": (
        lambda: transformers.MixtralConfig(**WIDE, num_local_experts=8),
        "AutoModelForCausalLM",
        {"model.layers": 3},
        ["model.embed_tokens.weight"],
    ),
    "qwen3 moe": (
        lambda: transformers.Qwen3MoeConfig(**MOE, num_experts=8),
        "AutoModelForCausalLM",
        {"model.layers": 3},
        ["model.embed_tokens.weight"],
    ),
    "vit": (
        lambda: transformers.ViTConfig(**{k: v for k, v in SMALL.items() if k != "vocab_size"}, image_size=32),
        "AutoModelForImageClassification",
        {"vit.layers": 3},
        ["vit.embeddings.patch_embeddings.projection.weight", "vit.embeddings.patch_embeddings.projection.bias"],
    ),
    "swin: the stages' blocks": (
        lambda: transformers.SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[2, 3], num_heads=[1, 2]),
        "AutoModelForImageClassification",
        {"swin.encoder.layers.0.blocks": 2, "swin.encoder.layers.1.blocks": 3},
        None,
    ),
    "clip: two towers": (
        lambda: transformers.CLIPConfig(
            text_config=dict(WIDE, num_hidden_layers=2),
            vision_config={"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8},
        ),
        "AutoModel",
        {"text_model.encoder.layers": 2, "vision_model.encoder.layers": 3},
        ["text_model.embeddings.token_embedding.weight"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_architectures_of_transformers(name: str) -> None:
    config, kind, stacks, embeddings = HUGGING_FACE[name]
    told = structure.describe(hugging_face(config(), kind))
    assert {path: len(blocks) for path, blocks in told["stacks"].items()} == stacks
    assert all(block == f"{stack}.{i}" for stack, of in told["stacks"].items() for i, block in enumerate(of))
    if embeddings is not None:
        assert told["embeddings"] == embeddings


def test_glm_s_own_model() -> None:
    from glm.model.transformer import Transformer

    config = replace(PRESETS["glm-tiny"].model, vocabulary=50)
    told = structure.describe(Transformer(config))
    assert {path: len(blocks) for path, blocks in told["stacks"].items()} == {"layers": config.layers}
    assert told["embeddings"] == ["embedding.weight"]


class Feed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)


class Mixture(nn.Module):
    """A block with more experts than the model has blocks."""

    def __init__(self, experts: int = 8) -> None:
        super().__init__()
        self.norm, self.router = nn.LayerNorm(4), nn.Linear(4, experts)
        self.experts = nn.ModuleList(Feed() for _ in range(experts))


class Model(nn.Module):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def numbers(model: nn.Module) -> list[str]:
    return list(structure.blocks(model))


def test_experts_are_no_blocks() -> None:
    mixture = Model(embed=nn.Embedding(9, 4), layers=nn.ModuleList([Mixture(), Mixture()]))
    assert numbers(mixture) == ["layers.0", "layers.1"]
    assert (
        numbers(Model(embed=nn.Embedding(9, 4), mixture=Mixture())) == []
    )  # nor where there is nothing else


def test_a_plain_mlp_has_as_many_layers_as_linear_ones() -> None:
    mlp = nn.Sequential(
        nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2)
    )  # fmt: skip
    assert numbers(mlp) == ["0", "3", "6"]
    assert numbers(Model(net=mlp)) == ["net.0", "net.3", "net.6"]
    nested = nn.Sequential(
        *(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU()) for _ in range(3)), nn.Linear(4, 2)
    )
    assert numbers(nested) == ["0", "1", "2"]
    # A head of two layers beside real blocks is no second stack.
    assert numbers(Model(layers=nn.ModuleList([Feed(), Feed()]), head=mlp)) == ["layers.0", "layers.1"]


def test_stem_and_head_in_a_sequential_stand_beside_the_blocks() -> None:
    stem, head = nn.Embedding(9, 4), Model(norm=nn.LayerNorm(4), out=nn.Linear(4, 9))
    assert numbers(nn.Sequential(stem, Feed(), Feed(), Feed(), head)) == ["1", "2", "3"]
    assert numbers(nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Sequential(Feed(), Feed()), head)) == [
        "1.0",
        "1.1",
    ]
    torchtitan = Model(tok_embeddings=stem, layers=nn.ModuleDict({str(i): Feed() for i in range(3)}))
    assert numbers(torchtitan) == ["layers.0", "layers.1", "layers.2"]


def test_a_block_alone_and_heads_side_by_side() -> None:
    assert numbers(Model(layers=nn.ModuleList([Feed()]), embed=nn.Embedding(9, 4))) == ["layers.0"]
    heads = nn.ModuleList(Feed() for _ in range(6))
    block = [Model(norm=nn.LayerNorm(4), attention=Model(heads=heads, out=nn.Linear(4, 4))) for _ in range(2)]
    assert numbers(
        Model(blocks=nn.ModuleList(block), lm_heads=nn.ModuleList(nn.Linear(4, 9) for _ in range(5)))
    ) == [
        "blocks.0",
        "blocks.1",
    ]


def test_wrappers_are_looked_through() -> None:
    class DeepSpeedEngine(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    model = Model(layers=nn.ModuleList([Feed(), Feed()]))
    assert structure.bare(DeepSpeedEngine(model)) is model
    assert structure.bare(torch.compile(nn.DataParallel(model), backend="eager")) is model
    model.layers[1] = torch.compile(model.layers[1], backend="eager")
    assert numbers(model) == ["layers.0", "layers.1"]
    assert all(type(block) is Feed for block in structure.blocks(model).values())


def test_linear_layers_and_tied_weights() -> None:
    class ColumnParallelLinear(nn.Module):
        pass

    assert structure.is_linear(ColumnParallelLinear())
    assert not structure.has_known_layout(ColumnParallelLinear())
    attention = nn.MultiheadAttention(8, 2)
    assert not structure.is_linear(attention.out_proj)
    assert list(structure.linear_layers(attention)) == []
    model = Model(embed=nn.Embedding(9, 4), head=nn.Linear(4, 9, bias=False))
    model.head.weight = model.embed.weight
    assert structure.shared_parameters(model) == (("embed.weight", "head.weight"),)


def test_of_several_tables_the_tokens_is_told() -> None:
    model = Model(wpe=nn.Embedding(99, 4), tokens=nn.Embedding(9, 4), segment_embedding=nn.Embedding(2, 4))
    assert list(structure.token_embeddings(model)) == ["tokens"]
    assert list(
        structure.token_embeddings(Model(type_of_word=nn.Embedding(9, 4), pos=nn.Embedding(5, 4)))
    ) == ["type_of_word"]
    assert structure.token_embeddings(Model(net=nn.Linear(3, 3))) == {}


class Scaled(nn.Linear):
    """Another way to write the same product."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + (0 if self.bias is None else self.bias)


class Choosing(nn.Linear):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = super().forward(x)
        return logits, logits.argmax(-1)


class Grouped(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.flip(0), self.bias)


class Needy(nn.Linear):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * mask


def test_subclasses_of_linear_count_where_they_return_the_product() -> None:
    model = nn.ModuleDict(
        {kind.__name__: kind(4, 3) for kind in (nn.Linear, Scaled, Choosing, Grouped, Needy)}
    )
    assert list(structure.linear_layers(model)) == ["Linear", "Scaled"]
    assert all(structure.is_linear(layer) for layer in model.values())
    share, names = structure.weights_outside_layers(model)
    assert names == ["Choosing.weight", "Grouped.weight", "Needy.weight"]
    assert share == 36 / 75
