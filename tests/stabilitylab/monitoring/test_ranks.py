"""Two processes: their telemetry equals that of one process with all the data, and one of them writes it."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from stabilitylab import Monitor, Schedule
from stabilitylab.telemetry import Event
from tests.stabilitylab.gpt import GPT, batch, next_token_loss
from tests.stabilitylab.recording import Recording

pytestmark = pytest.mark.distributed
Rows = dict[tuple[int, str, int], float]


class Alarm:
    """Raises a spike at one step."""

    def update(self, step: int, values: object) -> list[Event]:
        return [Event(step=step, kind="spike")] if step == 1 else []

    def finish(self) -> list[Event]:
        return []

    def state_dict(self) -> dict[str, object]:
        return {}

    def load_state_dict(self, state: object) -> None:
        pass


def data_parallel(rank: int, out: Path) -> None:
    """Each rank takes half of the rows of every batch. The alarm of rank 0 makes both measure more densely."""
    torch.manual_seed(0)
    model = DistributedDataParallel(GPT())
    sink = Recording()
    schedule = Schedule(every=4, dense_steps=2)
    with Monitor(model, schedule=schedule, sinks=[sink], detector=Alarm()) as monitor:
        for step in range(8):
            next_token_loss(model, batch(step)[:2][rank : rank + 1]).backward()
            monitor.step(step)
            model.zero_grad()
    _keep(sink, rank, out)


def fully_sharded(rank: int, out: Path) -> None:
    """Parameters and gradients are shards (FSDP2)."""
    torch.manual_seed(0)
    model = GPT()
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    sink = Recording()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with Monitor(model, optimizer, every=1, sinks=[sink], detector=None) as monitor:
        next_token_loss(model, batch(0)[:2][rank : rank + 1]).backward()
        optimizer.step()
        monitor.step(0)
    _keep(sink, rank, out)


def clipped_when_joined(rank: int, out: Path) -> None:
    """torchtitan's way: it joins the shards' norm between torch's two calls. No step is measured: only these give the norm."""
    torch.manual_seed(0)
    model = GPT()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    sink = Recording()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, optimizer, every=0, sinks=[sink], detector=None) as monitor:
        for step in range(4):
            next_token_loss(model, batch(step)[:2][rank : rank + 1]).backward()
            whole = get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).full_tensor()
            halves = list(model.parameters())[::2], list(model.parameters())[1::2]
            # In one, in two groups by one norm, by another's norm, and by the largest gradient.
            if step == 0:
                clip_grads_with_norm_(model.parameters(), 0.1, whole)
            elif step == 1:
                for half in halves:
                    clip_grads_with_norm_(half, 0.1, whole)
            else:
                get_total_norm([torch.ones(3)], 2.0 if step == 2 else math.inf)
                clip_grads_with_norm_(model.parameters(), 0.1, whole)
            optimizer.step()
            optimizer.zero_grad()
            monitor.step(step)
    _keep(sink, rank, out)


class Stage(nn.Module):
    """Half of the GPT's layers, under the names that the whole model has for them."""

    def __init__(self, whole: GPT, rank: int) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(rank): whole.layers[rank]})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x


def pipeline(rank: int, out: Path) -> None:
    """Each rank has its own layers, and sees other sites from the second step on."""
    torch.manual_seed(0)
    whole, sink = GPT(), Recording()
    stage = Stage(whole, rank)
    x = whole.embedding(batch(0)[:2, :-1]).detach()
    if rank == 1:
        x = whole.layers[0](x).detach()
    with Monitor(stage, every=1, sinks=[sink], detector=None) as monitor:
        for step in range(3):
            if step < 2:
                stage(x).sum().backward()
            elif rank == 0:
                stage.layers["0"].attention_norm(x).sum().backward()
            monitor.step(step)
            stage.zero_grad()
    _keep(sink, rank, out)


class Heads(nn.Module):
    """Heads of an attention module, all of them or a rank's part."""

    def __init__(self, heads: slice) -> None:
        super().__init__()
        weight = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))[:, heads]
        self.query_key_value = nn.Linear(1, 1, bias=False)
        self.query_key_value.weight = nn.Parameter(weight.reshape(-1, 6))
        self.count = weight.shape[1]

    def forward(self, x_BTD: Tensor) -> Tensor:
        qkv = self.query_key_value(x_BTD)
        q, k, v = qkv.unflatten(-1, (3, self.count, 5)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


class Part(nn.Module):
    """A tensor-parallel rank's part of a model: of its vocabulary of 24, and of its 4 heads."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        rows, heads = (slice(rank * n // size, (rank + 1) * n // size) for n in (24, 4))
        generator = torch.Generator().manual_seed(1)
        weight, gradient = torch.randn(2, 24, 6, generator=generator)
        self.embedding = nn.Embedding.from_pretrained(weight[rows], freeze=False)
        self.embedding.weight.grad = gradient[rows]
        self.attention = Heads(heads)
        self.norm = nn.LayerNorm(6)

    def forward(self, x_BTD: Tensor) -> Tensor:
        y: Tensor = self.attention(self.norm(x_BTD))
        return y


def tensor_parallel(rank: int, out: Path, size: int = 2) -> None:
    """Each rank has a part of the heads and of the vocabulary."""
    model, sink = Part(rank, size), Recording()
    optimizer = torch.optim.AdamW(model.parameters())
    layer = "attention.query_key_value"
    sharded = ["embedding.weight", "attention", layer, f"{layer}.weight"]
    with Monitor(
        model, optimizer, every=1, sinks=[sink], detector=None, sharded=sharded, shard=rank
    ) as monitor:
        x_BTD = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(1))
        model(x_BTD).square().sum().backward()
        for parameter in model.norm.parameters():
            parameter.grad = torch.ones(6)
        optimizer.step()
        monitor.step(0)
    _keep(sink, rank, out)


COLLECTIVE = ("all_", "broadcast", "gather", "reduce", "scatter", "send", "recv", "isend", "irecv", "barrier")


def counted(rank: int, out: Path) -> None:
    """Collectives of each step, gradients every step and the rest every third; as rows of rank 0."""
    calls: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in vars(dist):
            function = getattr(dist, name)
            if name.startswith(COLLECTIVE) and callable(function):
                patch.setattr(dist, name, _counting(calls, name, function))
        torch.manual_seed(0)
        model = GPT()
        optimizer, rows = torch.optim.Adam(model.parameters()), {}
        schedule = Schedule(every=3, probes={"gradients": 1})
        with Monitor(model, optimizer, schedule=schedule, sinks=[Recording()], detector=None) as monitor:
            for step in range(10):
                next_token_loss(model, batch(step)[:1]).backward()
                optimizer.step()
                calls.clear()
                monitor.step(step)
                rows |= {(step, name, -1): float(calls.count(name)) for name in set(calls)}
                model.zero_grad()
    kept = (rows, []) if rank == 0 else ({}, [])
    (out / f"{rank}.pickle").write_bytes(pickle.dumps(kept))


def _counting(calls: list[str], name: str, function: Callable[..., object]) -> Callable[..., object]:
    def call(*args: object, **kwargs: object) -> object:
        calls.append(name)
        return function(*args, **kwargs)

    return call


def _keep(sink: Recording, rank: int, out: Path) -> None:
    (out / f"{rank}.pickle").write_bytes(pickle.dumps((sink.rows, sink.events)))


def _process(rank: int, work: Callable[[int, Path], None], out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=2)
    try:
        work(rank, out)
    finally:
        dist.destroy_process_group()


def run(work: Callable[[int, Path], None], out: Path) -> Rows:
    """Rank 0's rows; rank 1 must have written nothing."""
    # Forked, ranks need not import everything again; where there is a device, autograd has threads, which do not outlive a fork.
    method = "spawn" if torch.cuda.is_available() else "fork"
    mp.start_processes(_process, args=(work, out), nprocs=2, start_method=method)
    kept = [pickle.loads((out / f"{rank}.pickle").read_bytes()) for rank in (0, 1)]
    assert kept[1] == ({}, [])
    rows: Rows = kept[0][0]
    return rows


def alone(steps: int = 1) -> Rows:
    """One process with all the data."""
    torch.manual_seed(0)
    model, sink = GPT(), Recording()
    with Monitor(model, every=1, sinks=[sink], detector=None) as monitor:
        for step in range(steps):
            next_token_loss(model, batch(step)[:2]).backward()
            monitor.step(step)
            model.zero_grad()
    return sink.rows


COMBINED = ("activation/", "attention/", "gradient/", "train/-/gradient_norm")
# These look at a part of the data that each rank chooses for itself.
SAMPLED = ("outlier_6rms_fraction", "massive_fraction", "entropy", "score_max_sampled", "score_min")


def compare(found: Rows, expected: Rows, step: int) -> None:
    names = {name for s, name, _ in expected if s == step and name.startswith(COMBINED)}
    assert names == {name for s, name, _ in found if s == step and name.startswith(COMBINED)}
    for (s, name, index), value in expected.items():
        if s == step and name.endswith("score_max"):  # a bound, the tighter the smaller the parts
            assert found[s, name, index] <= value + 1e-5
        elif s == step and name in names and not name.endswith((*SAMPLED, "fp16_headroom_bits")):
            # Quantiles are known to a bin; float32 sums and means over ranks are formed in other orders.
            room = 0.126 if "quantile" in name else 2e-4
            assert found[s, name, index] == pytest.approx(value, rel=room, abs=1e-7, nan_ok=True), name


def test_data_parallel_ranks_combine_exactly_and_share_alarms(tmp_path: Path) -> None:
    found = run(data_parallel, tmp_path)
    measured = sorted({step for step, name, _ in found if name == "activation/layers.0/rms"})
    # The alarm at step 1 is known to all after the exchange of step 4, too late for 2 and 3.
    assert measured == [0, 4]
    expected = alone(5)
    compare(found, expected, 0)
    compare(found, expected, 4)


def test_a_flush_is_one_collective(tmp_path: Path) -> None:
    found = run(counted, tmp_path)
    # Each of the two sets of probes is new once; ranks then exchange its manifest and size, and not again.
    assert {(step, name) for step, name, _ in found if name != "all_gather"} == {
        (0, "all_gather_object"),
        (1, "all_gather_object"),
    }
    for step in range(10):
        assert found[step, "all_gather", -1] == (2 if step < 2 else 1)


def test_shards_of_parameters_add_up(tmp_path: Path) -> None:
    found = run(fully_sharded, tmp_path)
    compare(found, alone(), 0)
    for name, _ in GPT().named_parameters():
        # Adam's first step is the rate for every weight with a gradient well above epsilon: nearly all.
        if name.endswith("output.weight"):
            assert found[0, f"update/{name}/rms", -1] == pytest.approx(1e-3, rel=1e-2)
            assert found[0, f"update/{name}/rms_t", -1] == pytest.approx(1.0, rel=1e-2)


def test_a_norm_joined_before_clipping_is_that_of_the_step(tmp_path: Path) -> None:
    found = run(clipped_when_joined, tmp_path)
    torch.manual_seed(0)
    model = GPT()
    next_token_loss(model, batch(0)[:2]).backward()
    norm = get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert {key[0] for key in found if key[1] == "train/-/gradient_norm"} == {0}
    # float32 sums, over other parts on two ranks
    assert found[0, "train/-/gradient_norm", -1] == pytest.approx(float(norm), rel=1e-5)


def test_pipeline_ranks_are_joined_by_name(tmp_path: Path) -> None:
    found = run(pipeline, tmp_path)
    for step in (0, 1):
        sites = {name.split("/")[1] for s, name, _ in found if s == step and name.startswith("attention/")}
        assert sites == {"layers.0.attention", "layers.1.attention"}
    last = {name.split("/")[1] for s, name, _ in found if s == 2 and name.startswith("activation/")}
    assert last == {"layers.0.attention_norm", "layers.0.attention_norm:input"}


def test_tensor_parallel_ranks_are_one_model(tmp_path: Path) -> None:
    found = run(tensor_parallel, tmp_path)
    tensor_parallel(0, tmp_path, size=1)
    expected, _ = pickle.loads((tmp_path / "0.pickle").read_bytes())
    assert set(found) == set(expected)
    for key, value in expected.items():
        # The gradient of what all ranks have is not summed over them here, as tensor parallelism would do.
        if not key[1].endswith(SAMPLED) and not key[1].startswith("activation_gradient/norm/"):
            assert found[key] == pytest.approx(value, rel=1e-5, abs=1e-6, nan_ok=True), key


def test_ddp_of_one_process_is_no_clipping_by_hand(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model, sink = DistributedDataParallel(nn.Linear(8, 2)), Recording()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with Monitor(model, optimizer, every=1, sinks=[sink], detector=None) as monitor:
            for step in range(3):
                model(torch.randn(4, 8)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                monitor.step(step)
    finally:
        dist.destroy_process_group()
    assert (2, "gradient/weight/l2", -1) in sink.rows
    assert not sink.events
