"""Mixtures: shares, ramps, skipped ranges and rows across shards, as functions of (seed, sample)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from glm.data.config import DataConfig, ObjectiveConfig
from glm.data.loader import Loader
from glm.data.mixture import WINDOW, Mixture
from glm.data.shards import Shard, sha256
from glm.data.stream import Stream
from glm.errors import InputError

CAUSAL = ObjectiveConfig(kind="causal")


def naive_ranks(component_R):
    seen = {}
    ranks = []
    for component in component_R.tolist():
        ranks.append(seen.get(component, 0))
        seen[component] = ranks[-1] + 1
    return ranks


@pytest.mark.parametrize("weights", [[1.0], [0.5, 0.5], [0.7, 0.2999, 0.0001], [3, 0, 1], [1 / 40] * 40])
def test_shares_are_kept_and_ranks_count(weights):
    mixture = Mixture(weights, seed=5)
    sample = np.arange(20 * WINDOW)
    component, rank = mixture.place(sample)
    assert rank.tolist() == naive_ranks(component)
    share = np.asarray(weights) / sum(weights)
    for windows in range(1, 21):
        counts = np.bincount(component[: windows * WINDOW], minlength=len(weights))
        # Largest remainder with what is owed carried over: never more than one sample off, in rounding arithmetic.
        assert (np.abs(counts - windows * WINDOW * share) <= 1 + 1e-6).all()
    # Any order, any part, a fresh object: the same.
    order = np.random.default_rng(0).permutation(len(sample))[:500]
    again = Mixture(weights, seed=5).place(order)
    assert (again[0] == component[order]).all()
    assert (again[1] == rank[order]).all()


def test_a_window_is_shuffled():
    component, _ = Mixture([0.5, 0.5], seed=0).place(np.arange(WINDOW))
    # Runs of a random sequence of 512 + 512: mean 513, deviation 16.
    assert abs((np.diff(component) != 0).sum() - 512) < 80
    other, _ = Mixture([0.5, 0.5], seed=1).place(np.arange(WINDOW))
    assert (component != other).any()


def test_a_ramp_moves_the_shares_linearly():
    first, last = 10 * WINDOW, 30 * WINDOW
    mixture = Mixture([0.2, 0.8], [1.0, 0.0], (first, last), seed=0)
    component, rank = mixture.place(np.arange(40 * WINDOW))
    assert rank.tolist() == naive_ranks(component)
    shares = component.reshape(40, WINDOW).mean(1)
    middles = (np.arange(40) + 0.5) * WINDOW
    expected = 0.8 * np.clip((middles - first) / (last - first), 0, 1)
    assert (np.abs(shares - expected) <= 2 / WINDOW).all()
    assert mixture.weights_at(20 * WINDOW).tolist() == pytest.approx([0.6, 0.4])
    # A ramp of no length is a step.
    step = Mixture([0.0, 1.0], [1.0, 0.0], (WINDOW, WINDOW), seed=0)
    assert step.place(np.arange(2 * WINDOW))[0].tolist() == [0] * WINDOW + [1] * WINDOW


def languages(data, batch):
    known = {shard.path.name: shard.language for shard in data.shards["train"]}
    return [known[row[0].source] for row in batch.provenance]


def test_a_mixture_of_languages(data):
    config = DataConfig(mixture=(("zh", 3.0), ("en", 1.0)))
    loader = Loader(data, CAUSAL, config, length=64, seed=0)
    seen = languages(data, loader.samples(range(WINDOW)))
    assert seen.count("zh") == 3 * WINDOW // 4
    # Each component goes through its blocks, once an epoch.
    rows = loader.samples(range(4 * WINDOW))
    chinese = [
        row[0].first
        for row in rows.provenance
        if row[0].source == rows.provenance[seen.index("zh")][0].source
    ]
    blocks = loader.blocks["zh"]
    for epoch in range(len(chinese) // blocks):
        assert len(set(chinese[epoch * blocks : (epoch + 1) * blocks])) == blocks
    same = Loader(data, CAUSAL, config, length=64, seed=0).samples([77, 3])
    assert torch.equal(same.tokens_BT, loader.samples(range(100)).tokens_BT[[77, 3]])


def test_the_share_of_a_ramp_can_be_logged(data):
    config = DataConfig(
        mixture=(("zh", 1.0), ("pydoc", 1.0)),
        mixture_before=(("zh", 1.0),),
        mixture_ramp=(0, 100),
        skip=((10, 20),),
    )
    loader = Loader(data, ObjectiveConfig(), config, length=64, seed=0)
    assert loader.mixture_at(0) == {"zh": 1.0, "pydoc": 0.0}
    # Sample 40 has moved up to 50 behind the skipped range.
    assert loader.mixture_at(40) == pytest.approx({"zh": 0.75, "pydoc": 0.25})
    assert loader.mixture_at(1000) == pytest.approx({"zh": 0.5, "pydoc": 0.5})
    assert Loader(data, CAUSAL, length=64, seed=0).mixture_at(3) == {"": 1.0}


def test_skipping_and_mixing_together(data):
    mixture = (("zh", 1.0), ("en", 2.0))
    plain = Loader(data, ObjectiveConfig(), DataConfig(mixture=mixture), length=64, seed=4)
    skipping = Loader(data, ObjectiveConfig(), DataConfig(mixture=mixture, skip=((4, 9),)), length=64, seed=4)
    assert torch.equal(skipping.samples(range(2, 6)).tokens_BT, plain.samples([2, 3, 9, 10]).tokens_BT)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"mixture": (("zh", 1.0), ("zh", 1.0))}, "names a component twice"),
        ({"mixture": (("zh", -1.0),)}, "weights are 0 or more"),
        ({"mixture": (("zh", float("nan")),)}, "weights are 0 or more"),
        ({"mixture": (("zh", 0.0),)}, "not all 0"),
        ({"mixture": (("zh", 1.0),), "mixture_before": (("en", 1.0),)}, "mixture_before names en"),
        ({"mixture": (("zh", 1.0),), "mixture_ramp": (3, 4)}, "needs sampling.mixture_before"),
        ({"mixture_ramp": (4, 3)}, "FIRST <= LAST"),
        ({"skip": ((3, 3),)}, "FIRST < LAST"),
        ({"skip": ((5, 9), (1, 6))}, "5 9 overlaps another"),
    ],
)
def test_wrong_mixtures_are_refused(settings, says):
    with pytest.raises(InputError, match=says):
        DataConfig(**settings)


def test_components_that_are_not_there_or_overlap(data):
    with pytest.raises(
        InputError, match=r"names 'fr', which .* lacks .* it has documents.jsonl/zh, pydoc/en"
    ):
        Loader(data, CAUSAL, DataConfig(mixture=(("fr", 1.0),)), length=64, seed=0)
    with pytest.raises(InputError, match="pydoc/en belongs to pydoc and en"):
        Loader(data, CAUSAL, DataConfig(mixture=(("pydoc", 1.0), ("en", 1.0))), length=64, seed=0)
    with pytest.raises(InputError, match="tokens of zh in its train split, fewer than one row"):
        Loader(data, CAUSAL, DataConfig(mixture=(("zh", 1.0), ("en", 1.0))), length=20_000, seed=0)


def test_rows_go_on_across_shards(tmp_path):
    # Shards of 1 to 9 tokens: a row of 8 lies over up to several of them.
    sizes = [3, 9, 1, 2, 7, 5, 6]
    numbers = np.arange(sum(sizes), dtype=np.uint16)
    shards, begin = [], 0
    for place, size in enumerate(sizes):
        path = tmp_path / f"{place}.tokens"
        path.write_bytes(numbers[begin : begin + size].tobytes())
        shards.append(
            Shard(path=path, source="", language="", tokens=size, dtype="uint16", sha256=(sha256(path), ""))
        )
        begin += size
    stream = Stream(tuple(shards), 8, 0)
    assert stream.blocks == 4
    first = np.arange(len(numbers) - 8)
    rows = stream.read(first)
    assert rows.tolist() == [numbers[f : f + 9].tolist() for f in first]
    for f, where in zip(first.tolist(), stream.where(first, 8), strict=True):
        parts = [numbers[sum(sizes[: int(p.source[0])]) :][p.first : p.first + p.length] for p in where]
        assert np.concatenate(parts).tolist() == numbers[f : f + 8].tolist()
