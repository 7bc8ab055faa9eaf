"""Topology, shares and starting: pure functions, by enumeration."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys

import pytest
import torch

from glm.distributed.config import ParallelConfig
from glm.distributed.launch import check_started, first_node, place
from glm.errors import InputError
from glm.model.config import AttentionConfig, EmbeddingConfig, FeedForwardConfig, ModelConfig
from glm.model.transformer import Transformer
from glm.parallel.checkpoint import writers
from glm.parallel.partition import Cut, shares, stage_of
from glm.parallel.sharded_init import build, shapes_of
from glm.parallel.topology import Topology, checked

AXES = [
    Topology(tensor=t, pipeline=p, data=d) for t, p, d in itertools.product((1, 2, 4), (1, 2, 3), (1, 2, 3))
]
MODELS = [
    ModelConfig(vocabulary=24, layers=4, hidden=16, heads=4, length=8),
    ModelConfig(
        vocabulary=24,
        layers=3,
        hidden=16,
        heads=4,
        length=8,
        norm="sandwich",
        embedding=EmbeddingConfig(tied=False, norm=True),
        attention=AttentionConfig(positions="learned", qk_norm=True),
        feed_forward=FeedForwardConfig(kind="relu"),
    ),
]


@pytest.mark.parametrize("model", MODELS, ids=["glm", "other"])
@pytest.mark.parametrize("topology", AXES, ids=str)
def test_every_element_is_on_exactly_one_rank_and_comes_back(topology, model):
    built = Transformer(model)
    tensors = {
        name: torch.arange(p.numel(), dtype=torch.float32).view(p.shape)
        for name, p in built.named_parameters()
    }
    laid = shares({name: tensor.shape for name, tensor in tensors.items()}, model, topology)
    for name, whole in tensors.items():
        share = laid[name]
        kept = {rank: share.share(share.part(whole, rank), rank) for rank in share.ranks()}
        together = torch.cat([part.reshape(-1) for part in kept.values()])
        assert torch.equal(together.sort().values, whole.reshape(-1)), name
        assert torch.equal(share.whole(kept), whole), name


@pytest.mark.parametrize("topology", AXES, ids=str)
def test_copies_are_whole_and_the_first_counts(topology):
    built = dict(Transformer(MODELS[0]).named_parameters())
    shapes = {name: p.shape for name, p in built.items()}
    for name, share in shares(shapes, MODELS[0], topology, zero=0).items():
        spread = shares(shapes, MODELS[0], topology)[name]
        kept = {
            rank: share.share(share.part(built[name], rank), rank)
            for ranks in share.holders
            for rank in ranks
        }
        assert kept.keys() == set(spread.ranks())
        assert all(torch.equal(part, spread.part(built[name], rank)) for rank, part in kept.items())
        assert len(share.ranks()) == len(share.holders)
        assert torch.equal(share.whole(kept), built[name])


@pytest.mark.parametrize("zero", [2, 3])
def test_stages_of_zero_that_a_pipeline_cannot_have(zero):
    with pytest.raises(InputError, match=r"use parallel.zero 1, or parallel.pipeline 1") as refusal:
        ParallelConfig(zero=zero, pipeline=2, data=2)
    assert "\n" not in str(refusal.value)
    assert ParallelConfig(zero=zero, data=1).zero == zero


def test_a_cut_keeps_heads_and_gates_whole():
    """Of q, k, v with 4 heads of 2, the second of two ranks has heads 2 and 3 of each."""
    rows = torch.arange(24)[:, None]
    part = Cut(dim=0, blocks=3).part(rows, 1, 2)
    assert part[:, 0].tolist() == [4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23]


@pytest.mark.parametrize("cut", [Cut(dim=0), Cut(dim=0, blocks=3), Cut(dim=1)], ids=str)
def test_a_part_does_not_keep_the_whole_in_memory(cut):
    part = cut.part(torch.zeros(24, 4), 1, 2)
    assert part.untyped_storage().nbytes() == part.numel() * part.element_size()


def test_ranks_are_neighbours_in_tensor_then_data_then_pipeline():
    topology = Topology(tensor=2, pipeline=2, data=3)
    assert [topology.coordinates(rank) for rank in (0, 1, 2, 6, 11)] == [
        (0, 0, 0),
        (0, 0, 1),
        (0, 1, 0),
        (1, 0, 0),
        (1, 2, 1),
    ]
    assert all(topology.rank(*topology.coordinates(rank)) == rank for rank in range(topology.world))


def test_every_module_has_a_stage():
    model = ModelConfig(vocabulary=24, layers=70, hidden=16, heads=4, length=8)
    assert [stage_of(f"layers.{layer}.attention", model, 8) for layer in (0, 7, 8, 16, 17, 69)] == [
        0,
        0,
        1,
        1,
        2,
        7,
    ]
    assert stage_of("embedding", model, 8) == 0
    assert stage_of("final_norm.weight", model, 8) == 7


def test_ranks_write_about_as_much_as_each_other():
    model = dataclasses.replace(MODELS[0], layers=8)
    shapes = {name: p.shape for name, p in Transformer(model).named_parameters()}
    laid = shares(shapes, model, Topology(tensor=2, pipeline=1, data=2))
    load = dict.fromkeys(range(4), 0)
    for name, rank in writers(laid).items():
        load[rank] += shapes[name].numel()
    largest = max(shape.numel() for shape in shapes.values())
    assert max(load.values()) - min(load.values()) <= largest


@pytest.mark.parametrize(
    ("axes", "change", "named"),
    [
        ({"tensor": 3}, {}, "model.heads 4"),
        ({"tensor": 2}, {"vocabulary": 25}, "model.vocabulary 25: change one of them; 26 would do"),
        ({"tensor": 2}, {"feed_forward": FeedForwardConfig(inner=33)}, "model.feed_forward.inner 33"),
        ({"pipeline": 5}, {}, "model.layers is 4"),
        ({"tensor": 2}, {"vocabulary": None}, "model.vocabulary is not set"),
    ],
)
def test_what_a_topology_does_not_divide_is_named(axes, change, named):
    with pytest.raises(InputError, match=named) as refusal:
        checked(ParallelConfig(**axes), dataclasses.replace(MODELS[0], **change))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "wrong",
    [{"tensor": 0}, {"pipeline": -1}, {"data": 0}, {"timeout": 0.0}, {"zero": 4}, {"zero": -1}],
)
def test_sizes_and_times_are_positive(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        ParallelConfig(**wrong)


def test_launchers_are_recognised():
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    slurm = {
        "SLURM_PROCID": "5",
        "SLURM_NTASKS": "8",
        "SLURM_LOCALID": "1",
        "SLURM_NODELIST": "gpu[03-06]",
        "SLURM_STEP_ID": "0",
    }
    assert place({}) is None
    assert place({name: value for name, value in slurm.items() if name != "SLURM_STEP_ID"}) is None
    here = place(torchrun)
    assert here is not None
    assert (here.rank, here.world, here.local_rank, here.master, here.port) == (3, 4, 1, "a", "1")
    here = place(slurm)
    assert here is not None
    assert (here.rank, here.world, here.local_rank, here.master) == (5, 8, 1, "gpu03")


@pytest.mark.parametrize(
    ("nodes", "first"), [("a1", "a1"), ("a1,b2", "a1"), ("n[07,09-12],m1", "n07"), ("r[1-2]-ib", "r1-ib")]
)
def test_the_first_node_of_slurms_list(nodes, first):
    assert first_node(nodes) == first


def test_the_number_of_processes_is_compared(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match=r"torchrun --nproc-per-node 4"):
        check_started(ParallelConfig(tensor=2, data=2))
    check_started(ParallelConfig())
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"is 1, but 2 processes were started"):
        check_started(ParallelConfig())


@pytest.mark.parametrize("model", MODELS, ids=["glm", "other"])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_stages_draw_the_weights_of_one_process(model, stages):
    whole = dict(Transformer(model, 5).named_parameters())
    built = [build(model, stage=stage, stages=stages, tensor=None, seed=5) for stage in range(stages)]
    parts = [dict(part.named_parameters()) for part in built]
    assert set().union(*parts) == set(whole)
    assert all(torch.equal(tensor, whole[name]) for part in parts for name, tensor in part.items())
    tied = {"embedding.weight"} if model.embedding.tied and stages > 1 else set()
    assert {name for name in whole if sum(name in part for part in parts) > 1} == tied
    assert shapes_of(model) == {name: tensor.shape for name, tensor in whole.items()}


def test_to_build_a_rank_takes_no_symbolic_mathematics():
    """SymPy, and torch's modules that use it, would cost every rank half a second.

    torch 2.9 loads them for any layer on the meta device (it decomposes ``uniform_`` there); then nothing is ours to save.
    """
    program = """
import sys
import torch
from glm.model.config import ModelConfig
from glm.parallel.sharded_init import build
torch.nn.Linear(1, 1, device="meta")
torchs = "sympy" in sys.modules
model = ModelConfig(vocabulary=24, layers=2, hidden=16, heads=2, length=8)
build(model, stage=0, stages=1, tensor=None, seed=0)
print(torchs or "sympy" not in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
