"""The small GPT of the planted causes as a loop to fork, with a recipe in it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.benchmarks._atlas_recipes import AGED, CLIMBS, RATE, Recipe
from experiments.benchmarks._planted import Subject, tokens
from experiments.benchmarks._planted_models import GPT, LAYERS

_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


class AtlasLoop:
    """Ten lines of training that apply the recipe at update ``planted``.

    A plant belongs to its update, a spoiled batch to its index: a fork without the batch is rid of it, and a fork without another
    batch is rid of nothing else.
    """

    def __init__(self, recipe: Recipe | None, seed: int, planted: int, *, layers: int = LAYERS) -> None:
        self.recipe, self.seed, self.planted = recipe or Recipe(name="", family="", cause=""), seed, planted
        torch.manual_seed(seed)
        self.model: nn.Module = GPT(layers)
        of = self.recipe
        # One kernel for all tensors: a quarter of a small model's step otherwise.
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=RATE, betas=(0.9, of.beta2), fused=True
        )
        self.subject = Subject(
            model=self.model,
            weights=dict(self.model.named_parameters()),
            optimizer=self.optimizer,
            parts=GPT.parts,
        )
        self.step = 0
        # Measures of the weights on the way, by step.
        self.measures: dict[int, dict[str, float]] = {}
        if of.install is not None:
            of.install(self.subject)

    def state_dict(self) -> Any:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}

    def load_state_dict(self, state: Any) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def batch(self, index: int) -> Tensor:
        """[ROWS, LENGTH + 1]"""
        of = self.recipe
        batch = chain(self.seed, index)
        if of.shift is not None and index >= self.planted:
            batch = of.shift(batch)
        return of.spoil(batch) if of.spoil is not None and index == self.planted else batch

    def loss(self, batch: Tensor) -> Tensor:
        narrow = _PRECISIONS.get(self.recipe.precision)
        with torch.autocast("cpu", narrow) if narrow is not None else contextlib.nullcontext():
            logits = self.model(batch[:, :-1])
        return cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())

    def train_step(self, index: int) -> float:
        return self.train_step_without(index, ())

    def train_step_without(self, index: int, rows: Sequence[int]) -> float:
        of, s = self.recipe, self.subject
        s.is_on, s.once = self.step >= self.planted, self.step == self.planted
        if of.aged and self.step == AGED:
            age(self.optimizer)
        if s.once and of.act is not None:
            with torch.no_grad():
                of.act(s)
        if s.once:
            self.optimizer.param_groups[0]["lr"] *= of.rate
        if of.climb != 1.0 and self.step >= CLIMBS:
            self.optimizer.param_groups[0]["lr"] *= of.climb
        batch = self.batch(index)
        if rows:
            batch = batch[[row for row in range(len(batch)) if row not in rows]]
        self.optimizer.zero_grad()
        loss = self.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        if of.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), of.clip)
        self.optimizer.step()
        self.step += 1
        return float(loss.detach())

    def row_losses(self, index: int) -> list[tuple[float, float]]:
        found = []
        for row in self.batch(index):
            loss = self.loss(row[None])
            gradients = torch.autograd.grad(loss, list(self.model.parameters()), allow_unused=True)
            norm = torch.stack([torch.linalg.vector_norm(g) for g in gradients if g is not None]).norm()
            found.append((float(loss.detach()), float(norm)))
        return found


@torch.no_grad()
def age(optimizer: torch.optim.Optimizer, updates: float = 1e6) -> None:
    """Correct the moments' bias, and set a count of updates at which none is left, as after a long run like this."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state[p]
            for name, beta in zip(("exp_avg", "exp_avg_sq"), group["betas"], strict=True):
                state[name].div_(1 - beta ** float(state["step"]))
            state["step"].fill_(updates)


@functools.lru_cache(maxsize=4096)
def chain(seed: int, index: int) -> Tensor:
    """[ROWS, LENGTH + 1] of the healthy chain; read only."""
    return tokens(seed, index)
