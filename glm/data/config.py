"""Settings of the objective and of what is sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from glm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """How a row of text becomes inputs and targets.

    Attributes:
        kind: "glm": blank infilling with [MASK] and [gMASK]; "causal": next token; "span-corruption": [MASK] only.
        gmask_share: share of rows that are one [gMASK] piece; the others hold ``pieces`` [MASK] pieces.
        pieces: [MASK] pieces in a row.
        mask_fraction: share of a piece's tokens inside spans.
        span_mean: Poisson mean of span lengths, zero excluded.
        single_span: share of [MASK] pieces with one span only, whatever fraction that is.
        gmask_least: smallest share of a piece that [gMASK] generates; the largest is all of it.
        positions: "1d": span tokens take the position of their mask; "2d" adds the place within the span.
    """

    kind: Literal["glm", "causal", "span-corruption"] = "glm"
    gmask_share: float = 0.7
    pieces: int = 4
    mask_fraction: float = 0.15
    span_mean: float = 3.0
    single_span: float = 0.02
    gmask_least: float = 0.2
    positions: Literal["1d", "2d"] = "1d"

    def __post_init__(self) -> None:
        for name in ("gmask_share", "gmask_least", "single_span"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"objective.{name} is a share between 0 and 1, got {getattr(self, name)}")
        if not 0 < self.mask_fraction < 0.5:
            raise InputError(f"objective.mask_fraction must lie in (0, 0.5), got {self.mask_fraction}")
        if self.span_mean <= 0:
            raise InputError(f"objective.span_mean must be positive, got {self.span_mean}")
        if self.pieces < 1:
            raise InputError(f"objective.pieces must be at least 1, got {self.pieces}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is sampled.

    Attributes:
        skip: half-open ranges of sample numbers that are passed over (OPT, PaLM): sample numbers after a range move up.
    """

    skip: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        for first, last in self.skip:
            if not 0 <= first < last:
                raise InputError(
                    f"sampling.skip holds ranges FIRST LAST with FIRST < LAST, got {first} {last}"
                )
