"""Runs the parallel engine over several topologies and leaves their results on disk, for ``test_engine.py`` to judge.

    python worlds.py FOLDER DATA

Importing torch and DeepSpeed takes seconds, so this process imports once and forks the ranks of each world. Not a test itself.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

import glm.cli
from glm.data.loader import Loader
from glm.data.shards import open_data
from glm.distributed.config import ParallelConfig
from glm.model.config import AttentionConfig, EmbeddingConfig, ExpertsConfig, FeedForwardConfig, ModelConfig
from glm.train.checkpoint import Checkpoint
from glm.train.config import BatchConfig, TrainConfig
from glm.train.emulation import EmulationConfig
from glm.train.engine import Engine, LocalEngine
from glm.train.events import Callback
from glm.train.loop import Trainer
from glm.train.update_rules import OptimizerConfig
from glm.train.update_rules.config import GuardConfig, MuonConfig
from stabilitylab.spikes import ResponderConfig
from stabilitylab.telemetry import Event
from tests.glm.parallel.ranks import prepare
from tests.glm.parallel.spiking import POLICIES, answer, spiking
from tests.glm.parallel.split_loss import split_losses
from tests.ports import free_port

TOPOLOGIES = ((2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (1, 2, 2), (2, 1, 2))
RESPONDING = (1, 2, 2)
# t, p, d, ZeRO's stage
WATCHED = ((2, 2, 1, 1), (2, 1, 2, 1), (2, 1, 2, 0), (1, 1, 2, 2), (2, 1, 2, 3))
ROWS, LENGTH, VOCABULARY, RATE = 8, 16, 96, 1e-3

GLM = ModelConfig(
    vocabulary=VOCABULARY,
    layers=3,
    hidden=32,
    heads=4,
    length=LENGTH,
    embedding=EmbeddingConfig(gradient_shrink=0.5),
)
OTHER = dataclasses.replace(
    GLM,
    norm="sandwich",
    z_loss=1e-3,
    recompute=True,
    embedding=EmbeddingConfig(norm=True, tied=False),
    attention=AttentionConfig(positions="alibi", qk_norm=True),
    feed_forward=FeedForwardConfig(kind="gelu"),
)
GATED = dataclasses.replace(
    GLM,
    norm="reordered",
    logit_cap=2.0,
    attention=AttentionConfig(qk_norm=True, v_norm=True, gate="head", sink="learned"),
)
# Scores of so small a model are below one; a micro-batch of eight rows leaves the second replica without any.
CLIPPED = dataclasses.replace(GLM, attention=AttentionConfig(qk_clip=0.05))
ROUTED = dataclasses.replace(
    GLM,
    z_loss=1e-3,
    feed_forward=FeedForwardConfig(
        experts=ExpertsConfig(
            count=4, active=2, shared=1, balance=0.01, router_z=1e-3, bias_rate=1e-3, capacity=1.2
        )
    ),
)
STABLE = OptimizerConfig(update_clipping=True, zclip=True)
RULES = OptimizerConfig(
    kind="ademamix",
    cautious=True,
    decay="adamc",
    guard=GuardConfig(adagc=True, update_norm=2.0, skip_step=6.0),
)
MUON = OptimizerConfig(kind="muon", muon=MuonConfig(per_head=True))


@dataclass(frozen=True)
class World:
    """One run."""

    name: str
    config: TrainConfig
    steps: int = 5
    load: str = ""

    @property
    def ranks(self) -> int:
        return self.config.parallel.ranks


def world(
    name: str,
    axes: tuple[int, int, int],
    *,
    precision: str = "fp32",
    model: ModelConfig = GLM,
    micro: int = 2,
    zero: int = 1,
    **more: object,
) -> World:
    t, p, d = axes
    config = TrainConfig(
        precision=precision,
        model=model,
        batch=BatchConfig(rows=ROWS, micro_rows=micro),
        optimizer=more.pop("optimizer", OptimizerConfig()),
        emulate=more.pop("emulate", EmulationConfig()),
        parallel=ParallelConfig(tensor=t, pipeline=p, data=d, zero=zero),
    )
    return World(name, config, **more)


def worlds() -> list[World]:
    """All runs, in the order in which they are made."""
    found = [world("fp32-" + _joined(axes), axes) for axes in TOPOLOGIES]
    found += [world("fp16-221", (2, 2, 1), precision="fp16"), world("bf16-122", (1, 2, 2), precision="bf16")]
    # Other levers, and a micro-batch that only one of two replicas gets.
    found += [world("other-221", (2, 2, 1), model=OTHER), world("uneven-112", (1, 1, 2), micro=8)]
    found += [
        world("clipped-112", (1, 1, 2), model=CLIPPED, zero=0),
        world("clipped-uneven-112", (1, 1, 2), model=CLIPPED, zero=0, micro=8),
        world("stable-212", (2, 1, 2), optimizer=STABLE),
        world("rules-212", (2, 1, 2), optimizer=RULES),
    ]
    found += [world("gated-221", (2, 2, 1), model=GATED)]
    found += [world("muon-112", (1, 1, 2), optimizer=MUON, zero=0)]
    found += [
        world("experts-112", (1, 1, 2), model=ROUTED),
        world("experts-uneven-112", (1, 1, 2), model=ROUTED, micro=8),
    ]
    found += [world("again-experts-112", (1, 1, 2), model=ROUTED, zero=0, steps=0, load="experts-112")]
    found += [world("emulated-112", (1, 1, 2), emulate=EmulationConfig(recipe="nvfp4"))]
    wet = dataclasses.replace(GLM, dropout=0.2)
    found += [world(f"dropout-{_joined(axes)}", axes, model=wet) for axes in TOPOLOGIES[:3]]
    replayed = dataclasses.replace(wet, recompute=True)
    found.append(world("dropout-recomputed-221", (2, 2, 1), model=replayed, micro=1))
    # Loads what another topology wrote and writes it again.
    found += [
        world("again-111", (1, 1, 1), precision="fp16", steps=0, load="fp16-221"),
        world("again-122", (1, 2, 2), precision="fp16", steps=0, load="again-111"),
        world("again-211", (2, 1, 1), precision="fp16", steps=0, load="again-122"),
    ]
    return found + zero_worlds()


def zero_worlds() -> list[World]:
    """ZeRO's other stages: with a replica that has no micro-batch, with everything that a layer can do, in each format."""
    found = [
        world("copied-212", (2, 1, 2), zero=0),
        world("copied-fp16-121", (1, 2, 1), zero=0, precision="fp16"),
        world("fp32-112-zero2", (1, 1, 2), zero=2),
        world("fp32-112-zero3", (1, 1, 2), zero=3),
        world("uneven-112-zero3", (1, 1, 2), zero=3, micro=8),
        world("other-112-zero2", (1, 1, 2), zero=2, model=OTHER),
        world("other-212-zero3", (2, 1, 2), zero=3, model=OTHER),
        world("fp16-112-zero2", (1, 1, 2), zero=2, precision="fp16"),
        world("fp16-212-zero3", (2, 1, 2), zero=3, precision="fp16"),
        world("bf16-112-zero3", (1, 1, 2), zero=3, precision="bf16"),
        world("stable-112-zero3", (1, 1, 2), zero=3, optimizer=STABLE),
        world("dropout-112-zero3", (1, 1, 2), zero=3, model=dataclasses.replace(GLM, dropout=0.2)),
    ]
    # A checkpoint goes through every stage.
    load = "fp16-212-zero3"
    for axes, zero in (((1, 1, 2), 1), ((2, 1, 1), 0), ((1, 1, 2), 3), ((1, 1, 2), 2)):
        name = f"again-{_joined(axes)}-zero{zero}"
        found.append(world(name, axes, zero=zero, precision="fp16", steps=0, load=load))
        load = name
    return found


def _joined(axes: tuple[int, ...]) -> str:
    return "".join(map(str, axes))


def batch(step: int) -> SimpleNamespace:
    """Random rows, some of whose tokens have targets."""
    g = torch.Generator().manual_seed(step)
    targets_BT = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=g)
    targets_BT[torch.rand(ROWS, LENGTH, generator=g) < 0.4] = -100
    positions_BT = torch.arange(LENGTH).expand(ROWS, -1).contiguous()
    return SimpleNamespace(
        tokens_BT=torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=g),
        targets_BT=targets_BT,
        positions=positions_BT,
        segments_BT=torch.zeros(ROWS, LENGTH, dtype=torch.int32),
        context_BT=positions_BT < 4,
    )


def train(engine, steps: int) -> list[tuple[float, float, bool]]:
    """(loss, gradient norm, applied) of each step."""
    curve = []
    for step in range(steps):
        loss = engine.forward_backward(batch(step), step)
        norm = engine.gradients().global_norm
        curve.append((loss, norm, engine.update(RATE, clip=1.0)))
    return curve


def run_rank(one: World, folder: Path) -> None:
    from glm.distributed.launch import joined
    from glm.parallel.engine import ParallelEngine

    config = one.config
    with joined(config.parallel, torch.device("cpu"), config.to_json()) as processes:
        engine: Engine = LocalEngine(config) if one.ranks == 1 else ParallelEngine(config)
        if one.load:
            state, problems = engine.load_newest(folder / one.load)
            assert not problems
            engine.load_tensors(state.model, state.optimizer)
            engine.load_state_dict(state.state["engine"])
        curve = train(engine, one.steps)
        weights, moments = engine.tensors()
        held = sum(tensor.numel() for tensor in weights.values())
        state = {"engine": engine.state_dict(), "curve": curve}
        checkpoint = Checkpoint(step=one.steps, model=weights, optimizer=moments, state=state)
        engine.save(folder / one.name, checkpoint, keep=1)
        (folder / one.name / f"held-{processes.from_first(os.getpid())}-{os.getpid()}").write_text(str(held))


class Alarm(Callback):
    """Notices a spike on the first process only, once; writes down what each step was."""

    def __init__(self, leads: bool) -> None:
        self.leads = leads
        self.seen: list[tuple[int, int, float]] = []

    def step_end(self, info):
        self.seen.append((info.step, info.first_sample, info.loss))
        if not self.leads or info.step != 6 or len(self.seen) > 7:
            return ()
        return [
            Event(
                step=6,
                kind="spike",
                data={"onset": 6, "phase": "onset", "signal": "train/-/loss", "episode": 1},
            )
        ]


def responding(axes: tuple[int, int, int]) -> TrainConfig:
    """A run whose responder goes back two steps."""
    t, p, d = axes
    return TrainConfig(
        steps=10,
        model=ModelConfig(vocabulary=1000, layers=2, hidden=32, heads=2, length=64),
        batch=BatchConfig(rows=4, micro_rows=1),
        responder=ResponderConfig(policy="roll-back", rollback_steps=2, skip_batches=1, cooldown=0, budget=1),
        parallel=ParallelConfig(tensor=t, pipeline=p, data=d),
    )


def respond(config: TrainConfig, engine: Engine, data: Path, leads: bool) -> list[tuple[int, int, float]]:
    """(step, first sample, loss) of every step that was made."""
    shards = open_data(data)
    loader = Loader(shards, config.objective, config.sampling, length=config.model.length, seed=config.seed)
    alarm = Alarm(leads)
    assert Trainer(config, engine, loader, callbacks=(alarm,)).train()
    return alarm.seen


def run_responding(folder: Path, data: Path) -> None:
    from glm.distributed.launch import joined
    from glm.parallel.engine import ParallelEngine

    config = responding(RESPONDING)
    with joined(config.parallel, torch.device("cpu"), config.to_json()) as processes:
        seen = respond(config, ParallelEngine(config), data, processes.leads)
        (folder / f"responding-{os.environ['RANK']}.json").write_text(json.dumps(seen))


def run_two(folder: Path, data: Path) -> None:
    """What needs two replicas only: runs with a planted spike; and two tensor ranks: a loss."""
    from glm.distributed.launch import joined
    from glm.parallel.engine import ParallelEngine

    shards = open_data(data)
    config = spiking("none", (1, 1, 2))
    with joined(config.parallel, torch.device("cpu"), config.to_json()):
        split_losses(folder)
        found = {}
        for policy in POLICIES:
            config = spiking(policy, (1, 1, 2))
            found[policy] = answer(config, ParallelEngine(config), shards)
        (folder / f"spiking-{os.environ['RANK']}.json").write_text(json.dumps(found))


def command(data: Path, out: Path, axes: tuple[int, int, int, int]) -> list[str]:
    """A watched run of ``glm train``."""
    flags = {
        "data": data,
        "out": out,
        "steps": 3,
        "model.layers": 3,
        "model.hidden": 32,
        "model.heads": 4,
        "model.length": 64,
        "batch.rows": 4,
        "batch.micro-rows": 1,
        "monitor.every": 2,
        "parallel.tensor": axes[0],
        "parallel.pipeline": axes[1],
        "parallel.data": axes[2],
        "parallel.zero": axes[3],
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return ["train", "glm-tiny", *words, "--monitor.no-tensorboard"]


def main(folder: Path, data: Path) -> int:
    prepare(command(data, folder, WATCHED[0]))
    runs = [(one.name, one.ranks, lambda one=one: run_rank(one, folder)) for one in worlds()]
    for axes in WATCHED:
        words = command(data, folder / f"watched-{_joined(axes)}", axes)
        runs.append((words[5], math.prod(axes[:3]), lambda words=words: glm.cli.main(words)))
    runs.append(("responding", math.prod(RESPONDING), lambda: run_responding(folder, data)))
    runs.append(("two", 2, lambda: run_two(folder, data)))
    for name, ranks, work in runs:
        port = free_port()
        children = []
        for rank in range(ranks):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
            child = os.fork()
            if child == 0:
                try:
                    os._exit(work() or 0)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(codes):
            print(json.dumps({"world": name, "codes": codes}), file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
