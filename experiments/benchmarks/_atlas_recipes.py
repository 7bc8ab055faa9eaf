"""Recipes of spikes: what is done to a small GPT in training, where, how strongly, and which cause that is.

A recipe does one thing at one step to a run that is healthy without it (or, of the emergent ones, trains with settings that no run
bears for long). The cause is a word of the table in ``stabilitylab/spikes/suspects.py``; emergent recipes have a nominal one, which
forks may contradict.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from experiments.benchmarks._planted import ROWS, Subject
from experiments.benchmarks._planted_models import HEADS, LAYERS, VOCABULARY, WIDTH

Doing = Callable[[Subject], object]
CLIMBS = 40
MATRICES = ("attn.query", "attn.value", "attn.output", "up", "down")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One way to make a spike.

    Attributes:
        name: family, place and strength. family: recipes of one family differ in place and strength. cause: the word for it;
        ``causes``: further ones that are as right. site: the module; "" for what has no place. act: done to weights, moments or
        settings before the step. install: hooks, once. spoil: what becomes of the step's batch. shift: the data are another
        chain's from the step on. rate, beta2, climb: the step's rate over the usual one; the run's beta2; the rate's factor at
        each update from ``CLIMBS`` on. clip: of the gradient norm; 0: none. precision: "fp32", or that of autocast. planted:
        whether it is done at a step, and not a setting of the whole run.
    """

    name: str
    family: str
    cause: str
    causes: tuple[str, ...] = ()
    site: str = ""
    act: Doing | None = None
    install: Doing | None = None
    spoil: Callable[[Tensor], Tensor] | None = None
    shift: bool = False
    rate: float = 1.0
    beta2: float = 0.95
    climb: float = 1.0
    clip: float = 1.0
    precision: str = "fp32"
    planted: bool = True

    @property
    def held_out(self) -> bool:
        """Half of the recipes, by name: nothing is tuned on them."""
        return zlib.crc32(self.name.encode()) % 2 == 1


def _weight(s: Subject, site: str, kind: str = "weight") -> Tensor:
    return s.weights[f"{site}.{kind}"].data


def _scaled(site: str, factor: float, kind: str = "weight") -> Doing:
    return lambda s: _weight(s, site, kind).mul_(factor)


def _put(site: str, value: float) -> Doing:
    def act(s: Subject) -> None:
        flat = _weight(s, site).view(-1)
        flat[flat.numel() // 3] = value

    return act


def _moments(name: str, factor: float, site: str = "") -> Doing:
    def act(s: Subject) -> None:
        names = {id(p): n for n, p in s.model.named_parameters()}
        for p, state in s.optimizer.state.items():
            if names[id(p)].startswith(site):
                state[name].mul_(factor)

    return act


def _setting(name: str, value: Any) -> Doing:
    def act(s: Subject) -> None:
        for group in s.optimizer.param_groups:
            group[name] = value

    return act


def _output(site: str, factor: float) -> Doing:
    def install(s: Subject) -> None:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return output * factor if s.is_on else output

        s.model.get_submodule(site).register_forward_hook(hook)

    return install


def _overflow(site: str) -> Doing:
    def install(s: Subject) -> None:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return (output * 1e5 / output.abs().max()).half().float() if s.once else output

        s.model.get_submodule(site).register_forward_hook(hook)

    return install


def _gradient(site: str, factor: float) -> Doing:
    def install(s: Subject) -> None:
        s.weights[f"{site}.weight"].register_hook(  # type: ignore[no-untyped-call]
            lambda g: g * factor if s.once else g
        )

    return install


def _random(batch: Tensor) -> Tensor:
    dice = torch.Generator().manual_seed(int(batch.sum()))
    return torch.randint(VOCABULARY, batch.shape, generator=dice)


def _rows(count: int, change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda batch: torch.cat([change(batch[:count]), batch[count:]])


def recipes() -> list[Recipe]:
    """All, in the order of their families."""
    return list(_all())


def _all() -> Iterator[Recipe]:
    for block in range(LAYERS):
        yield from _of_block(f"blocks.{block}")
    for factor in (3000.0, 30000.0):
        yield _recipe(
            "embedding row",
            "parameter",
            "embed",
            f"x {factor:g}",
            act=lambda s, f=factor: _weight(s, "embed")[:16].mul_(f),
        )
    for factor in (10.0, 30.0, -1.0):
        yield _recipe("head", "parameter", "head", f"x {factor:g}", act=_scaled("head", factor))
    for factor in (0.0, 1e-6, 1e-8):
        yield _recipe("second moments", "optimizer", "", f"x {factor:g}", act=_moments("exp_avg_sq", factor))
    for factor in (50.0, 100.0, 300.0):
        yield _recipe("first moments", "optimizer", "", f"x {factor:g}", act=_moments("exp_avg", factor))
    for site in ("head", "blocks.0", "blocks.3"):
        yield _recipe(
            "moments of one part", "optimizer", "", f"of {site}", act=_moments("exp_avg", 1000.0, site)
        )
    for factor in (20.0, 40.0, 80.0, 160.0):
        yield _recipe("rate", "learning-rate", "", f"x {factor:g}", rate=factor)
    for value in (30.0, 100.0):
        yield _recipe("weight decay", "optimizer", "", f"to {value:g}", act=_setting("weight_decay", value))
    yield _recipe("first beta", "optimizer", "", "to -0.9", act=_setting("betas", (-0.9, 0.95)))
    constant = lambda x: torch.full_like(x, int(x.flatten()[0]))  # noqa: E731
    for name, spoil in {
        "random": _random,
        "one token": constant,
        "one row eight times": lambda x: x[:1].expand_as(x).flip(1).contiguous(),
        "six rows of one token": _rows(6, constant),
        "four rows at random": _rows(ROWS // 2, _random),
    }.items():
        yield _recipe("batch", "batch", "", name, spoil=spoil)
    yield _recipe("mixture", "batch", "", "another chain", shift=True)
    for climb, clip in itertools.product((1.09, 1.12), (0.0, 1.0)):
        yield _recipe(
            "climbing rate",
            "learning-rate",
            "",
            f"by {climb:g}, clip {clip:g}",
            climb=climb,
            clip=clip,
            planted=False,
        )
    for beta2 in (0.999, 0.9999):
        yield _recipe(
            "large beta2", "optimizer", "", f"{beta2:g}", beta2=beta2, climb=1.09, clip=0.0, planted=False
        )
    yield _recipe("format", "overflow", "", "bf16", precision="bf16", climb=1.09, clip=0.0, planted=False)


def _of_block(block: str) -> Iterator[Recipe]:
    odd = int(block[-1]) % 2
    for factor in (50.0, 200.0):
        yield _recipe(
            "norm gain",
            "parameter",
            f"{block}.ln{1 + odd}",
            f"x {factor:g}",
            act=_scaled(f"{block}.ln{1 + odd}", factor),
        )
    for site in MATRICES:
        path = f"{block}.{site}"
        yield _recipe("weight NaN", "parameter", path, "", act=_put(path, float("nan")))
        yield _recipe("one weight", "parameter", path, "1e4", act=_put(path, 1e4))
    for site, factor in (("attn.query", 300.0), ("attn.output", 30.0), ("down", 30.0), ("up", -3.0)):
        path = f"{block}.{site}"
        yield _recipe("matrix", "parameter", path, f"x {factor:g}", act=_scaled(path, factor))
    value, head = f"{block}.attn.value", WIDTH // HEADS
    yield _recipe("value head", "parameter", value, "x 100", act=lambda s: _weight(s, value)[:head].mul_(100))
    bias = f"{block}.up"
    yield _recipe("bias", "parameter", bias, "+ 30", act=lambda s: _weight(s, bias, "bias").add_(30))
    for site in ("up", "attn.output"):
        path = f"{block}.{site}"
        yield _recipe("overflow", "overflow", path, "", install=_overflow(path))
    for site, factor in (("down", 50.0), ("attn.output", 100.0), ("ln1", 50.0)):
        path = f"{block}.{site}"
        yield _recipe(
            "output",
            "activation",
            path,
            f"x {factor:g}",
            install=_output(path, factor),
            causes=("attention",) * (site == "ln1"),
        )
    query = f"{block}.attn.query"
    yield _recipe(
        "query output", "attention", query, "x 300", install=_output(query, 300.0), causes=("activation",)
    )
    path = f"{block}.down"
    yield _recipe("one gradient", "gradient", path, "x 1e6", install=_gradient(path, 1e6))


def _recipe(family: str, cause: str, site: str, strength: str, **fields: Any) -> Recipe:
    name = " ".join(part for part in (family, site, strength) if part)
    return Recipe(name=name, family=family, cause=cause, site=site, **fields)
