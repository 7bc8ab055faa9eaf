"""Multi-task rows (MIP; GLM-130B, 2210.02414, section 2.3): several examples side by side, each a piece of its own.

    input   prompt with [MASK]   sop a_1 .. a_n        target  .   a_1 .. a_n eop        loss on the answer only

Each task has an equal share whatever its size, and each example of a task the same chance; the pool draws examples with
replacement. A row takes, in the order drawn, those that still fit, and cuts none. The pool never draws examples longer than a row:
``too_long`` says how many there are.

Shapes: R rows, D draws a row, Q pieces, T tokens a row.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from glm.data.batch import NO_TARGET, PADDING_SEGMENT, Provenance
from glm.data.blanks import SampleArrays
from glm.data.random import uniform
from glm.data.shards import TaskShard
from glm.data.spans import Ints
from glm.data.special import SpecialTokens
from glm.errors import InputError

_TASK, _EXAMPLE = (np.int64(n) << 20 for n in (6, 7))  # streams of draws; those of blanks end at 5
_MOST_DRAWS = 256


class TaskPool:
    """The examples of a split that fit a row.

    Args:
        tasks: the examples.
        length: T.
        special: token numbers.

    Raises:
        InputError: none fits.
    """

    def __init__(self, tasks: TaskShard, length: int, special: SpecialTokens) -> None:
        self._shard, self._length, self._special = tasks.shard, length, special
        offsets = tasks.shard.offsets
        self._begin, self._middle = offsets[:-1:2], offsets[1::2]
        cost = offsets[2::2] - self._begin + 1
        fits = cost <= length
        self.too_long = int((~fits).sum())
        bounds = list(accumulate(tasks.counts.values(), initial=0))
        self._examples = [np.arange(a, b)[fits[a:b]] for a, b in pairwise(bounds) if fits[a:b].any()]
        if not self._examples:
            raise InputError(
                f"none of the {len(cost)} task examples in {tasks.text} fits a row of {length} tokens: "
                "use a longer model.length, or --objective.multitask-share 0"
            )
        self._cost = cost
        # Twice as many draws as fit on average: the row is then as full as draws can make it, nearly always.
        mean = float(np.mean([cost[examples].mean() for examples in self._examples]))
        self._draws = int(np.clip(2 * length / mean, 4, _MOST_DRAWS))

    def rows(self, seed: int, sample_R: Ints) -> tuple[SampleArrays, list[tuple[Provenance, ...]]]:
        """One row for each sample, a pure function of (seed, sample)."""
        R, T = len(sample_R), self._length
        example_RD = self._draw(seed, sample_R)
        # First fit: a draw that does not fit leaves its room to the next.
        used_R, taken_RD = np.zeros(R, np.int64), np.zeros(example_RD.shape, bool)
        cost_RD = self._cost[example_RD]
        for d in range(example_RD.shape[1]):
            taken_RD[:, d] = used_R + cost_RD[:, d] <= T
            used_R += np.where(taken_RD[:, d], cost_RD[:, d], 0)
        row_Q, _ = np.nonzero(taken_RD)
        example_Q, cost_Q = example_RD[taken_RD], cost_RD[taken_RD]
        piece_Q = (taken_RD.cumsum(1) - 1)[taken_RD]

        # A piece's tokens are contiguous in the row: piece q begins at ``begin_Q``, and its token x lies at begin + x.
        ends_Q = cost_Q.cumsum()
        row_start_R = np.searchsorted(row_Q, np.arange(R))
        before_Q = ends_Q - cost_Q
        begin_Q = before_Q - before_Q[row_start_R][row_Q] + row_Q * T
        x = np.arange(int(ends_Q[-1])) - np.repeat(before_Q, cost_Q)
        flat = np.repeat(begin_Q, cost_Q) + x
        prompt_Q = (self._middle - self._begin)[example_Q]
        prompt, source = np.repeat(prompt_Q, cost_Q), np.repeat(self._begin[example_Q], cost_Q) + x
        stream = self._shard.stream
        answer = x >= prompt
        text = stream.take(source - answer, mode="clip").astype(np.int64)
        text[x == prompt] = self._special.sop
        last = ends_Q - 1
        wanted = stream.take(source, mode="clip").astype(np.int64)
        wanted[last] = self._special.eop
        mask = np.flatnonzero((text == self._special.mask) & ~answer)  # one per piece, so in order of pieces
        mask_x = np.repeat(x[mask], cost_Q)

        tokens = np.full(R * T, self._special.pad, np.int64)
        targets = np.full(R * T, NO_TARGET, np.int64)
        positions, intra = np.zeros(R * T, np.int64), np.zeros(R * T, np.int64)
        context, segments = np.zeros(R * T, bool), np.full(R * T, PADDING_SEGMENT, np.int32)
        tokens[flat], targets[flat] = text, np.where(answer, wanted, NO_TARGET)
        positions[flat], intra[flat] = np.where(answer, mask_x, x), np.where(answer, x - prompt + 1, 0)
        context[flat], segments[flat] = ~answer, np.repeat(piece_Q, cost_Q)
        rows = SampleArrays(
            tokens=tokens.reshape(R, T),
            targets=targets.reshape(R, T),
            positions=positions.reshape(R, T),
            intra=intra.reshape(R, T),
            context=context.reshape(R, T),
            segments=segments.reshape(R, T),
        )
        return rows, self._provenance(R, row_Q, example_Q)

    def _draw(self, seed: int, sample_R: Ints) -> Ints:
        draws_D = np.arange(self._draws)
        task_RD = uniform(seed, sample_R[:, None], _TASK + draws_D) * len(self._examples)
        place_RD = uniform(seed, sample_R[:, None], _EXAMPLE + draws_D)
        example_RD = np.empty(task_RD.shape, np.int64)
        for number, examples in enumerate(self._examples):
            here: NDArray[np.bool_] = task_RD.astype(np.int64) == number
            example_RD[here] = examples[(place_RD[here] * len(examples)).astype(np.int64)]
        return example_RD

    def _provenance(self, rows: int, row_Q: Ints, example_Q: Ints) -> list[tuple[Provenance, ...]]:
        found: list[list[Provenance]] = [[] for _ in range(rows)]
        name = self._shard.path.name
        first_Q, end_Q = self._begin[example_Q].tolist(), (self._begin + self._cost - 1)[example_Q].tolist()
        for row, first, end in zip(row_Q.tolist(), first_Q, end_Q, strict=True):
            found[row].append(Provenance(source=name, first=first, length=end - first))
        return [tuple(pieces) for pieces in found]
