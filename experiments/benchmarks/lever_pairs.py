"""Do levers go together? Tries each alone, then random pairs, in three updates of a tiny model by ``glm train``.

    python -m experiments.benchmarks lever_pairs [--pairs N] [--seed S] [--no-singles] [--data FOLDER]

A combination is right if every loss is finite and a run resumed after the second update ends in the same bits, weights and moments;
or if the command refuses it in one line. The benchmark prints anything else: a crash, a loss that is not finite, another end.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from rich.console import Console
from safetensors.torch import load_file

from experiments.suites._proxy import proxy_text
from glm.commands.train import parse_command, train
from glm.errors import InputError
from glm.train.unused_settings import refuse_idle
from stabilitylab.command_line import parse
from stabilitylab.errors import InputError as Refused
from stabilitylab.runs import load_run

STEPS = 3
SMALL = (
    "glm-tiny --model.layers 2 --model.hidden 32 --model.heads 4 --model.length 32 --batch.rows 2 --schedule.warmup 2 "
    "--monitor.every 1 --monitor.no-tensorboard --checkpoint.every 1 --checkpoint.no-asynchronous --checkpoint.keep 3 "
    f"--checkpoint.ring 0 --steps {STEPS}"
)
LEVERS = tuple(
    line.strip()
    for line in """
    --model.norm pre | --model.norm post | --model.norm sandwich | --model.norm reordered
    --model.norm-kind rms | --model.norm-kind rms-plain | --model.norm-kind rms-single | --model.norm-kind rms-centred
    --model.norm-kind dyt | --model.attention.qk-norm | --model.attention.v-norm | --model.attention.qk-clip 5
    --model.attention.soft-cap 10 | --model.attention.gate element | --model.attention.gate head
    --model.attention.sink learned | --model.attention.sink off-by-one | --model.attention.softmax compute
    --model.attention.softmax pb-relax | --model.attention.softmax fused | --model.attention.positions alibi
    --model.attention.positions learned | --model.attention.clip-qkv 3 | --model.attention.key-heads 2 | --model.spectral
    --model.dropout 0.1 | --model.z-loss 1e-4 | --model.recompute | --model.norm pre --model.parallel-block
    --model.embedding.norm | --model.embedding.gradient-shrink 0.1 | --model.embedding.no-tied
    --model.feed-forward.kind swiglu | --model.feed-forward.kind squared-relu | --model.feed-forward.clamp 4
    --model.feed-forward.experts.count 4
    --model.feed-forward.experts.count 4 --model.feed-forward.experts.bias-rate 1e-3 --model.feed-forward.experts.capacity 1.0
    --optimizer.kind muon | --optimizer.kind muon --optimizer.muon.per-head | --optimizer.kind lion
    --optimizer.kind ademamix | --optimizer.kind adam-atan2 | --optimizer.kind soap | --optimizer.cautious
    --optimizer.cautious-decay | --optimizer.decay independent | --optimizer.decay adamc | --optimizer.update-clipping
    --optimizer.zclip | --optimizer.guard.adagc --optimizer.guard.warmup 1 | --optimizer.guard.skip-step 3
    --optimizer.guard.spam spam --optimizer.guard.reset 2 | --optimizer.guard.spam stable --optimizer.guard.reset 2
    --optimizer.guard.update-norm 3 | --precision fp16 | --precision bf16 | --precision bf16 --bf16-weights kahan
    --precision bf16 --bf16-weights stochastic | --emulate.recipe mxfp4 | --emulate.recipe nvfp4
    --emulate.recipe fp8-blocks | --objective.kind causal | --objective.kind span-corruption | --batch.micro-rows 1
    --model.norm deepnet | --model.norm pre-scaled | --model.norm sandwich-scaled | --model.attention.positions none
    --model.norm sandwich --model.attention.gate element --precision fp16
    --model.attention.positions rope2d --objective.positions 2d | --model.embedding.scale sqrt | --model.embedding.std 0.1
    --model.init gpt2 | --model.init small | --model.init fan-in | --model.logit-cap 5 | --model.no-bias
    --model.norm pre --model.scaling.kind mup --model.scaling.base-hidden 16
    --model.norm pre --model.scaling.kind complete-p --model.scaling.base-hidden 16 --model.scaling.base-layers 1
    --schedule.shape wsd | --schedule.shape inverse-sqrt
    --schedule.shrink-to 1 --schedule.shrink-to-step 2 --model.embedding.gradient-shrink 0.1
    --model.embedding.shrink-side both --model.embedding.gradient-shrink 0.1
    --monitor.weights-every 1 | --monitor.formats-every 1 | --monitor.curvature-every 1 | --monitor.recorder 4
    --optimizer.muon.scale spectral --optimizer.kind muon | --optimizer.no-decay-embedding
    --optimizer.rates.embedding 0.1 | --optimizer.kind ademamix --optimizer.slow.warmup 2
    --emulate.recipe fp8 | --emulate.recipe mxfp8 | --emulate.recipe fp8 --emulate.products forward
    --model.feed-forward.experts.count 4 --model.feed-forward.experts.shared 1 --model.feed-forward.experts.router-z 1e-3
    --model.feed-forward.experts.count 4 --model.feed-forward.experts.bias-rate 1e-3 --model.recompute
    --responder.policy escalate --responder.cooldown 0 | --heldout.rows 2
    --batch.ramp-from 1 --batch.ramp-samples 4 --batch.micro-rows 1
    """.replace("\n", "|").split("|")
    if line.strip()
)
Outcome = Literal["trains", "refused", "wrong"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Try levers together.

    Attributes:
        pairs: number of pairs to draw at random.
        seed: seed of the draw.
        singles: try each alone first.
        data: folder made by `glm shards`; by default the proxies'.
    """

    pairs: int = 100
    seed: int = 0
    singles: bool = True
    data: Path | None = None


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; returns 1 where a combination is wrong."""
    settings: Settings = parse(Settings, arguments, program="python -m experiments.benchmarks lever_pairs")
    torch.set_num_threads(1)
    data = settings.data or proxy_text(Path("data") / proxy_text.__name__)
    every = list(itertools.combinations(LEVERS, 2))
    random.Random(settings.seed).shuffle(every)
    asked = [*((one,) for one in LEVERS if settings.singles), *every[: settings.pairs]]
    counted: dict[Outcome, int] = {"trains": 0, "refused": 0, "wrong": 0}
    for levers in asked:
        outcome, said = tried(" ".join(levers).split(), data)
        counted[outcome] += 1
        if outcome != "trains":
            print(f"{outcome}: {' '.join(levers)}: {said}", flush=True)
    print(", ".join(f"{name} {count}" for name, count in counted.items()))
    return int(counted["wrong"] > 0)


def tried(flags: Sequence[str], data: Path) -> tuple[Outcome, str]:
    """How a combination ends, and its message."""
    with TemporaryDirectory() as folder:
        whole, resumed = Path(folder) / "whole", Path(folder) / "resumed"
        try:
            run([*SMALL.split(), *flags], data, whole)
            loss = load_run(whole).series("train/-/loss").to_list()
            if len(loss) != STEPS or not all(math.isfinite(one) for one in loss):
                return "wrong", f"loss {loss}"
            shutil.copytree(whole, resumed)
            shutil.rmtree(resumed / "checkpoints" / f"step-{STEPS:08d}")
            run([*SMALL.split(), *flags, "--resume"], data, resumed)
            return compared(*(one / "checkpoints" / f"step-{STEPS:08d}" for one in (whole, resumed)))
        except (InputError, Refused) as error:
            line = str(error)
            return ("wrong" if "\n" in line.strip() else "refused"), line
        except Exception as error:
            return "wrong", f"{type(error).__name__}: {error}"


def run(words: Sequence[str], data: Path, out: Path) -> None:
    """``glm train`` without output. Raises InputError where the flags do not go together."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            command = parse_command([*words, "--data", str(data), "--out", str(out)])
        except SystemExit:
            said_lines = (line.strip(" │") for line in said.getvalue().splitlines())
            raise InputError(" ".join(line for line in said_lines if line.strip("╭╮╰╯─"))) from None
        refuse_idle(words, command.config)
        train(command, console=Console(file=said))


def compared(one: Path, other: Path) -> tuple[Outcome, str]:
    """Whether two checkpoints are the same bits."""
    for part in ("model.safetensors", "optimizer.safetensors"):
        first, second = load_file(one / part), load_file(other / part)
        if first.keys() != second.keys():
            return "wrong", f"{part} has other names after a resume"
        for name, tensor in first.items():
            if not torch.equal(tensor, second[name]):
                return "wrong", f"{part}: {name} differs after a resume"
    return "trains", ""
