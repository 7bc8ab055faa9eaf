"""The small GPT of the planted causes as a loop that can be forked, with a recipe in it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.benchmarks._atlas_recipes import CLIMBS, Recipe
from experiments.benchmarks._planted import Subject, tokens
from experiments.benchmarks._planted_models import GPT

_OTHER_CHAIN = 12_345_678


class AtlasLoop:
    """Ten lines of training, at whose update ``planted`` the recipe is done.

    What is planted belongs to the update that is made, a spoiled batch to its index: a fork that leaves the batch out is rid of it,
    and one that leaves another batch out is not rid of anything else.
    """

    def __init__(self, recipe: Recipe | None, seed: int, planted: int) -> None:
        self.recipe, self.seed, self.planted = recipe or Recipe(name="", family="", cause=""), seed, planted
        torch.manual_seed(seed)
        self.model: nn.Module = GPT()
        of = self.recipe
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3, betas=(0.9, of.beta2))
        self.subject = Subject(
            model=self.model,
            weights=dict(self.model.named_parameters()),
            optimizer=self.optimizer,
            parts=GPT.parts,
        )
        self.step = 0
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
        shifted = of.shift and index >= self.planted
        batch = tokens(self.seed, index)
        if shifted:  # the same chain, spoken backwards
            batch = batch.flip(1).contiguous()
        return of.spoil(batch) if of.spoil is not None and index == self.planted else batch

    def loss(self, batch: Tensor) -> Tensor:
        half = self.recipe.precision == "bf16"
        with torch.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext():
            logits = self.model(batch[:, :-1])
        return cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())

    def train_step(self, index: int) -> float:
        return self.train_step_without(index, ())

    def train_step_without(self, index: int, rows: Sequence[int]) -> float:
        of, s = self.recipe, self.subject
        s.is_on, s.once = self.step >= self.planted, self.step == self.planted
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
