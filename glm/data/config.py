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
        gmask_least: smallest share of a piece that the model generates at [gMASK]; the largest is all of it.
        positions: "1d": span tokens take the position of their mask; "2d" adds the place within the span.
        multitask_share: share of rows that hold multi-task examples (MIP). None: 5 % with kind "glm" where the data has tasks.
    """

    kind: Literal["glm", "causal", "span-corruption"] = "glm"
    gmask_share: float = 0.7
    pieces: int = 4
    mask_fraction: float = 0.15
    span_mean: float = 3.0
    single_span: float = 0.02
    gmask_least: float = 0.2
    positions: Literal["1d", "2d"] = "1d"
    multitask_share: float | None = None

    def __post_init__(self) -> None:
        for name in ("gmask_share", "gmask_least", "single_span", "multitask_share"):
            share = getattr(self, name)
            if share is not None and not 0 <= share <= 1:
                raise InputError(f"objective.{name} is a share between 0 and 1, got {share}")
        if not 0 < self.mask_fraction < 0.5:
            raise InputError(f"objective.mask_fraction must lie in (0, 0.5), got {self.mask_fraction}")
        if not 0 < self.span_mean <= 100:
            raise InputError(f"objective.span_mean must lie in (0, 100], got {self.span_mean}")
        if self.pieces < 1:
            raise InputError(f"objective.pieces must be at least 1, got {self.pieces}")
        if self.kind == "causal" and self.multitask_share:
            raise InputError(
                "objective.multitask_share needs [MASK], which objective.kind causal has not: leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to sample.

    A component of the mixture is a language ("zh"), a source ("botocore") or both ("botocore/en"). A mixture samples only the
    components that it names. Without a mixture an epoch goes through all text once.

    Attributes:
        skip: half-open ranges of sample numbers to leave out (OPT, PaLM): sample numbers after a range move up.
        mixture: (component, weight); weights are shares of tokens, in any positive scale.
        mixture_before: the weights before the ramp; the same components or fewer.
        mixture_ramp: (first, last) sample number between which the weights move linearly.
    """

    skip: tuple[tuple[int, int], ...] = ()
    mixture: tuple[tuple[str, float], ...] = ()
    mixture_before: tuple[tuple[str, float], ...] = ()
    mixture_ramp: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        for first, last in self.skip:
            if not 0 <= first < last:
                raise InputError(
                    f"sampling.skip holds ranges FIRST LAST with FIRST < LAST, got {first} {last}"
                )
        before = 0
        for first, last in sorted(self.skip):
            if first < before:
                raise InputError(f"sampling.skip: the range {first} {last} overlaps another; join them")
            before = last
        for field in ("mixture", "mixture_before"):
            weights: tuple[tuple[str, float], ...] = getattr(self, field)
            names = [name for name, _ in weights]
            if len(set(names)) < len(names):
                raise InputError(f"sampling.{field} names a component twice: {' '.join(names)}")
            if any(not 0 <= weight < float("inf") for _, weight in weights) or (
                weights and not sum(weight for _, weight in weights)
            ):
                raise InputError(f"sampling.{field}: weights are 0 or more, and not all 0")
        if extra := {name for name, _ in self.mixture_before} - {name for name, _ in self.mixture}:
            raise InputError(
                f"sampling.mixture_before names {' '.join(sorted(extra))}, which sampling.mixture does not: "
                "name it there too, with weight 0 if it is to end"
            )
        first, last = self.mixture_ramp
        if not 0 <= first <= last:
            raise InputError(f"sampling.mixture_ramp is FIRST LAST with FIRST <= LAST, got {first} {last}")
        if last and not self.mixture_before:
            raise InputError("sampling.mixture_ramp needs sampling.mixture_before: from where it goes")
