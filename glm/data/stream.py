"""Reads several shards as one stream of tokens, cut into blocks of one row each.

A row across the end of one shard and the beginning of the next takes tokens from both, so no text is lost however small the shards
are.

Shapes: R rows of S tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from glm.data.batch import Provenance
from glm.data.random import shuffled, uniform
from glm.data.shards import Shard

Ints = NDArray[np.int64]

_EPOCH = 1_000_003
_MOST_HELD = 1 << 20  # hold the order of an epoch's blocks in memory up to this many
_SHIFT = 1  # the draw of an epoch's shift


class Stream:
    """One stream of tokens over several shards.

    Args:
        shards: in order; at least one.
        length: T, tokens of a row. The stream reads one token more, the target of the last.
        seed: of the order of blocks.
    """

    def __init__(self, shards: tuple[Shard, ...], length: int, seed: int) -> None:
        self._shards, self.length, self._seed = shards, length, seed
        self._names = [shard.path.name for shard in shards]
        sizes = np.array([shard.tokens for shard in shards], dtype=np.int64)
        self._ends = sizes.cumsum()
        self._begins = self._ends - sizes
        self.tokens = int(sizes.sum())
        self.blocks = max(0, (self.tokens - 1) // length)
        self._held: tuple[int, Ints] | None = None

    def first_of(self, number_R: Ints) -> Ints:
        """Where the ``number``-th row of this stream begins: every epoch reads all blocks once, in its own order.

        Later epochs begin at an offset, and so cut blocks elsewhere.
        """
        epoch_R, index_R = np.divmod(number_R, self.blocks)
        first_R = np.empty_like(index_R)
        spare = self.tokens - 1 - self.blocks * self.length
        for epoch in np.unique(epoch_R).tolist():
            here = epoch_R == epoch
            shift = int(uniform(self._seed, epoch, _SHIFT)[0] * (spare + 1)) if epoch else 0
            first_R[here] = self._blocks_of(epoch, index_R[here]) * self.length + shift
        return first_R

    def _blocks_of(self, epoch: int, index_R: Ints) -> Ints:
        seed = self._seed + _EPOCH * epoch
        if self.blocks > _MOST_HELD:
            return shuffled(seed, index_R, self.blocks)
        # The same permutation, held whole: computing a few numbers of it at a time costs more than building a short row.
        if self._held is None or self._held[0] != epoch:
            self._held = epoch, shuffled(seed, np.arange(self.blocks), self.blocks)
        return self._held[1][index_R]

    def read(self, first_R: Ints) -> NDArray[np.unsignedinteger[Any]]:
        """Rows of T + 1 tokens that begin at ``first``."""
        S = self.length + 1
        out_RS = np.empty((len(first_R), S), self._shards[0].dtype)
        shard_R = np.searchsorted(self._ends, first_R, side="right")
        for row, (number, first) in enumerate(zip(shard_R.tolist(), first_R.tolist(), strict=True)):
            place, filled = first - int(self._begins[number]), 0
            while filled < S:
                part = self._shards[number].stream[place : place + S - filled]
                out_RS[row, filled : filled + len(part)] = part
                place, filled, number = 0, filled + len(part), number + 1
        return out_RS

    def where(self, first_R: Ints, length: int) -> list[tuple[Provenance, ...]]:
        """The shards, and places in them, that tokens [first, first + length) of each row come from."""
        shard_R = np.searchsorted(self._ends, first_R, side="right")
        place_R = first_R - self._begins[shard_R]
        found = []
        for number, place in zip(shard_R.tolist(), place_R.tolist(), strict=True):
            parts, left = [], length
            while left:
                here = min(left, self._shards[number].tokens - place)
                parts.append(Provenance(source=self._names[number], first=place, length=here))
                place, left, number = 0, left - here, number + 1
            found.append(tuple(parts))
        return found
