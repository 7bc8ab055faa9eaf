"""Sample i is a function of (seed, i)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from glm.data.config import DataConfig, ObjectiveConfig
from glm.data.loader import Loader
from glm.data.random import bits, shuffled, uniform
from glm.data.shards import open_data
from glm.errors import InputError

FIELDS = ("tokens_BT", "targets_BT", "positions", "segments_BT", "context_BT")


def same(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in FIELDS)


@pytest.mark.parametrize("kind", ["glm", "causal", "span-corruption"])
def test_order_company_and_process_do_not_matter(data, data_folder, kind):
    objective = ObjectiveConfig(kind=kind)
    loader = Loader(data, objective, length=64, seed=7)
    together = loader.samples(range(40))
    again = Loader(open_data(data_folder), objective, length=64, seed=7)
    order = [31, 2, 17, 2, 39]
    apart = again.samples(order)
    for place, number in enumerate(order):
        for name in FIELDS:
            assert torch.equal(getattr(apart, name)[place], getattr(together, name)[number])
        assert apart.provenance[place] == together.provenance[number]
    assert not same(loader.samples(range(8)), Loader(data, objective, length=64, seed=8).samples(range(8)))


def test_batches_of_any_size_are_the_same_stream(data):
    loader = Loader(data, ObjectiveConfig(), length=64, seed=1)
    assert same(loader.batch(3, 4), loader.samples(range(12, 16)))


def test_an_epoch_reads_every_block_once(data):
    loader = Loader(data, ObjectiveConfig(kind="causal"), length=512, seed=0)
    blocks = loader.blocks[""]
    begin, total = {}, 0
    for shard in data.shards["train"]:
        begin[shard.path.name], total = total, total + shard.tokens
    for epoch in range(3):
        rows = loader.samples(range(epoch * blocks, (epoch + 1) * blocks))
        firsts = sorted(begin[row[0].source] + row[0].first for row in rows.provenance)
        assert len(set(firsts)) == blocks
        assert (np.diff(firsts) == 512).all()
        assert all(sum(piece.length for piece in row) == 512 for row in rows.provenance)


def test_causal_rows_are_the_stream(data):
    loader = Loader(data, ObjectiveConfig(kind="causal"), length=64, seed=0)
    batch = loader.samples([5])
    (where,) = batch.provenance[0]
    stream = data.shards["train"][0].stream[where.first : where.first + 65].astype(np.int64)
    assert batch.tokens_BT[0].tolist() == stream[:-1].tolist()
    assert batch.targets_BT[0].tolist() == stream[1:].tolist()


def test_skipped_ranges_move_the_rest_up(data):
    plain = Loader(data, ObjectiveConfig(), length=64, seed=0)
    skipping = Loader(data, ObjectiveConfig(), DataConfig(skip=((2, 5), (7, 8))), length=64, seed=0)
    assert same(skipping.samples(range(6)), plain.samples([0, 1, 5, 6, 8, 9]))


def test_documents_of_a_piece_are_named(data):
    loader = Loader(data, ObjectiveConfig(), length=64, seed=0)
    (where,) = loader.samples([0]).provenance[0]
    shard = data.shards["train"][0]
    named = loader.documents(where)
    number = int(named[0].rpartition(" ")[2])
    assert shard.offsets[number] <= where.first < shard.offsets[number + 1]


def test_a_split_too_small_for_a_row_is_refused(data):
    with pytest.raises(InputError, match="fewer than one row"):
        Loader(data, ObjectiveConfig(), length=10_000_000, seed=0)


@pytest.mark.parametrize("size", [1, 2, 3, 10, 64, 1000, 4097])
def test_shuffled_is_a_permutation(size):
    assert sorted(shuffled(3, np.arange(size), size).tolist()) == list(range(size))


def test_draws_look_uniform_and_independent():
    u = uniform(0, np.arange(200)[:, None], np.arange(100))
    # Mean and lag correlations of 20,000 uniform numbers: five deviations.
    assert abs(u.mean() - 0.5) < 5 * np.sqrt(1 / 12 / u.size)
    for shifted in (u[1:], u[:, 1:]):
        other = u[:-1] if shifted.shape[0] < 200 else u[:, :-1]
        assert abs(np.corrcoef(shifted.ravel(), other.ravel())[0, 1]) < 5 / np.sqrt(shifted.size)
    assert len(np.unique(bits(1, np.arange(1000)[:, None], np.arange(100)))) == 100_000
