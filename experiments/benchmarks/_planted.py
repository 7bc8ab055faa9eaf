"""Runs with one plant at a known step, for the benchmark of forensics.

A *plant* gets a ``Subject`` (weights by name, optimizer, the paths of parts that both architectures have) at its step, or has a
hook that acts from then on, or spoils the batch. Two ways to train:

    plain, mixture, encoder-decoder   the models of ``_planted_models.py``, AdamW, clipping, ``Monitor`` in a loop of ten lines
    glm                               GLM's own block (DeepNorm, GeGLU, fused projections, tied embedding) in ``glm train``'s loop

Tokens are a sparse Markov chain that both learn in a hundred steps.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from experiments.benchmarks._planted_models import HEADS, LAYERS, LENGTH, MODELS, VOCABULARY, WIDTH, mean_loss
from glm.data.batch import Batch, Provenance
from glm.data.config import ObjectiveConfig
from glm.data.loader import Loader
from glm.model.config import FeedForwardConfig, ModelConfig
from glm.train.config import BatchConfig, CheckpointConfig, MonitorConfig, TrainConfig
from glm.train.engine import LocalEngine
from glm.train.events import Callback
from glm.train.loop import Trainer
from glm.train.monitoring import MonitorCallback
from glm.train.optimizer import MixedPrecisionAdamW
from glm.train.rate_schedule import ScheduleConfig
from glm.train.update_rules import OptimizerConfig
from stabilitylab import Monitor
from stabilitylab.runs import Run, load_run
from stabilitylab.runs.folder import RunFolder

STEPS, PLANTED = 112, 90
ROWS = 8


@dataclass(kw_only=True)
class Subject:
    """What a plant may touch.

    Attributes:
        model: the module in training.
        weights: by name, those that the optimizer updates.
        optimizer: torch's, or GLM's, which is one.
        parts: role -> path, of block 1: attention_norm, query, value, output, up, down; and embedding, head.
        is_on: whether the planted step has come; ``once``: whether this is it.
    """

    model: nn.Module
    weights: Mapping[str, Tensor]
    optimizer: torch.optim.Optimizer
    parts: Mapping[str, str]
    is_on: bool = False
    once: bool = False

    def weight(self, role: str, kind: str = "weight") -> Tensor:
        return self.weights[f"{self.parts[role]}.{kind}"].data


@dataclass(frozen=True, kw_only=True)
class Plant:
    """A cause. The loop calls ``act`` before the planted step and ``install`` once the model exists; ``spoil`` makes its batch."""

    cause: str
    site: str = ""  # a role
    act: Callable[[Subject], object] | None = None
    install: Callable[[Subject], object] | None = None
    spoil: Callable[[Tensor], Tensor] | None = None
    rate: float = 1.0
    causes: tuple[str, ...] = field(default=())  # further ones that are as right


def _rows(weight: Tensor, subject: Subject, role: str) -> Tensor:
    """The rows of a projection: the whole weight, or its third of a fused one."""
    if not subject.parts[role].endswith("query_key_value"):
        return weight
    return weight.view(3, -1, *weight.shape[1:])[{"query": 0, "value": 2}[role]]


def _scale(role: str, factor: float, kind: str = "weight") -> Callable[[Subject], object]:
    return lambda s: s.weight(role, kind).mul_(factor)


def _query(s: Subject) -> None:
    _rows(s.weight("query"), s, "query").mul_(30)


def _value_head(s: Subject) -> None:
    _rows(s.weight("value"), s, "value")[: WIDTH // HEADS].mul_(100)


def _set(role: str, value: float) -> Callable[[Subject], object]:
    def act(s: Subject) -> None:
        weight = s.weight(role)
        weight.view(-1)[weight.numel() // 3] = value

    return act


def _moments(name: str, factor: float) -> Callable[[Subject], object]:
    def act(s: Subject) -> None:
        for state in s.optimizer.state.values():
            state[name].mul_(factor)

    return act


def _beta2(s: Subject) -> None:
    for group in s.optimizer.param_groups:
        group["betas"] = (group["betas"][0], 0.1)
    if isinstance(s.optimizer, MixedPrecisionAdamW):  # it computes with its own configuration
        s.optimizer.config = dataclasses.replace(s.optimizer.config, beta2=0.1)


def _decay(s: Subject) -> None:
    for group in s.optimizer.param_groups:
        group["weight_decay"] = 300.0 * max(group["weight_decay"], 0.1)


def _output(role: str, factor: float, *, once: bool = False) -> Callable[[Subject], object]:
    """Multiply a layer's output: a fault of the computation, with every weight as it was."""

    def install(s: Subject) -> None:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return output * factor if (s.once if once else s.is_on) else output

        s.model.get_submodule(s.parts[role]).register_forward_hook(hook)

    return install


def _overflow(s: Subject) -> None:
    """The up-projection in fp16, with inputs too large for it."""

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return (output * 1e5 / output.abs().max()).half().float() if s.once else output

    s.model.get_submodule(s.parts["up"]).register_forward_hook(hook)


def _gradient(factor: float) -> Callable[[Subject], object]:
    def install(s: Subject) -> None:
        s.weights[f"{s.parts['up']}.weight"].register_hook(  # type: ignore[no-untyped-call]
            lambda g: g * factor if s.once else g
        )

    return install


def _backward(s: Subject) -> None:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad and s.once:
            output.register_hook(lambda g: g * 1000)  # type: ignore[no-untyped-call]

    s.model.get_submodule(s.parts["down"]).register_forward_hook(hook)


PLANTS: dict[str, Plant] = {
    "norm gain x 50": Plant(cause="parameter", site="attention_norm", act=_scale("attention_norm", 50)),
    "embedding row x 100": Plant(cause="parameter", site="embedding", act=lambda s: s.weight("embedding")[:1].mul_(100)),
    "second moments zeroed": Plant(cause="optimizer", act=_moments("exp_avg_sq", 0.0)),
    "first moments x 100": Plant(cause="optimizer", act=_moments("exp_avg", 100.0)),
    "weight NaN": Plant(cause="parameter", site="up", act=_set("up", float("nan"))),
    "one weight 1e4": Plant(cause="parameter", site="down", act=_set("down", 1e4)),
    "query weights x 30": Plant(cause="parameter", site="query", act=_query),
    "one value head x 100": Plant(cause="parameter", site="value", act=_value_head),
    "output matrix x 20": Plant(cause="parameter", site="output", act=_scale("output", 20)),
    "bias + 30": Plant(cause="parameter", site="up", act=lambda s: s.weight("up", "bias").add_(30)),
    "sign of a layer": Plant(cause="parameter", site="up", act=_scale("up", -1)),
    "head x 20": Plant(cause="parameter", site="head", act=_scale("head", 20)),
    "rate x 20": Plant(cause="learning-rate", rate=20.0),
    "beta2 to 0.1": Plant(cause="optimizer", act=_beta2),
    "weight decay x 300": Plant(cause="optimizer", act=_decay),
    "random batch": Plant(cause="batch", spoil=lambda x: torch.randint_like(x, VOCABULARY)),
    "repeated batch": Plant(cause="batch", spoil=lambda x: torch.full_like(x, int(x.flatten()[0]))),
    "fp16 overflow": Plant(cause="overflow", site="up", install=_overflow),
    "one gradient x 1000": Plant(cause="gradient", site="up", install=_gradient(1000.0)),
    "backward x 1000": Plant(cause="gradient", site="down", install=_backward),
    "layer output x 50": Plant(cause="activation", site="down", install=_output("down", 50)),
    "query output x 30": Plant(cause="attention", site="query", install=_output("query", 30), causes=("activation",)),
}  # fmt: skip


_CHAIN = torch.randint(VOCABULARY, (VOCABULARY, 4), generator=torch.Generator().manual_seed(7))


def tokens(seed: int, step: int) -> Tensor:
    """[ROWS, LENGTH + 1] of the chain."""
    dice = torch.Generator().manual_seed(1000 * seed + step)
    choice = torch.randint(4, (ROWS, LENGTH + 1), generator=dice)
    out = torch.zeros(ROWS, LENGTH + 1, dtype=torch.int64)
    out[:, 0] = torch.randint(VOCABULARY, (ROWS,), generator=dice)
    for t in range(1, LENGTH + 1):
        out[:, t] = _CHAIN[out[:, t - 1], choice[:, t]]
    return out


def _batch(plant: Plant | None, seed: int, step: int) -> Tensor:
    batch = tokens(seed, step)
    return plant.spoil(batch) if plant is not None and plant.spoil is not None and step == PLANTED else batch


def _turn(plant: Plant | None, subject: Subject, step: int) -> None:
    subject.is_on, subject.once = step >= PLANTED, step == PLANTED
    if plant is not None and plant.act is not None and step == PLANTED:
        with torch.no_grad():
            plant.act(subject)


OF_GLM = {
    **dict.fromkeys(("query", "value"), "layers.1.attention.query_key_value"),
    "output": "layers.1.attention.output",
    "attention_norm": "layers.1.attention_norm",
    "up": "layers.1.feed_forward.up",
    "down": "layers.1.feed_forward.down",
    "embedding": "embedding",
    "head": "embedding",
}


def train_plain(
    folder: Path, plant: Plant | None, seed: int, *, every: int, recorder: int, model: str = "plain"
) -> Run:
    """The loop of a user's own script."""
    torch.manual_seed(seed)
    watched = MODELS[model]()
    optimizer = torch.optim.AdamW(watched.parameters(), lr=3e-3, betas=(0.9, 0.95))
    subject = Subject(
        model=watched, weights=dict(watched.named_parameters()), optimizer=optimizer, parts=PARTS[model]
    )
    if plant is not None and plant.install is not None:
        plant.install(subject)
    with Monitor(
        watched, optimizer, out=folder, every=every, recorder=recorder, tensorboard=False
    ) as monitor:
        for step in range(STEPS):
            _turn(plant, subject, step)
            if plant is not None and step == PLANTED:
                optimizer.param_groups[0]["lr"] *= plant.rate
            batch = _batch(plant, seed, step)
            optimizer.zero_grad()
            loss = mean_loss(watched, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(watched.parameters(), 1.0)
            optimizer.step()
            monitor.step(step, loss=loss)
    return load_run(folder)


def train_glm(folder: Path, plant: Plant | None, seed: int, *, every: int, recorder: int) -> Run:
    """GLM's trainer, its monitor and its callbacks."""
    config = TrainConfig(
        steps=STEPS,
        seed=seed,
        model=ModelConfig(
            vocabulary=VOCABULARY,
            layers=LAYERS,
            hidden=WIDTH,
            heads=HEADS,
            length=LENGTH,
            feed_forward=FeedForwardConfig(kind="geglu"),
        ),
        objective=ObjectiveConfig(kind="causal"),
        batch=BatchConfig(rows=ROWS),
        optimizer=OptimizerConfig(),
        schedule=ScheduleConfig(peak=3e-3, warmup=10, shape="constant"),
        monitor=MonitorConfig(every=every, gradients_every=every, recorder=recorder, tensorboard=False),
        checkpoint=CheckpointConfig(every=0, ring=0),
    )  # fmt: skip
    engine = LocalEngine(config)
    weights = engine.tensors()[0]
    subject = Subject(model=engine.model, weights=weights, optimizer=engine.optimizer, parts=OF_GLM)
    if plant is not None and plant.install is not None:
        plant.install(subject)
    run = RunFolder(folder)
    run.claim()
    watch = MonitorCallback(run, config.monitor)
    trainer = Trainer(
        config, engine, cast(Loader, _Loader(config, plant)), run=run, callbacks=[_Act(plant, subject), watch]
    )
    trainer.train()
    run.release()
    return load_run(folder)


class _Act(Callback):
    """The plant's turn, before each step."""

    def __init__(self, plant: Plant | None, subject: Subject) -> None:
        self._plant, self._subject = plant, subject

    def train_start(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def step_start(self, step: int) -> None:
        _turn(self._plant, self._subject, step)
        if self._plant is not None and self._plant.rate != 1.0 and step == PLANTED:
            self._trainer.intervention = dataclasses.replace(
                self._trainer.intervention, rate_factor=self._plant.rate
            )


class _Loader:
    """The chain as the trainer's loader."""

    def __init__(self, config: TrainConfig, plant: Plant | None) -> None:
        self._config, self._plant = config, plant
        spelled = SimpleNamespace(decode=lambda numbers: " ".join(map(str, numbers)))
        self.data, self.fingerprint = SimpleNamespace(path=Path("chain"), tokenizer=spelled), "chain"

    def samples(self, numbers: range) -> Batch:
        tokens_BT = _batch(self._plant, self._config.seed, numbers.start // ROWS)
        positions = torch.arange(LENGTH).expand(ROWS, -1)
        return Batch(
            tokens_BT=tokens_BT[:, :-1].contiguous(),
            targets_BT=tokens_BT[:, 1:].contiguous(),
            positions=positions,
            segments_BT=torch.zeros(ROWS, LENGTH, dtype=torch.int32),
            context_BT=torch.zeros(ROWS, LENGTH, dtype=torch.bool),
            provenance=((cast(Provenance, SimpleNamespace(first=0, length=LENGTH, source="chain")),),) * ROWS,
        )

    def documents(self, piece: Provenance) -> list[str]:
        return []


ARCHITECTURES: dict[str, Callable[..., Run]] = {
    **{name: functools.partial(train_plain, model=name) for name in MODELS},
    "glm": train_glm,
}
PARTS: dict[str, Mapping[str, str]] = {**{name: model.parts for name, model in MODELS.items()}, "glm": OF_GLM}
