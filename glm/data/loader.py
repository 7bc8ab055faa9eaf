"""Sample i as a function of (seed, i).

The loader cuts the tokens of a split into blocks of one row each; epoch e goes through all of them in an order that the seed and e
determine, from an offset that shifts with e (``stream``). A mixture has such a stream for each component, and gives sample i a
component and a number within it (``mixture``). The loader builds a row from its block with random draws that depend on (seed, i)
alone: blank infilling (``blanks``), or for a share of rows multi-task examples instead (``instructions``). It keeps no state: any
worker, any rank and any resumed run builds the same row, and a run can name a row, skip it and build it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from glm.data.batch import NO_TARGET, PADDING_SEGMENT, Batch, Provenance
from glm.data.blanks import SampleArrays, causal_rows, gmask_rows, mask_pieces
from glm.data.config import DataConfig, ObjectiveConfig
from glm.data.instructions import TaskPool
from glm.data.mixture import Mixture
from glm.data.random import uniform
from glm.data.shards import Shard, TokenData
from glm.data.spans import LEAST_ROOM, Ints, draw_spans
from glm.data.stream import Stream
from glm.errors import InputError

_KIND = 0  # the draw that decides what becomes of a row
MULTITASK_SHARE = 0.05


class Loader:
    """Builds batches from a data folder.

    Args:
        data: the folder, opened.
        objective: what the model is to predict in a row.
        config: which samples to draw.
        length: T, tokens a row.
        seed: of order and masks.
        split: "train" or "heldout".

    Attributes:
        multitask_share: of rows, as used.
        blocks: rows in an epoch of each component.

    Raises:
        InputError: the split has too few tokens for one row, lacks a component of the mixture, or lacks the tasks asked for.
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
        self._streams = self._open_streams()
        self.blocks = {name: stream.blocks for name, stream in self._streams.items()}
        self._mixture = self._open_mixture()
        self._pool = self._open_tasks()
        room = length // objective.pieces
        if objective.kind != "causal" and room < LEAST_ROOM:
            raise InputError(
                f"rows of {length} tokens are too short for {objective.pieces} pieces of at least {LEAST_ROOM}: "
                "use a longer model.length or fewer objective.pieces"
            )

    def batch(self, step: int, rows: int) -> Batch:
        """The rows of step ``step`` where every step has ``rows``."""
        return self.samples(range(step * rows, (step + 1) * rows))

    def samples(self, numbers: Sequence[int]) -> Batch:
        """The rows of these sample numbers, in this order."""
        sample_R = self._without_skipped(np.asarray(numbers, dtype=np.int64))
        rows, provenance = self._build(sample_R)
        two = self.objective.positions == "2d"
        positions = np.stack([rows.positions, rows.intra], axis=-1) if two else rows.positions
        return Batch(
            tokens_BT=torch.from_numpy(rows.tokens),
            targets_BT=torch.from_numpy(rows.targets),
            positions=torch.from_numpy(positions),
            segments_BT=torch.from_numpy(rows.segments),
            context_BT=torch.from_numpy(rows.context),
            provenance=tuple(provenance),
        )

    def mixture_at(self, sample: int) -> dict[str, float]:
        """The share of rows of each component at a sample number, multi-task rows apart; for logging a ramp."""
        (moved,) = self._without_skipped(np.array([sample])).tolist()
        weights = self._mixture.weights_at(moved) if self._mixture else np.ones(1)
        return dict(zip(self._streams, weights.tolist(), strict=True))

    def documents(self, provenance: Provenance) -> list[str]:
        """Where a piece's tokens lie: "shard file: document n" for each document, or "shard file: example n"."""
        tasks = self.data.tasks.get(self.split)
        if tasks is not None and tasks.shard.path.name == provenance.source:
            document = int(np.searchsorted(tasks.shard.offsets, provenance.first, side="right")) - 1
            return [f"{provenance.source}: example {document // 2}"]
        shard = next(s for s in self.data.shards[self.split] if s.path.name == provenance.source)
        ends = provenance.first, provenance.first + provenance.length - 1
        first, last = (int(np.searchsorted(shard.offsets, end, side="right")) - 1 for end in ends)
        return [f"{provenance.source}: document {number}" for number in range(first, last + 1)]

    def _open_streams(self) -> dict[str, Stream]:
        found: dict[str, tuple[Shard, ...]] = {"": self.data.shards[self.split]}
        if self.config.mixture:
            found = {name: () for name, _ in self.config.mixture}
            for shard in self.data.shards[self.split]:
                names = (shard.language, shard.source, f"{shard.source}/{shard.language}")
                mine = [name for name in found if name in names]
                if len(mine) > 1:
                    raise InputError(
                        f"sampling.mixture: {shard.source}/{shard.language} belongs to {' and '.join(mine)}; "
                        "name components that do not overlap"
                    )
                for name in mine:
                    found[name] = (*found[name], shard)
        streams = {}
        for number, (name, shards) in enumerate(found.items()):
            if name and not shards:
                there = sorted({f"{s.source}/{s.language}" for s in self.data.shards[self.split]})
                raise InputError(
                    f"sampling.mixture names {name!r}, which {self.data.path} lacks in its {self.split} split; "
                    f"it has {', '.join(there)}: name a source, a language or both"
                )
            streams[name] = stream = Stream(shards, self.length, self.seed + 7_919 * number)
            if not stream.blocks:
                raise InputError(
                    f"{self.data.path} has {stream.tokens:,} tokens{f' of {name}' if name else ''} in its {self.split} "
                    f"split, fewer than one row of {self.length}: give more text, or shorten --model.length"
                )
        return streams

    def _open_mixture(self) -> Mixture | None:
        if len(self._streams) == 1:
            return None
        after, before = dict(self.config.mixture), dict(self.config.mixture_before)
        return Mixture(
            list(after.values()),
            [before.get(name, 0.0) for name in after] if before else None,
            self.config.mixture_ramp,
            seed=self.seed,
        )

    def _open_tasks(self) -> TaskPool | None:
        tasks, share = self.data.tasks.get(self.split), self.objective.multitask_share
        if share is None:
            share = MULTITASK_SHARE if self.objective.kind == "glm" and tasks is not None else 0.0
        self.multitask_share = share
        self._gmask_share = self.objective.gmask_share if self.objective.kind == "glm" else 0.0
        if not share:
            return None
        if tasks is None:
            raise InputError(
                f"objective.multitask_share is {share:g} but {self.data.path} has no tasks in its {self.split} split: "
                "use the default corpus or glm corpus with --tasks, or set it to 0"
            )
        return TaskPool(tasks, self.length, self.special)

    def _without_skipped(self, sample_R: Ints) -> Ints:
        for first, last in sorted(self.config.skip):
            sample_R = np.where(sample_R >= first, sample_R + (last - first), sample_R)
        return sample_R

    def _build(self, sample_R: Ints) -> tuple[SampleArrays, list[tuple[Provenance, ...]]]:
        text_RS, provenance = self._read(sample_R)
        if self.objective.kind == "causal":
            return causal_rows(text_RS.ravel(), self._begins(len(sample_R)), self.length), provenance
        u_R = uniform(self.seed, sample_R, _KIND)
        tasks_R = u_R < self.multitask_share
        # The rest of the draw is uniform again.
        whole_R = ~tasks_R & (u_R - self.multitask_share < self._gmask_share * (1 - self.multitask_share))
        rows = self._empty(len(sample_R))
        self._add_blanks(rows, text_RS, sample_R, whole_R, ~(tasks_R | whole_R))
        if self._pool is not None and tasks_R.any():
            made, examples = self._pool.rows(self.seed, sample_R[tasks_R])
            which = np.flatnonzero(tasks_R)
            _place(rows, made, which, self.length)
            for row, pieces in zip(which.tolist(), examples, strict=True):
                provenance[row] = pieces
        return rows, provenance

    def _read(self, sample_R: Ints) -> tuple[NDArray[np.unsignedinteger[Any]], list[tuple[Provenance, ...]]]:
        """The source text of each row, T + 1 tokens."""
        if self._mixture is None:
            component_R, number_R = np.zeros_like(sample_R), sample_R
        else:
            component_R, number_R = self._mixture.place(sample_R)
        dtype = self.data.shards[self.split][0].dtype
        text_RS = np.empty((len(sample_R), self.length + 1), dtype=dtype)
        provenance: list[tuple[Provenance, ...]] = [()] * len(sample_R)
        for number, stream in enumerate(self._streams.values()):
            which = np.flatnonzero(component_R == number)
            if not len(which):
                continue
            first_R = stream.first_of(number_R[which])
            text_RS[which] = stream.read(first_R)
            for row, parts in zip(which.tolist(), stream.where(first_R, self.length), strict=True):
                provenance[row] = parts
        return text_RS, provenance

    def _begins(self, rows: int) -> Ints:
        return np.arange(rows, dtype=np.int64) * (self.length + 1)

    def _empty(self, rows: int) -> SampleArrays:
        shape = (rows, self.length)
        return SampleArrays(
            tokens=np.full(shape, self.special.pad, np.int64),
            targets=np.full(shape, NO_TARGET, np.int64),
            positions=np.zeros(shape, np.int64),
            intra=np.zeros(shape, np.int64),
            context=np.zeros(shape, bool),
            segments=np.full(shape, PADDING_SEGMENT, np.int32),
        )

    def _add_blanks(
        self,
        rows: SampleArrays,
        text_RS: NDArray[np.unsignedinteger[Any]],
        sample_R: Ints,
        whole_R: NDArray[np.bool_],
        pieces_R: NDArray[np.bool_],
    ) -> None:
        """Fill in the rows of one [gMASK] piece and those of several [MASK] pieces."""
        T, objective = self.length, self.objective
        stream, first_R = text_RS.ravel(), self._begins(len(sample_R))
        if whole_R.any():
            made = gmask_rows(
                self.seed, stream, sample_R[whole_R], first_R[whole_R], T, objective, self.special
            )
            _place(rows, made, np.flatnonzero(whole_R), T)
        if pieces_R.any():
            which = np.flatnonzero(pieces_R)
            room = T // objective.pieces
            piece = np.arange(objective.pieces)
            sample_Q = (sample_R[which, None] * objective.pieces + piece).ravel()
            first_Q = (first_R[which, None] + piece * room).ravel()
            spans = draw_spans(self.seed + 1, sample_Q, room, objective)
            made = mask_pieces(stream, first_Q, spans, room, self.special)
            np.copyto(
                made.segments,
                np.tile(piece, len(which))[:, None],
                where=made.segments >= 0,
                casting="same_kind",
            )
            _place(rows, made, which, room * objective.pieces)


def _place(rows: SampleArrays, made: SampleArrays, which: Ints, width: int) -> None:
    """Put made rows (or pieces, several to a row) into their places."""
    for field in fields(SampleArrays):
        getattr(rows, field.name)[which, :width] = getattr(made, field.name).reshape(len(which), width)
