"""Training steps of our model and of HuggingFace transformers' GPT-NeoX, of equal size, over the same rows.

Both: L layers of width h with a feed-forward of 4h, GELU, rotary positions, pre-LN in parallel blocks, biases, untied embeddings,
dropout off; next-token targets at every position; mean loss, gradient norm clipped at 1, AdamW on fp32 weights with betas .9/.95
and decay .1, torch's fused kernel. GPT-NeoX turns a quarter of each head's dimensions, ours all, and has a second norm in a block:
0.02 % of the parameters. In bf16 ours has bf16 weights beside fp32 masters; GPT-NeoX runs under autocast, as transformers' Trainer
does it.

``glm`` is GLM's own recipe at the same width and depth (DeepNorm, GeGLU, tied embeddings, fp32 softmax) on blank-infilling rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from experiments.data import bilingual
from glm.data.config import ObjectiveConfig
from glm.data.loader import Loader
from glm.data.shards import open_data
from glm.model.config import AttentionConfig, EmbeddingConfig, FeedForwardConfig, ModelConfig
from glm.train.config import BatchConfig, TrainConfig
from glm.train.engine import LocalEngine
from stabilitylab.errors import InputError

RATE = 1e-4
CLIP = 1.0

Contestant = Literal["ours", "gpt-neox", "glm"]
Step = Callable[[int], float]


@dataclass(frozen=True, kw_only=True)
class Size:
    """Size of the model and of its batches."""

    layers: int = 8
    hidden: int = 512
    vocabulary: int = 16_384
    length: int = 512
    rows: int = 4


def rows_of(size: Size, kind: Literal["causal", "glm"], data: Path | None) -> Loader:
    """Rows of the default bilingual text."""
    found = open_data(data or bilingual(Path("data") / "quick"))
    if found.vocabulary > size.vocabulary:
        raise InputError(
            f"the data has {found.vocabulary} pieces, more than --size.vocabulary {size.vocabulary}"
        )
    return Loader(found, ObjectiveConfig(kind=kind), length=size.length, seed=0)


def our_config(
    size: Size, contestant: Contestant, precision: str, *, compiled: bool, recompute: bool
) -> TrainConfig:
    """GPT-NeoX's recipe, or GLM's, as a configuration of ours."""
    model = ModelConfig(
        vocabulary=size.vocabulary,
        length=size.length,
        layers=size.layers,
        hidden=size.hidden,
        heads=max(1, size.hidden // 64),
        recompute=recompute,
    )
    if contestant == "ours":
        model = dataclasses.replace(
            model,
            norm="pre",
            init="gpt2",
            parallel_block=True,
            embedding=EmbeddingConfig(tied=False),
            attention=AttentionConfig(softmax="fused"),
            feed_forward=FeedForwardConfig(kind="gelu"),
        )
    return TrainConfig(
        precision=precision,  # type: ignore[arg-type]
        compile=compiled,
        model=model,
        batch=BatchConfig(rows=size.rows),
    )


def our_step(config: TrainConfig, loader: Loader) -> tuple[nn.Module, Step]:
    """A step of the local engine, as the loop makes it."""
    engine = LocalEngine(config)

    def step(number: int) -> float:
        loss = engine.forward_backward(loader.batch(number, config.batch.rows), number)
        engine.gradients()
        engine.update(RATE, clip=CLIP)
        return loss

    return engine.model, step


def peer_step(
    size: Size, precision: str, loader: Loader, *, compiled: bool, recompute: bool
) -> tuple[nn.Module, Step]:
    """A step of GPT-NeoX as its users write it."""
    try:
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
    except ImportError:
        raise InputError("the comparison needs transformers: pip install 'stabilitylab[bench]'") from None
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.hidden,
            num_hidden_layers=size.layers,
            num_attention_heads=max(1, size.hidden // 64),
            intermediate_size=4 * size.hidden,
            max_position_embeddings=size.length,
            use_cache=False,
        )
    )
    model.train()
    if recompute:
        model.gradient_checkpointing_enable()
    called = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )

    def step(number: int) -> float:
        batch = loader.batch(number, size.rows)
        targets_BT = batch.targets_BT.contiguous()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss: Tensor = called(input_ids=batch.tokens_BT, labels=targets_BT, shift_labels=targets_BT).loss
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return model, step


def contestant_step(
    contestant: Contestant,
    size: Size,
    precision: str,
    data: Path | None,
    *,
    compiled: bool = False,
    recompute: bool = False,
) -> tuple[nn.Module, Step]:
    """The model and the step of one of the three."""
    loader = rows_of(size, "glm" if contestant == "glm" else "causal", data)
    if contestant == "gpt-neox":
        return peer_step(size, precision, loader, compiled=compiled, recompute=recompute)
    return our_step(our_config(size, contestant, precision, compiled=compiled, recompute=recompute), loader)


def flops(size: Size, parameters: int, *, tied: bool, causal: bool) -> float:
    """Multiply-adds x 2 of a step: 6 a weight and token, and 12 T h (half of it if causal) a layer and token for scores."""
    looked_up = 0 if tied else size.vocabulary * size.hidden
    scores = 12 * size.length * size.hidden * size.layers * (0.5 if causal else 1.0)
    return size.rows * size.length * (6.0 * (parameters - looked_up) + scores)


def parameters_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def variants(compiled: bool, eager: bool, recompute: bool) -> Iterator[tuple[str, Contestant, bool, bool]]:
    """Name, contestant, compiled, recomputed; the peer of each pair right behind ours."""
    for wanted, is_compiled in ((eager, False), (compiled, True)):
        if wanted:
            mode = "compiled" if is_compiled else "eager"
            yield f"ours, {mode}", "ours", is_compiled, False
            yield f"gpt-neox, {mode}", "gpt-neox", is_compiled, False
    if eager:
        yield "glm objective, eager", "glm", False, False
    if recompute:
        yield "ours, eager, recomputed", "ours", False, True
