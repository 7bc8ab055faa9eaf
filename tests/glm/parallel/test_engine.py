"""The parallel engine against the local one: the same losses, norms and weights, however the model is spread.

The local engine itself shows what rounding does. Micro-batches of another size give the same update in exact arithmetic, summed in
another order; and a run from weights moved by their format's rounding error stands for a computation that rounds its products
elsewhere. A parallel run may differ from the local one by as much as such runs do, times a margin for its additional sums (partial
products of tensor ranks, shares of the vocabulary).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from glm.cli import main
from glm.data.loader import Loader
from glm.train import checkpoint as checkpoints
from glm.train.checkpoint import Checkpoint
from glm.train.config import BatchConfig, TrainConfig
from glm.train.engine import LocalEngine
from stabilitylab.runs import load_run
from tests.glm.model.test_vocabulary_loss import inputs
from tests.glm.parallel import worlds
from tests.glm.parallel.spiking import BAD_STEPS, POLICIES, ROWS, answer, spiking
from tests.glm.parallel.split_loss import CASES
from tests.patience import PATIENCE

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.distributed

# Factors on the largest difference between local runs. In half precision every tensor rank rounds its part of a sum, where one
# process rounds the sum: a step has twice as many rounding errors.
MARGIN = {"fp32": 4.0, "fp16": 8.0, "bf16": 8.0}
# Half a unit in the last place of the masters, which are fp32 in every precision.
ROUNDING = 2.0**-24
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def results(tmp_path_factory, data_folder):
    """All worlds' checkpoints, made by real processes."""
    folder = tmp_path_factory.mktemp("worlds")
    command = [
        sys.executable,
        "-W",
        "error",
        "-m",
        "tests.glm.parallel.worlds",
        str(folder),
        str(data_folder),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3 * PATIENCE
    )
    assert done.returncode == 0, done.stderr
    return folder


def read(results: Path, name: str) -> Checkpoint:
    ((_, path),) = checkpoints.list_checkpoints(results / name)
    return checkpoints.load(path)


@cache
def local(key: str, config: TrainConfig, steps: int, micro: int, nudge: float = 0.0) -> Checkpoint:
    """The same run in one process; its initial weights moved by up to ``nudge`` of their size."""
    del key
    config = dataclasses.replace(config, batch=BatchConfig(rows=worlds.ROWS, micro_rows=micro))
    engine = LocalEngine(config)
    if nudge:
        weights, moments = engine.tensors()
        g = torch.Generator().manual_seed(1)
        moved = {
            n: w.detach() * (1 + nudge * (2 * torch.rand(w.shape, generator=g) - 1))
            for n, w in weights.items()
        }
        engine.load_tensors(moved, moments)
    curve = worlds.train(engine, steps)
    weights, moments = engine.tensors()
    weights = {name: tensor.detach() for name, tensor in weights.items()}
    return Checkpoint(step=steps, model=weights, optimizer=moments, state={"curve": curve})


def distances(a: Checkpoint, b: Checkpoint) -> dict[str, float]:
    """How far two runs are apart."""
    pairs = list(zip(a.state["curve"], b.state["curve"], strict=True))
    applied = [(x, y) for x, y in pairs if x[2]]
    assert [x[2] for x, _ in pairs] == [y[2] for _, y in pairs], "other updates were skipped"

    def apart(one, other):
        return max(float((one[name] - other[name]).abs().max()) for name in one)

    def mean(one, other):
        total = sum(float((one[name] - other[name]).abs().sum()) for name in one)
        return total / sum(one[name].numel() for name in one)

    return {
        "loss": max(abs(x[0] - y[0]) for x, y in pairs),
        "norm": max(abs(x[1] / y[1] - 1) for x, y in applied),
        "weights": mean(a.model, b.model),
        "moments": apart(a.optimizer, b.optimizer),
    }


def micro_batches(config: TrainConfig) -> tuple[tuple[int, ...], int, float]:
    """Micro-batch sizes that give the same update, the size of the parallel runs, and how far to move the weights.

    The scales and draws of an emulated format, and the capacity and balance of experts, belong to a micro-batch: another size is
    another update. Whether a number next to the middle of two rounds to the other side is chance: weights moved by more show its
    effect.
    """
    if config.emulate.is_on or config.model.feed_forward.experts.count:
        own = config.batch.micro_rows
        return (own,), own, 64 * ROUNDING
    return (1, 2, 4, 8), 2, ROUNDING


def bounds(config: TrainConfig, steps: int) -> dict[str, float]:
    """The largest distance between local runs that sum in another order or round elsewhere, with the margin."""
    # Whatever the sums, a plain number has rounding of half a unit in its last place: fp32's for a loss near 8, twice.
    least = {"loss": 8 * 2.0**-23, "norm": 2.0**-22, "weights": 0.0, "moments": 0.0}
    sizes, like, nudge = micro_batches(config)
    runs = [local(config.to_json(), config, steps, micro) for micro in sizes]
    between = [distances(a, b) for i, a in enumerate(runs) for b in runs[:i]]
    between.append(distances(local(config.to_json(), config, steps, like, nudge), runs[sizes.index(like)]))
    return {
        what: max(least[what], MARGIN[config.precision] * max(one[what] for one in between)) for what in least
    }


def alone(config: TrainConfig) -> TrainConfig:
    return dataclasses.replace(config, parallel=type(config.parallel)())


LIKE_LOCAL = [one for one in worlds.worlds() if one.steps]


@pytest.mark.parametrize("one", LIKE_LOCAL, ids=lambda one: one.name)
def test_a_parallel_run_is_the_local_one_within_rounding(results, one):
    config = alone(one.config)
    found = distances(
        read(results, one.name), local(config.to_json(), config, one.steps, micro_batches(config)[1])
    )
    allowed = bounds(config, one.steps)
    assert all(found[what] <= allowed[what] for what in found), (found, allowed)


def test_draws_are_of_the_rows_that_a_replica_has():
    """The bounds of the emulated run above mean something: with other micro-batches it is another run, outside of them."""
    (one,) = (one for one in LIKE_LOCAL if one.name == "emulated-112")
    config = alone(one.config)
    other, same = (local(config.to_json(), config, one.steps, micro) for micro in (4, 2))
    found, allowed = distances(other, same), bounds(config, one.steps)
    assert found["loss"] > allowed["loss"]
    assert found["weights"] > allowed["weights"]


def test_replicas_of_experts_count_their_loads_together(results):
    """The bias that follows from the loads is the local one to the bit, when written and when read again."""
    (one,) = (one for one in LIKE_LOCAL if one.name == "experts-112")
    config = alone(one.config)
    same = local(config.to_json(), config, one.steps, 2).model
    written, again = (read(results, name).model for name in ("experts-112", "again-experts-112"))
    biases = [name for name in same if name.endswith("bias_E")]
    assert len(biases) == config.model.layers
    for name in biases:
        assert same[name].abs().max() > 0
        assert torch.equal(written[name], same[name])
        assert torch.equal(again[name], same[name])


def test_dropout_drops(results):
    """Dropout has an effect; otherwise the runs above would prove nothing about it."""
    wet, dry = read(results, "dropout-211"), read(results, "fp32-211")
    config = alone(LIKE_LOCAL[0].config)
    assert distances(wet, dry)["loss"] > 100 * bounds(config, 5)["loss"]


@pytest.mark.parametrize(
    ("load", "again_under"),
    [
        ("fp16-221", ["again-111", "again-122", "again-211"]),
        ("fp16-212-zero3", ["again-112-zero1", "again-211-zero0", "again-112-zero3", "again-112-zero2"]),
    ],
)
def test_a_checkpoint_is_the_same_bits_under_every_topology_and_stage_of_zero(results, load, again_under):
    written = read(results, load)
    for name in again_under:
        again = read(results, name)
        for one, other in ((written.model, again.model), (written.optimizer, again.optimizer)):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[key], other[key]) for key in one)
        assert again.state["engine"] == written.state["engine"]


@pytest.mark.parametrize("name", ["fp16-221", "fp16-212-zero3"])
def test_any_topologys_checkpoint_continues_in_one_process(results, name):
    """The local engine's masters and moments are those of the file."""
    written = read(results, name)
    engine = LocalEngine(alone(worlds.world("", (1, 1, 1), precision="fp16").config))
    engine.load_tensors(written.model, written.optimizer)
    engine.load_state_dict(written.state["engine"])
    weights, moments = engine.tensors()
    assert all(torch.equal(weights[name], written.model[name]) for name in written.model)
    assert all(torch.equal(moments[name], written.optimizer[name]) for name in written.optimizer)
    assert engine.state_dict() == written.state["engine"]
    assert sum(applied for _, _, applied in written.state["curve"]) == engine.optimizer.updates


@pytest.mark.parametrize(
    "one", [w for w in worlds.worlds() if w.name.startswith("fp32")], ids=lambda w: w.name
)
def test_no_element_is_kept_twice(results, one):
    """Masters and moments take exactly the model's size over all ranks, spread evenly within a stage."""
    ((_, path),) = checkpoints.list_checkpoints(results / one.name)
    held = [int(file.read_text()) for file in (results / one.name).glob("held-*")]
    whole = sum(tensor.numel() for tensor in checkpoints.load(path).model.values())
    assert len(held) == one.ranks
    assert sum(held) == whole
    if one.config.parallel.pipeline == 1:
        assert max(held) - min(held) <= len(checkpoints.load(path).model)


# Numbers from a sample of a tensor's elements; each rank samples others.
SAMPLED = {
    "update": {"rms", "weight_rms", "ratio"},
    "activation": {"outlier_6rms_fraction", "massive_fraction"},
}
TIMES = {"seconds", "data_seconds"}


def measured(run: Path):
    """Every number of a run by (step, family, site, statistic, index), without times and what is sampled."""
    table = load_run(run).telemetry.drop_duplicates(KEY, keep="last")
    kept = [
        not (s in TIMES or s in SAMPLED.get(f, ()) or s.startswith("quantile"))
        for f, s in zip(table.family, table.statistic, strict=True)
    ]
    return table[kept].set_index(KEY)["value"]


KEY = ["step", "family", "site", "statistic", "index"]


@pytest.mark.parametrize("axes", worlds.WATCHED, ids=str)
def test_telemetry_has_the_local_runs_names_and_values(results, data_folder, tmp_path, axes):
    assert main(worlds.command(data_folder, tmp_path / "local", (1, 1, 1, 1))) == 0
    ours, theirs = measured(tmp_path / "local"), measured(results / ("watched-" + "".join(map(str, axes))))
    if axes[3]:
        # ZeRO spreads a gradient in flat pieces: no rank has rows of it, and the probe records none.
        ours = ours[~ours.index.get_level_values("statistic").astype(str).str.startswith("top_row")]
    assert set(ours.index) == set(theirs.index)
    counts = [key for key in ours.index if str(key[3]).endswith("_elements")]
    check_counts(ours[counts], theirs[counts], axes)
    ours, theirs = ours.drop(counts), theirs.drop(counts)
    together = ours.to_frame("ours").join(theirs.to_frame("theirs"))
    # fp32 sums over 256 tokens and up to 96 channels, four layers deep, each off by 2^-24 sqrt(terms) of their size: 1e-5; means
    # are of both signs, hence small beside what they are means of.
    size = together.ours.abs().clip(lower=1e-3)
    # An element that stands on a threshold counts on either side of it: of the 256 x 32 elements of the smallest site, one.
    share = together.index.get_level_values("statistic").astype(str).str.endswith("_fraction")
    apart = ((together.ours - together.theirs).abs() - np.where(share, 1 / (256 * 32), 0.0)).clip(
        lower=0
    ) / size
    apart = apart.dropna()
    assert (together.ours.isna() == together.theirs.isna()).all()
    assert apart.max() < 1e-3, apart.sort_values().tail(5)
    assert apart.median() < 1e-6


def check_counts(ours, theirs, axes):
    """Each element counts once for every place where its gradient is accumulated."""
    _, p, d, zero = axes
    once, here = (table.xs("gradient_elements", level="statistic") for table in (ours, theirs))
    matrix = 1000 * 32  # vocabulary x hidden: on both ends of a pipeline
    assert here.tolist() == [n if zero >= 2 else d * (n + (p - 1) * matrix) for n in once]
    if zero >= 2:
        # The same sums in another order: a zero in one run and not in the other is chance.
        assert theirs.tolist() == pytest.approx(ours.tolist(), rel=1e-4)


def test_what_one_process_notices_all_respond_to(results, data_folder):
    """Every rank goes back to the same step and trains on the same rows as one process."""
    config = alone(worlds.responding(worlds.RESPONDING))
    ours = worlds.respond(config, LocalEngine(config), data_folder, True)
    steps = [step for step, _, _ in ours]
    assert steps == [*range(7), *range(steps[7], 10)]
    assert steps[7] <= 6
    for rank in range(4):
        theirs = json.loads((results / f"responding-{rank}.json").read_text())
        assert [(step, first) for step, first, _ in theirs] == [(step, first) for step, first, _ in ours]
        # Losses near ln 1000, of weights that ten updates of rounding errors have moved apart.
        assert max(abs(a[2] - b[2]) for a, b in zip(ours, theirs, strict=True)) < 1e-4


def test_replicas_build_each_row_once():
    """However rows and micro-batches divide, and in the order of one process."""
    from glm.parallel.engine import ParallelEngine

    for rows, micro, replicas in itertools.product(range(1, 10), range(1, 5), range(1, 4)):
        built = []
        for replica in range(replicas):
            one = SimpleNamespace(micro_rows=micro, replica=replica, topology=SimpleNamespace(data=replicas))
            own = ParallelEngine.own_rows(one, rows)
            assert own.start % micro == 0 or not own
            built += own
        assert built == list(range(rows))


def test_a_replica_without_rows_builds_an_empty_batch(data):
    config = spiking("none")
    batch = Loader(data, config.objective, config.sampling, length=64, seed=0).samples(range(0))
    assert batch.tokens_BT.shape == batch.targets_BT.shape == (0, 64)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_spike_that_one_process_detects_is_answered_by_all(results, data, policy):
    """Real spikes, the real detector on the first process only: the other process takes the same steps on the same rows to the last
    bit, and the run is that of one process."""
    zero, one = (json.loads((results / f"spiking-{rank}.json").read_text())[policy] for rank in (0, 1))
    assert zero == one
    ours = answer(spiking(policy), LocalEngine(spiking(policy)), data)
    assert [tuple(d) for d in zero["decisions"]] == ours["decisions"]
    kinds = {kind for _, kind in ours["decisions"]}
    assert ({"skip-batch", "clip"} if policy == "escalate" else {policy}) <= kinds
    assert ("rewind" in kinds) == (policy != "lower-rate")
    assert [tuple(s[:2]) for s in zero["steps"]] == [s[:2] for s in ours["steps"]]
    rows = [first for _, first, _ in ours["steps"]]
    assert all(rows.count(bad * ROWS) <= 1 for bad in BAD_STEPS)

    apart = [abs(x[2] - y[2]) for x, y in zip(zero["steps"], ours["steps"], strict=True)]
    before = [step for step, _, _ in ours["steps"]].index(BAD_STEPS[0])
    # Sums in another order move a loss by a few units in its last place. A spike multiplies that: four orders of summing in one
    # process were up to 1.3e-6 apart before it and 1.2e-4 after (texts of Python 3.11.2 and 3.11.7). Another batch is .01 or more.
    assert max(apart[:before]) <= 8 * 2.0**-23 * max(loss for _, _, loss in ours["steps"][:before])
    assert max(apart[before:]) < 1e-3


@pytest.fixture
def split_losses(results):
    return torch.load(results / "split-losses.pt", weights_only=True)


def test_small_probabilities_are_not_lost_in_fp16_of_a_shared_vocabulary(split_losses):
    """As with one process (``tests/glm/model/test_vocabulary_loss.py`` derives the bound)."""
    dtype, gap, _, scale, _ = CASES["lifted"]
    hidden, weight, target = inputs(dtype, gap)
    h, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    (scale * torch.nn.functional.cross_entropy(h @ w.T, target, reduction="sum")).backward()
    others = torch.arange(weight.shape[0]) != 3
    error = (split_losses["lifted"]["weight"].double() - w.grad)[others].abs()
    assert (error <= 2.0**-6 * w.grad[others].abs().amax()).all()
    assert not split_losses["not lifted"]["weight"][others].any()


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_native_half_gradients_of_a_shared_vocabulary_are_float64s(split_losses, name):
    dtype, gap, z_loss, scale, _ = CASES[name]
    found = split_losses[name]
    hidden, weight, target = inputs(dtype, gap)
    h, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    logits = h @ w.T
    exact = torch.nn.functional.cross_entropy(logits, target, reduction="sum")
    exact = exact + z_loss * logits.logsumexp(1).square().sum()
    (scale * exact).backward()
    u = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    assert float(found["loss"]) == pytest.approx(exact.item(), rel=16 * u)
    for mine, theirs in ((found["hidden"], h.grad), (found["weight"], w.grad)):
        assert (mine.double() - theirs).abs().max() <= 16 * u * theirs.abs().max()
