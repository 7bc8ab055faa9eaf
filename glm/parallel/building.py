"""One rank's part of a model, drawn without ever holding the whole.

Every rank draws all weights in the order in which one process does, from the same generator, and keeps what it holds; so initial
weights are the same bits under any topology. One whole layer, or the whole embedding, is in memory at a time.

One process also spends random numbers on the values that ``nn.Linear`` draws when it is made, before the model draws its own; they
are spent here too.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from glm.model.block import Block
from glm.model.config import ModelConfig
from glm.model.initialise import initialise_block, initialise_embedding
from glm.model.layers import Linear
from glm.model.transformer import Transformer
from glm.parallel.partition import Cut, stage_of
from glm.parallel.tensor import VocabularyEmbedding, cut_block

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def shapes_of(config: ModelConfig) -> dict[str, torch.Size]:
    """Of every parameter of the whole model, by name, in its order."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in Transformer(config).named_parameters()}


def build(
    config: ModelConfig, *, stage: int, stages: int, tensor: dist.ProcessGroup | None, seed: int
) -> Transformer:
    """What one rank computes, in fp32 on the host, under the names that the whole model has for it.

    Args:
        config: the model.
        stage, stages: which of how many.
        tensor: the ranks that share each layer; None: no other.
        seed: of the initial weights.
    """
    torch.manual_seed(seed)
    for number in range(config.layers):
        Block(config, number)
    if not config.embedding.tied:
        Linear(config.hidden, config.vocabulary or 0, bias=False)
    with torch.device("meta"):
        model = Transformer(config)
    is_first, is_last = stage == 0, stage == stages - 1

    embedding = _real(model.embedding)
    initialise_embedding(embedding.weight, config)
    if is_first or (is_last and config.embedding.tied):
        model.embedding = embedding if tensor is None else VocabularyEmbedding(embedding, Cut(dim=0), tensor)
    else:
        del model.embedding
    if model.positions is not None:
        positions = nn.Parameter(torch.empty(model.positions.shape))
        initialise_embedding(positions, config)
        model.positions = positions if is_first else None
    if model.embedding_norm is not None:
        model.embedding_norm = _real(model.embedding_norm) if is_first else None
    for number in range(config.layers):
        block = model.layers[number]
        assert isinstance(block, Block)
        initialise_block(_real(block), config)
        if stage_of(f"layers.{number}", config, stages) != stage:
            # Something keeps the place, so that every layer keeps its number, by which telemetry knows it.
            model.layers[number] = nn.Identity()
        elif tensor is not None:
            cut_block(block, tensor)
    if model.final_norm is not None:
        model.final_norm = _real(model.final_norm) if is_last else None
    if model.projection is not None:
        projection = _real(model.projection)
        initialise_embedding(projection.weight, config)
        if is_last and tensor is not None:
            rank, size = dist.get_rank(tensor), dist.get_world_size(tensor)
            projection.weight = nn.Parameter(Cut(dim=0).part(projection.weight.detach(), rank, size))
        model.projection = projection if is_last else None
    return model


def _real(module: ModuleT) -> ModuleT:
    """A module on the host instead of the meta device; its matrices are still to be drawn."""
    module.to_empty(device="cpu")
    for one in module.modules():
        if isinstance(one, nn.LayerNorm):
            one.reset_parameters()
    return module
