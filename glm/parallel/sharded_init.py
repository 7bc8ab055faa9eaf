"""Draws one rank's part of a model without ever holding the whole.

A weight is a function of (seed, its name) (``glm.model.initialise``), so a rank draws the tensors of its stage, each whole, and
keeps its part: initial weights are the same bits under any topology. It holds one whole layer, or the whole embedding, at a time.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from glm.model.block import Block
from glm.model.config import ModelConfig
from glm.model.initialise import initialise_block, initialise_embedding
from glm.model.norms import NORMS
from glm.model.transformer import Transformer
from glm.parallel.partition import Cut, stage_of
from glm.parallel.tensor import VocabularyEmbedding, cut_block

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def shapes_of(config: ModelConfig) -> dict[str, torch.Size]:
    """Shape of every parameter of the whole model, by name, in the model's order."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in Transformer(config).named_parameters()}


def build(
    config: ModelConfig, *, stage: int, stages: int, tensor: dist.ProcessGroup | None, seed: int
) -> Transformer:
    """One rank's part of the model, in fp32 on the host, under the whole model's names.

    Args:
        config: the model.
        stage, stages: its stage, and how many there are.
        tensor: the ranks that share each layer; None: no other.
        seed: of the initial weights.
    """
    with torch.device("meta"):
        model = Transformer(config)
    is_first, is_last = stage == 0, stage == stages - 1

    if is_first or (is_last and config.embedding.tied):
        embedding = _real(model.embedding)
        initialise_embedding(embedding.weight, config, seed, "embedding.weight")
        model.embedding = embedding if tensor is None else VocabularyEmbedding(embedding, Cut(dim=0), tensor)
    else:
        del model.embedding
    if model.positions is not None:
        positions = nn.Parameter(torch.empty(model.positions.shape)) if is_first else None
        if positions is not None:
            initialise_embedding(positions, config, seed, "positions")
        model.positions = positions
    if model.embedding_norm is not None:
        model.embedding_norm = _real(model.embedding_norm) if is_first else None
    for number in range(config.layers):
        block = model.layers[number]
        assert isinstance(block, Block)
        if stage_of(name := f"layers.{number}", config, stages) != stage:
            # A placeholder, so that every layer keeps its number, by which telemetry knows it.
            model.layers[number] = nn.Identity()
            continue
        initialise_block(_real(block), config, seed, name)
        if tensor is not None:
            cut_block(block, tensor)
    if model.final_norm is not None:
        model.final_norm = _real(model.final_norm) if is_last else None
    if model.projection is not None and is_last:
        projection = _real(model.projection)
        initialise_embedding(projection.weight, config, seed, "projection.weight")
        if tensor is not None:
            rank, size = dist.get_rank(tensor), dist.get_world_size(tensor)
            projection.weight = nn.Parameter(Cut(dim=0).part(projection.weight.detach(), rank, size))
        model.projection = projection
    else:
        model.projection = None
    return model


def _real(module: ModuleT) -> ModuleT:
    """A module on the host instead of the meta device, its matrices not yet drawn."""
    for one in module.modules():
        # Not by ``to_empty``: on the meta device torch's empty_like uses symbolic shapes, and imports SymPy for them.
        for name, parameter in list(one.named_parameters(recurse=False)):
            real = torch.empty(parameter.shape, dtype=parameter.dtype)
            setattr(one, name, nn.Parameter(real, requires_grad=parameter.requires_grad))
        for name, buffer in list(one.named_buffers(recurse=False)):  # biases of routers begin at 0
            setattr(one, name, torch.zeros(buffer.shape, dtype=buffer.dtype))
        if isinstance(one, NORMS):
            one.reset_parameters()
    return module
