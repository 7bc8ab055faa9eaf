"""Held-out perplexity, by objective and language.

    perplexity = exp(sum of -log P(target) / targets)

over the held-out split's rows as ``glm.data.loader`` makes them: [gMASK] rows, [MASK] rows, multi-task rows, or next tokens,
whichever the model was trained on. Targets of different objectives do not compare: the model sees both sides of [MASK] ones, which
makes them easier. Rows are functions of a seed, so two models of one tokenizer see the same rows.

Limits: perplexities are per token, so they compare only models of one tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from glm.data.config import DataConfig, ObjectiveConfig
from glm.data.loader import Loader
from glm.data.shards import TokenData
from glm.errors import InputError
from glm.inference.loading import OpenedModel
from glm.model.vocabulary_loss import vocabulary_loss

SEED = 0
BATCH_TOKENS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """Perplexity of one objective in one language.

    Attributes:
        objective: "[gMASK]", "[MASK]", "multi-task" or "next token".
        language: "" for all, or where it is unknown.
        targets: number of predicted tokens.
        loss: mean -log P, in nats.
    """

    objective: str
    language: str
    targets: int
    loss: float

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that is too large for a number."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def perplexities(opened: OpenedModel, data: TokenData, *, rows: int) -> list[Perplexity]:
    """Perplexity of each objective that the model was trained on, in each language of the held-out split.

    Raises:
        InputError: the split is too short for one row.
    """
    if not data.shards["heldout"]:
        raise InputError(f"{data.path} holds nothing out: make it with glm shards --heldout of more than 0")
    length = opened.model.config.length
    languages: dict[str, int] = {}
    for shard in data.shards["heldout"]:
        languages[shard.language] = languages.get(shard.language, 0) + shard.tokens
    # A row reads one token more than it has. A language shorter than a row has no perplexity.
    apart = [language for language, tokens in sorted(languages.items()) if language and tokens > length + 1]
    found = []
    for name, objective in _objectives(opened.config.objective, data).items():
        for language in [""] if name == "multi-task" or len(apart) < 2 else apart:
            mixture = DataConfig(mixture=((language, 1.0),) if language else ())
            loader = Loader(data, objective, mixture, length=length, seed=SEED, split="heldout")
            most = rows if name == "multi-task" else min(rows, sum(loader.blocks.values()))
            total, targets = _loss(opened, loader, most)
            found.append(Perplexity(objective=name, language=language, targets=targets, loss=total / targets))
    return found


def _objectives(trained: ObjectiveConfig, data: TokenData) -> Mapping[str, ObjectiveConfig]:
    if trained.kind == "causal":
        return {"next token": trained}
    masks = replace(trained, gmask_share=0.0, multitask_share=0.0)
    found = {"[MASK]": masks}
    if trained.kind == "glm":
        found["[gMASK]"] = replace(masks, gmask_share=1.0)
    if "heldout" in data.tasks:
        found["multi-task"] = replace(masks, multitask_share=1.0)
    return found


@torch.inference_mode()
def _loss(opened: OpenedModel, loader: Loader, rows: int) -> tuple[float, int]:
    """Sum of -log P over the loader's first rows, and the number of targets."""
    model = opened.model
    device = model.embedding.weight.device
    total, targets = 0.0, 0
    step = max(1, BATCH_TOKENS // loader.length)
    for first in range(0, rows, step):
        batch = loader.samples(range(first, min(rows, first + step)))
        inputs = (batch.tokens_BT, batch.positions, batch.segments_BT, batch.context_BT)
        hidden_BTC = model.hidden(*(part.to(device) for part in inputs))
        chosen_BT = batch.targets_BT >= 0
        target_N = batch.targets_BT[chosen_BT].to(device)
        # Without z-loss, a term of training and not of the likelihood.
        hidden_NC, cap = hidden_BTC[chosen_BT.to(device)], model.config.logit_cap
        total += float(vocabulary_loss(hidden_NC, model.output_weight(), target_N, 0.0, cap))
        targets += target_N.numel()
    return total, targets
