"""Merging the numbers of several ranks: data-parallel, tensor-parallel, and both."""

from __future__ import annotations

import numpy as np
import torch

from stabilitylab.probes.base import Found, Placing
from stabilitylab.statistics import native
from stabilitylab.statistics.buffer import Buffer
from stabilitylab.statistics.gathering import Gathered
from stabilitylab.statistics.summary import COLUMN, Summary, add_all
from stabilitylab.statistics.summary_batch import SummaryBatch

CPU = torch.device("cpu")


def test_two_by_two_ranks() -> None:
    """Ranks 0 and 1 hold the shards for one half of the data, ranks 2 and 3 for the other."""
    whole_N, seen = torch.randn(40, generator=torch.Generator().manual_seed(0)), []
    for rank in range(4):
        buffer, shard = Buffer(), rank % 2
        gradient = Summary(buffer, region="shards")
        gradient.add(whole_N.chunk(2)[shard])
        regions = {"maxima": 10.0 * rank, "head_sums": 1.0 + shard, "sums": 1.0, "lists": float(shard)}
        slots = {region: buffer.reserve(region, 2, CPU) for region in regions}
        for region, value in regions.items():
            buffer.put(slots[region], torch.tensor([value, value + 0.5], dtype=torch.float64))
        found = Found(sites=("w",), slots=[(gradient.row, *slots.values())])
        placing = Placing(lambda site: True, shard)
        seen.append((placing.seen(found, buffer), buffer.parts()[0].numpy().copy()))
    gathered = Gathered(seen)
    ((row, maxima, head_sums, sums, lists),) = gathered.numbers
    assert gathered.sites == ("w",)
    assert gathered.shards(0) == 2
    assert row is not None
    assert row[COLUMN["count"]] == 40
    assert row[COLUMN["absmax"]] == whole_N.abs().max()
    np.testing.assert_allclose(row[COLUMN["s2"]], whole_N.double().square().sum(), rtol=1e-6)
    np.testing.assert_array_equal(maxima, [20, 20.5, 30, 30.5])
    np.testing.assert_array_equal(head_sums, [2, 3, 4, 5])
    np.testing.assert_array_equal(sums, [4, 6])
    np.testing.assert_array_equal(lists, [0, 0.5, 1, 1.5])


def test_a_batch_is_what_its_tensors_are_one_by_one() -> None:
    """The same kind again, another dtype, strides, a float64 that the kernel does not take, a buffer that has moved."""
    buffer, alone = Buffer(), Buffer()
    summaries = [Summary(buffer, region="replicated") for _ in range(3)]
    batch = SummaryBatch(buffer, summaries)
    plain = [(5, 3), (7,), ()]
    kinds = [lambda x: x, lambda x: x, lambda x: x.bfloat16(), lambda x: x.t() if x.dim() == 2 else x]
    kinds += [lambda x: x, lambda x: x, lambda x: x.double(), lambda x: x, lambda x: x]
    remembered = []
    for step, kind in enumerate(kinds):
        tensors = [kind(torch.randn(shape)) for shape in plain]
        if step == len(kinds) - 1:
            buffer.reserve("replicated", 10_000, CPU)
        buffer.advance()
        batch.take([torch.full_like(x, 1e9) for x in tensors])  # replaced by the second reading
        remembered.append(batch.take(tensors))
        alone.advance()
        expected = [Summary(alone) for _ in tensors]
        add_all(list(zip(expected, tensors, strict=True)))
        for summary, one in zip(summaries, expected, strict=True):
            assert summary.seen
            assert summary.row is not None
            assert one.row is not None
            torch.testing.assert_close(buffer.view(summary.row), alone.view(one.row), rtol=1e-6, atol=1e-9)
    # What is not contiguous and what is float64 is not for the kernel; all others are known the second time.
    if native.kernel() is not None:
        assert remembered == [True, True, True, False, True, True, False, True, True]
