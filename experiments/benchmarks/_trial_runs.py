"""Runs across a frontier, which measure every rival precursor at every second step.

The small GPT of the spike atlas trains 40 steps at 3e-3; then for 90 more steps something grows, by a factor per step and up to a
plateau, both drawn from the seed:

    rate      the learning rate: 1.04 to 1.2 a step, up to .006 to .6, of seeds from 1,000 on .1 to .6
    noise     noise in a block's output, from .01 of its RMS: 1.1 to 1.3 a step, up to .3 to 30
    decay     the weight decay, from .01: 1.1 to 1.3 a step, up to 1 to 300
    format    the scale at which an up projection's output is rounded to fp16, undone after it: 1.1 to 1.4 a step, up to 1e2 to 1e6

(all log-uniform). Some collapse, some do not, and both see something rise: a warning must tell them apart. The seed also draws clip
0 or 1 and beta2 .95, .99 or .999.

    gradient norm     global, before clipping                                        GLM-130B, 2210.02414; OLMo 2, 2501.00656
    update norm       RMS of the change of all weights over the rate                 Marin's 32B log
    kurtosis          the largest of a block's output, E x^4 / (E x^2)^2              2402.17762, 2405.19279
    stable rank       the smallest of a matrix, |W|^2 / sigma^2, power iteration      MSign, 2602.01734
    QK entropy        the smallest entropy of the singular values of a query's or key's update     2606.28116
    margin            (2 + 2 b1) / ((1 - b1) rate) over the curvature along the update             2207.14484, 2506.04805
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.benchmarks._atlas_loop import AtlasLoop
from experiments.benchmarks._atlas_recipes import Recipe
from experiments.trial import collapse_onset
from stabilitylab.probes.base import Context
from stabilitylab.probes.curvature import CurvatureProbe
from stabilitylab.probes.weights import WeightProbe
from stabilitylab.statistics.buffer import Buffer

CALM, CLIMBING, EVERY = 40, 90, 2
# Seeds from here on draw plateaus of .1 and more: a quarter of the others collapse.
MOSTLY_LOST = 1000
NAMES = ("gradient norm", "update norm", "kurtosis", "stable rank", "QK entropy", "margin")


# Factor per step, and plateau, from and to.
_GROWS = {
    "rate": ((1.04, 1.2), (6e-3, 0.6)),
    "noise": ((1.1, 1.3), (0.3, 30.0)),
    "decay": ((1.1, 1.3), (1.0, 300.0)),
    "format": ((1.1, 1.4), (1e2, 1e6)),
}
CAUSES = tuple(_GROWS)


def run(seed: int, cause: str = "rate") -> dict[str, Any]:
    """One run: its loss, its collapse, each precursor by step, and each one's cost (milliseconds per measurement)."""
    dice = np.random.default_rng(seed)
    steps, plateaus = _GROWS[cause]
    climb = float(np.exp(dice.uniform(*np.log(steps))))
    lowest = 0.1 if cause == "rate" and seed >= MOSTLY_LOST else plateaus[0]
    plateau = float(np.exp(dice.uniform(np.log(lowest), np.log(plateaus[1]))))
    clip, beta2 = float(dice.choice([0.0, 1.0])), float(dice.choice([0.95, 0.99, 0.999]))
    recipe = Recipe(name="climb", family="trial", cause="learning-rate", clip=0.0, beta2=beta2, planted=False)
    loop = AtlasLoop(recipe, seed, 10**9)
    watch, fault = Watch(loop), Fault(loop, cause, climb, plateau)
    loss: list[float] = []
    for step in range(CALM + CLIMBING):
        fault.grow(step)
        loss.append(watch.step(step, clip))
        if not math.isfinite(loss[-1]):
            break
        if len(loss) > CALM + 10 and not np.median(loss[-10:]) <= min(loss) + 3.0:
            break
    onset = collapse_onset(np.array(loss), ended=len(loss) < CALM + CLIMBING)
    return {
        "seed": seed,
        "cause": cause,
        "climb": climb,
        "plateau": plateau,
        "clip": clip,
        "beta2": beta2,
        "loss": loss,
        "onset": onset,
        "scores": {name: watch.found[name] for name in NAMES},
        "milliseconds": {name: 1e3 * watch.took[name] / max(1, watch.measured) for name in NAMES},
    }


class Fault:
    """What grows; see the module's docstring."""

    def __init__(self, loop: AtlasLoop, cause: str, climb: float, plateau: float) -> None:
        self._group, self._cause, self._climb, self._plateau = (
            loop.optimizer.param_groups[0],
            cause,
            climb,
            plateau,
        )
        self._size = 1.0
        of = {"noise": ("blocks.1", self._noisy), "format": ("blocks.1.up", self._rounded)}
        if cause in of:
            site, hook = of[cause]
            loop.model.get_submodule(site).register_forward_hook(hook)

    def grow(self, step: int) -> None:
        """Before each step."""
        start = {"rate": 3e-3, "decay": 0.01, "noise": 0.01}.get(self._cause, 1.0)
        self._size = min(self._plateau, start * self._climb ** max(0, step - CALM))
        name = {"rate": "lr", "decay": "weight_decay"}.get(self._cause)
        if name is not None:
            self._group[name] = self._size

    def _noisy(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        rms = output.detach().square().mean().sqrt()
        return output + torch.randn(output.shape) * (self._size * rms)

    def _rounded(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return (output * self._size).half().float() / self._size


class Watch:
    """Trains a step and measures."""

    def __init__(self, loop: AtlasLoop) -> None:
        self.loop, self.found, self.took = (
            loop,
            defaultdict[str, dict[int, float]](dict),
            defaultdict[str, float](float),
        )
        self.measured = 0
        self._named = dict(loop.model.named_parameters())
        self._matrices = {name: p for name, p in self._named.items() if p.dim() == 2 and "embed" not in name}
        self._ranks = WeightProbe()
        self._outputs: list[Tensor] = []
        blocks: Any = loop.model.blocks
        self._hooks = [
            block.register_forward_hook(lambda module, args, out: self._outputs.append(out.detach()))
            for block in blocks
        ]
        context = Context(model=loop.model, parameters=self._named, optimizer=loop.optimizer, buffer=Buffer())
        self._curvature = CurvatureProbe(self._backward)
        self._curvature.attach(context)
        self._context = context
        self._batch = loop.batch(0)

    def close(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()

    def _backward(self) -> None:
        self.loop.loss(self._batch).backward()  # type: ignore[no-untyped-call]

    def step(self, step: int, clip: float) -> float:
        loop, due = self.loop, step % EVERY == 0 and step >= CALM // 2
        self._batch = loop.batch(step)
        self._outputs.clear()
        loop.optimizer.zero_grad()
        loss = loop.loss(self._batch)
        loss.backward()  # type: ignore[no-untyped-call]
        outputs = list(self._outputs)
        gradients = {name: p.grad for name, p in self._named.items() if p.grad is not None}
        self.measured += due
        if due:
            self._timed(step, "gradient norm", lambda: float(_norm(list(gradients.values()))))
            self._timed(step, "kurtosis", lambda: max(_kurtosis(x) for x in outputs))
            self._timed(step, "stable rank", self._stable_rank)
            self._timed(step, "margin", lambda: self._margin(gradients))
        before = [p.detach().clone() for p in self._named.values()] if due else []
        if clip:
            nn.utils.clip_grad_norm_(loop.model.parameters(), clip)
        loop.optimizer.step()
        if due:
            rate = loop.optimizer.param_groups[0]["lr"]
            moved = [p.detach() - old for p, old in zip(self._named.values(), before, strict=True)]
            self._timed(step, "update norm", lambda: float(_norm(moved)) / rate)
            changes = [
                m
                for name, m in zip(self._named, moved, strict=True)
                if "query.weight" in name or "key.weight" in name
            ]
            self._timed(step, "QK entropy", lambda: min(_entropy(m) for m in changes))
        return float(loss.detach())

    def _timed(self, step: int, name: str, measure: Callable[[], float]) -> None:
        began = time.process_time()
        value = measure()
        self.took[name] += time.process_time() - began
        if value == value:
            self.found[name][step] = value

    def _stable_rank(self) -> float:
        ranks = []
        for name, p in self._matrices.items():
            sigma = self._ranks._sigma(name, p.detach())
            ranks.append(p.detach().square().sum() / sigma.square())
        return float(torch.stack(ranks).min())

    def _margin(self, gradients: dict[str, Tensor]) -> float:
        self._context.buffer.advance()
        self._curvature._armed = True
        self._curvature.gradients(gradients, {}, 1.0)
        slots = self._curvature._slots
        if slots is None or slots.stamp != self._context.buffer.stamp:
            return math.nan
        curvature, threshold = self._context.buffer.view(slots).tolist()
        return threshold / curvature if curvature > 0 else math.inf


def _norm(several: list[Tensor]) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(several)))
    return norm


def _kurtosis(x: Tensor) -> float:
    square = x.square()
    return float(square.square().mean() / square.mean().square())


def _entropy(change: Tensor) -> float:
    if not bool(torch.isfinite(change).all()):
        return math.nan
    share = torch.linalg.svdvals(change)
    share = share / share.sum().clamp_min(1e-30)
    return float(-(share * share.clamp_min(1e-30).log()).sum())
