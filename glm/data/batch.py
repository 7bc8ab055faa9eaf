"""A batch of rows, and which token may see which.

Shapes: B rows, T tokens a row. A row holds one or several pieces (samples) side by side; ``segments_BT`` says to which piece a
token belongs, -1 is padding. Query i sees key j of the same row

    <=>  segments[i] == segments[j]  and  (j <= i  or  context[j])

that is: causal, plus the whole of the piece's context, block-diagonal over pieces. Padding sees the padding before it, and no other
token sees padding.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

NO_TARGET = -100
PADDING_SEGMENT = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where a piece's tokens came from: tokens [first, first + length) of a split's stream, or a task's example."""

    source: str
    first: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Rows ready for the model.

    Attributes:
        tokens_BT: int64.
        targets_BT: int64, ``NO_TARGET`` where there is no loss.
        positions: int64 [B, T], or [B, T, 2] with the intra-span position second.
        segments_BT: int32, the piece's number in its row; -1 for padding.
        context_BT: bool, the token is part of its piece's bidirectional context.
        provenance: per row, per piece.
    """

    tokens_BT: Tensor
    targets_BT: Tensor
    positions: Tensor
    segments_BT: Tensor
    context_BT: Tensor
    provenance: tuple[tuple[Provenance, ...], ...]
