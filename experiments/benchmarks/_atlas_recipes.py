"""Recipes of spikes: what they do to a small GPT in training, where, how strongly, and which cause that is.

A recipe does one thing at one step to a run that is healthy without it (emergent recipes train with settings that no run bears for
long). The cause is a word of the table in ``stabilitylab/spikes/suspects.py``; emergent recipes have a nominal one, which forks may
contradict.
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
from experiments.benchmarks._planted_models import HEADS, VOCABULARY, WIDTH

Doing = Callable[[Subject], object]
# Blocks of the atlas' model, its usual rate, the updates from which climbing rates climb and at which moments age.
BLOCKS, RATE, CLIMBS, AGED = 3, 3e-3, 40, 24
MATRICES = ("attn.value", "attn.output", "up", "down")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One way to make a spike.

    Attributes:
        name: family, place and strength. family: recipes of one family differ in place and strength. cause: the word for it;
        ``causes``: further ones that are as right. site: the module; "" for what has no place. act: done to weights, moments or
        settings before the step. install: hooks, once. spoil: what becomes of the step's batch. shift: what becomes of it and of
        all that follow. rate: the step's over the usual one. beta2: the run's. aged: from update ``AGED`` on the moments are those
        of a run of a million updates. climb: the rate's factor at each update from ``CLIMBS`` on. clip: of the gradient norm; 0:
        none. precision: "fp32", or that of autocast. planted: whether it is done at a step, and not a setting of the whole run;
        ``lasts``: it continues after its step.
    """

    name: str
    family: str
    cause: str
    causes: tuple[str, ...] = ()
    site: str = ""
    act: Doing | None = None
    install: Doing | None = None
    spoil: Callable[[Tensor], Tensor] | None = None
    shift: Callable[[Tensor], Tensor] | None = None
    rate: float = 1.0
    beta2: float = 0.95
    aged: bool = False
    climb: float = 1.0
    clip: float = 1.0
    precision: str = "fp32"
    planted: bool = True
    lasts: bool = False

    @property
    def passes(self) -> bool:
        """Whether the plant is over after its step, so that the rest is the run's own."""
        return self.planted and not self.lasts and self.shift is None and self.rate == 1.0

    @property
    def held_out(self) -> bool:
        """Half of the recipes, by name: we tune nothing on them."""
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


def _backward(site: str, factor: float) -> Doing:
    """Scale the gradient of a module's output, once."""

    def install(s: Subject) -> None:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if output.requires_grad and s.once:
                output.register_hook(lambda g: g * factor)  # type: ignore[no-untyped-call]

        s.model.get_submodule(site).register_forward_hook(hook)

    return install


def _scale(site: str, factor: float) -> Doing:
    """A linear layer at another scale, which a power of two undoes after it: it changes only narrow formats."""

    def install(s: Subject) -> None:
        layer = s.model.get_submodule(site)

        def before(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
            return (args[0].float() * factor,) if s.is_on else None

        def after(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            bias = s.weights.get(f"{site}.bias", torch.zeros(()))
            return (output.float() - bias) / factor + bias if s.is_on else None

        layer.register_forward_pre_hook(before)
        layer.register_forward_hook(after)

    return install


def _random(batch: Tensor) -> Tensor:
    dice = torch.Generator().manual_seed(int(batch.sum()))
    return torch.randint(VOCABULARY, batch.shape, generator=dice)


def _constant(batch: Tensor) -> Tensor:
    return torch.full_like(batch, int(batch.flatten()[0]))


def _rows(count: int, change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda batch: torch.cat([change(batch[:count]), batch[count:]])


def _backwards(batch: Tensor) -> Tensor:
    return batch.flip(1).contiguous()


_NAMES = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(11))

# Ways to spoil a batch.
_SPOILED: dict[str, Callable[[Tensor], Tensor]] = {
    "random": _random,
    "one token": _constant,
    "one row eight times": lambda x: x[:1].expand_as(x).flip(1).contiguous(),
    "six rows of one token": _rows(6, _constant),
    "four rows at random": _rows(ROWS // 2, _random),
    "two rows at random": _rows(2, _random),
    "backwards": _backwards,
    "other names": lambda x: _NAMES[x],
    "two tokens in turn": lambda x: x[:1, :2].repeat(ROWS, x.shape[1] // 2 + 1)[:, : x.shape[1]].contiguous(),
}
# Other data from a step on.
_SHIFTED: dict[str, Callable[[Tensor], Tensor]] = {
    "backwards": _backwards,
    "other names": lambda x: _NAMES[x],
    "six rows backwards": _rows(6, _backwards),
    "four rows of other names": _rows(4, lambda x: _NAMES[x]),
}


def recipes() -> list[Recipe]:
    """All recipes, in the order of their families."""
    return list(_all())


def _all() -> Iterator[Recipe]:
    for block in range(BLOCKS):
        yield from _of_block(f"blocks.{block}")
    for count in (8, 16, 24):
        act = lambda s, n=count: _weight(s, "embed")[:n].copy_(30 * _weight(s, "embed")[32 : 32 + n])  # noqa: E731
        yield _recipe("embedding rows", "parameter", "embed", f"{count} of others", act=act)
    for factor in (10.0, 30.0, -1.0):
        yield _recipe("head", "parameter", "head", f"x {factor:g}", act=_scaled("head", factor))
    for factor in (0.0, 1e-6, 1e-8):
        yield _recipe("second moments", "optimizer", "", f"x {factor:g}", act=_moments("exp_avg_sq", factor))
    for factor in (-30.0, 50.0, 100.0, 300.0):
        yield _recipe("first moments", "optimizer", "", f"x {factor:g}", act=_moments("exp_avg", factor))
    for site in ("head", *(f"blocks.{block}" for block in range(BLOCKS))):
        yield _recipe(
            "moments of one part", "optimizer", "", f"of {site}", act=_moments("exp_avg", 1000.0, site)
        )
    for factor in (20.0, 40.0, 80.0, 160.0):
        yield _recipe("rate", "learning-rate", "", f"x {factor:g}", rate=factor)
    for value in (30.0, 100.0, 300.0):
        yield _recipe(
            "weight decay", "optimizer", "", f"to {value:g}", act=_setting("weight_decay", value), lasts=True
        )
    for value in (-0.9, -0.95, -0.99):
        yield _recipe(
            "first beta", "optimizer", "", f"to {value:g}", act=_setting("betas", (value, 0.95)), lasts=True
        )
    for name, change in _SPOILED.items():
        yield _recipe("batch", "batch", "", name, spoil=change)
    for name, change in _SHIFTED.items():
        yield _recipe("mixture", "batch", "", name, shift=change)
    for climb, clip in itertools.product((1.15, 1.2), (0.0, 1.0)):
        name = f"by {climb:g}, clip {clip:g}"
        yield _recipe("climbing rate", "learning-rate", "", name, climb=climb, clip=clip, planted=False)
    # The same climb is too much at the usual beta2 and format too: the rate is at fault.
    for beta2 in (0.999, 0.9999):
        yield _recipe(
            "large beta2", "learning-rate", "", f"{beta2:g}", beta2=beta2, climb=1.15, clip=0.0, planted=False
        )
    yield _recipe(
        "format", "learning-rate", "", "bf16", precision="bf16", climb=1.15, clip=0.0, planted=False
    )


def _of_block(block: str) -> Iterator[Recipe]:
    odd = int(block[-1]) % 2
    norm = f"{block}.ln{1 + odd}"
    for factor in (50.0, 200.0):
        yield _recipe("norm gain", "parameter", norm, f"x {factor:g}", act=_scaled(norm, factor))
    for site in MATRICES:
        path = f"{block}.{site}"
        yield _recipe("weight NaN", "parameter", path, "", act=_put(path, float("nan")))
        yield _recipe("one weight", "parameter", path, "1e4", act=_put(path, 1e4))
    for site, factor in (("attn.query", 1e25), ("attn.output", 30.0), ("down", 30.0), ("up", -3.0)):
        path = f"{block}.{site}"
        yield _recipe("matrix", "parameter", path, f"x {factor:g}", act=_scaled(path, factor))
    value, head = f"{block}.attn.value", WIDTH // HEADS
    yield _recipe("value head", "parameter", value, "x 100", act=lambda s: _weight(s, value)[:head].mul_(100))
    bias = f"{block}.up"
    yield _recipe("bias", "parameter", bias, "+ 30", act=lambda s: _weight(s, bias, "bias").add_(30))
    for site in ("up", "attn.output"):
        path = f"{block}.{site}"
        yield _recipe("overflow", "overflow", path, "", install=_overflow(path))
    for site in ("up", "down", "attn.value"):
        path = f"{block}.{site}"
        # Sums of some tens of numbers leave fp16, beyond 65504.
        yield _recipe(
            "fp16 scale",
            "overflow",
            path,
            "x 2^16",
            install=_scale(path, 2.0**16),
            precision="fp16",
            lasts=True,
        )
    for site, factor in (("down", 50.0), ("attn.output", 100.0), ("ln1", 50.0)):
        path = f"{block}.{site}"
        yield _recipe(
            "output",
            "activation",
            path,
            f"x {factor:g}",
            install=_output(path, factor),
            lasts=True,
            causes=("attention",) * (site == "ln1"),
        )
    query = f"{block}.attn.query"
    yield _recipe(
        "query output",
        "attention",
        query,
        "x 1e25",
        install=_output(query, 1e25),
        lasts=True,
        causes=("activation",),
    )
    # Second moments with a long memory, in a run as old as that memory: one gradient moves weights for tens of updates. A short
    # memory adapts to it.
    for site, beta2 in itertools.product(("up", "down", "attn.value"), (0.999, 0.9999)):
        path = f"{block}.{site}"
        own: dict[str, Any] = {"beta2": beta2, "aged": True, "clip": 0.0}
        strength = f"x 1e6, beta2 {beta2:g}"
        if beta2 > 0.999 and site != "attn.value":
            yield _recipe("one gradient", "gradient", path, strength, install=_gradient(path, 1e6), **own)
        yield _recipe("backward", "gradient", path, strength, install=_backward(path, 1e6), **own)


def _recipe(family: str, cause: str, site: str, strength: str, **fields: Any) -> Recipe:
    name = " ".join(part for part in (family, site, strength) if part)
    return Recipe(name=name, family=family, cause=cause, site=site, **fields)
