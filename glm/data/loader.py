"""Sample i as a function of (seed, i).

The tokens of a split are cut into blocks of one row each; epoch e goes through all of them in an order that the seed and e
determine, from an offset that shifts with e. Row i is built from block ``i mod M`` of epoch ``i div M``, M the number of
blocks, with random draws that depend on (seed, i) alone. No state is kept: any worker, any rank and any resumed run builds the
same row, and a row can be named, passed over and built again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from glm.data.batch import NO_TARGET, PADDING_SEGMENT, Batch, Provenance
from glm.data.blanks import Rows, causal_rows, gmask_rows, mask_pieces
from glm.data.config import DataConfig, ObjectiveConfig
from glm.data.random import shuffled, uniform
from glm.data.shards import TokenData
from glm.data.spans import Ints, draw_spans
from glm.errors import InputError

_KIND, _SHIFT = 0, 1
_EPOCH = 1_000_003


class Loader:
    """Builds batches from a data folder.

    Args:
        data: the folder, opened.
        objective: what is asked of a row.
        config: what is sampled.
        length: T, tokens a row.
        seed: of order and masks.
        split: "train" or "heldout".

    Raises:
        InputError: the split has too few tokens for one row.
    """

    def __init__(
        self,
        data: TokenData,
        objective: ObjectiveConfig,
        config: DataConfig | None = None,
        *,
        length: int,
        seed: int,
        split: str = "train",
    ) -> None:
        self.data, self.objective, self.config = data, objective, config or DataConfig()
        self.length, self.seed, self.split = length, seed, split
        self.special = data.tokenizer.special
        self.fingerprint = f"{data.fingerprint}/{split}"
        self._shards = data.shards[split]
        # One token more than a row, for the target of its last; and room for an epoch's shift.
        self._blocks = np.array(
            [max(0, (shard.tokens - 1) // length) for shard in self._shards], dtype=np.int64
        )
        self._first_block = self._blocks.cumsum() - self._blocks
        self.blocks = int(self._blocks.sum())
        if self.blocks == 0:
            raise InputError(
                f"{data.path} has {data.tokens(split):,} tokens in its {split} split, fewer than one row of {length}: "
                "give more text, or shorten --model.length"
            )

    def batch(self, step: int, rows: int) -> Batch:
        """The rows of step ``step`` where every step has ``rows``."""
        return self.samples(range(step * rows, (step + 1) * rows))

    def samples(self, numbers: Sequence[int]) -> Batch:
        """The rows of these sample numbers, in this order."""
        sample_R = self._without_skipped(np.asarray(numbers, dtype=np.int64))
        text_RS, provenance = self._read(sample_R)
        rows = self._build(sample_R, text_RS)
        two = self.objective.positions == "2d"
        positions = np.stack([rows.positions, rows.intra], axis=-1) if two else rows.positions
        return Batch(
            tokens_BT=torch.from_numpy(rows.tokens),
            targets_BT=torch.from_numpy(rows.targets),
            positions=torch.from_numpy(positions),
            segments_BT=torch.from_numpy(rows.segments),
            context_BT=torch.from_numpy(rows.context),
            provenance=provenance,
        )

    def documents(self, provenance: Provenance) -> list[str]:
        """Where a piece's tokens lie: "shard file: documents a to b"."""
        shard = next(shard for shard in self._shards if shard.path.name == provenance.source)
        ends = provenance.first, provenance.first + provenance.length - 1
        first, last = (int(np.searchsorted(shard.offsets, end, side="right")) - 1 for end in ends)
        return [f"{provenance.source}: document {number}" for number in range(first, last + 1)]

    def _without_skipped(self, sample_R: Ints) -> Ints:
        for first, last in sorted(self.config.skip):
            sample_R = np.where(sample_R >= first, sample_R + (last - first), sample_R)
        return sample_R

    def _read(self, sample_R: Ints) -> tuple[NDArray[np.unsignedinteger], tuple[tuple[Provenance, ...], ...]]:
        """The source text of each row, T + 1 tokens."""
        epoch_R, index_R = np.divmod(sample_R, self.blocks)
        block_R = np.empty_like(index_R)
        for epoch in np.unique(epoch_R):
            here = epoch_R == epoch
            block_R[here] = shuffled(self.seed + _EPOCH * int(epoch), index_R[here], self.blocks)
        shard_R = np.searchsorted(self._first_block, block_R, side="right") - 1
        # Empty shards share their first block with the next: the last of them is the one that holds it.
        rows = np.empty((len(sample_R), self.length + 1), dtype=self._shards[0].dtype)
        provenance = []
        for r, (s, block, epoch) in enumerate(
            zip(shard_R.tolist(), block_R.tolist(), epoch_R.tolist(), strict=True)
        ):
            shard = self._shards[s]
            spare = shard.tokens - 1 - int(self._blocks[s]) * self.length
            shift = int(uniform(self.seed, epoch, _SHIFT)[0] * (spare + 1)) if epoch else 0
            first = (block - int(self._first_block[s])) * self.length + shift
            rows[r] = shard.stream[first : first + self.length + 1]
            provenance.append((Provenance(source=shard.path.name, first=first, length=self.length),))
        return rows, tuple(provenance)

    def _build(self, sample_R: Ints, text_RS: NDArray[np.unsignedinteger]) -> Rows:
        R, S = text_RS.shape
        T, objective = self.length, self.objective
        stream, first_R = text_RS.ravel(), np.arange(R, dtype=np.int64) * S
        if objective.kind == "causal":
            return causal_rows(stream, first_R, T)
        share = objective.gmask_share if objective.kind == "glm" else 0.0
        whole_R = uniform(self.seed, sample_R, _KIND) < share
        rows = Rows(
            tokens=np.full((R, T), self.special.pad, np.int64),
            targets=np.full((R, T), NO_TARGET, np.int64),
            positions=np.zeros((R, T), np.int64),
            intra=np.zeros((R, T), np.int64),
            context=np.zeros((R, T), bool),
            segments=np.full((R, T), PADDING_SEGMENT, np.int32),
        )
        if whole_R.any():
            made = gmask_rows(
                self.seed, stream, sample_R[whole_R], first_R[whole_R], T, objective, self.special
            )
            _place(rows, made, np.flatnonzero(whole_R), T)
        if not whole_R.all():
            which = np.flatnonzero(~whole_R)
            room = T // objective.pieces
            piece = np.arange(objective.pieces)
            sample_Q = (sample_R[which, None] * objective.pieces + piece).ravel()
            first_Q = (first_R[which, None] + piece * room).ravel()
            spans = draw_spans(self.seed + 1, sample_Q, room, objective)
            made = mask_pieces(stream, first_Q, spans, room, self.special)
            numbered = np.where(made.segments >= 0, np.tile(piece, len(which))[:, None], PADDING_SEGMENT)
            _place(rows, made, which, room * objective.pieces, segments=numbered.astype(np.int32))
        return rows


def _place(
    rows: Rows, made: Rows, which: Ints, width: int, segments: NDArray[np.int32] | None = None
) -> None:
    """Put made rows (or pieces, several to a row) into their places."""
    for name in ("tokens", "targets", "positions", "intra", "context"):
        getattr(rows, name)[which, :width] = getattr(made, name).reshape(len(which), width)
    rows.segments[which, :width] = (made.segments if segments is None else segments).reshape(
        len(which), width
    )
