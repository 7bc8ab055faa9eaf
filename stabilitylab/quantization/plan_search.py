"""From sensitivities to a plan: choose, apply it whole, measure, and take back what did not hold.

Choosing assumes that harms add up (divergence.py says why they should). So the choice is only a proposal:

    memory, latency    the proposal, and improvements of the two best single schemes that fit, are verified; the best one wins
    loss               proposals under a shrinking or growing allowance are verified until the loss increase fits closely

Last, no plan may lose against one scheme everywhere: if a single scheme that keeps the budget, with no more bytes, has a smaller
verified loss, that single scheme is the plan, and a note says so. Of equal proposals the search takes the one with fewer bytes.

A verification is a run over the whole text, so the search verifies single schemes only where they could win by the sum of their
harms; for the others it tells that sum.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from stabilitylab.errors import InputError
from stabilitylab.quantization.knapsack import choose
from stabilitylab.quantization.latency import KEPT, Latencies
from stabilitylab.quantization.plan import Budget, PlanFigures
from stabilitylab.quantization.schemes import scheme_of
from stabilitylab.quantization.sensitivity import LayerSensitivity
from stabilitylab.quantization.verification import Verification

Assignment = dict[str, str]  # path -> scheme's name, or KEPT

_TRIES = 6
_RIVALS = 2  # single schemes to make proposals from
_NEAR = 1.1  # single schemes are verified where the sum of their harms is within this of the least


@dataclass(frozen=True, kw_only=True)
class Advice:
    """The result of the search.

    Attributes:
        assignment: path -> scheme's name or ``KEPT``.
        planned: its outcome.
        singles: outcomes of one scheme everywhere, and of none.
        notes: corrections.
    """

    assignment: Assignment
    planned: PlanFigures
    singles: Mapping[str, PlanFigures]
    notes: Sequence[str]

    def told_on(self, verification: Verification) -> Advice:
        """The same decisions, with losses measured on another text."""

        def again(outcome: PlanFigures, schemes: Mapping[str, str]) -> PlanFigures:
            if not outcome.verified or set(schemes.values()) == {KEPT}:
                return outcome
            chosen = {path: scheme_of(name) for path, name in schemes.items() if name != KEPT}
            return replace(outcome, loss=verification.measure(chosen))

        return replace(
            self,
            planned=again(self.planned, self.assignment),
            singles={
                name: again(outcome, dict.fromkeys(self.assignment, name))
                for name, outcome in self.singles.items()
            },
        )


class Advisor:
    """Chooses schemes for a model's layers.

    Args:
        layers: their sensitivities.
        latencies: of their shapes.
        verification: measures whole plans.
        groups: path -> group of those layers that must have one scheme: experts that are one parameter in the model's own form.
    """

    def __init__(
        self,
        layers: Sequence[LayerSensitivity],
        latencies: Latencies,
        verification: Verification,
        groups: Mapping[str, str] | None = None,
    ) -> None:
        self._layers, self._latencies, self._verification = layers, latencies, verification
        units: dict[str, list[LayerSensitivity]] = {}
        for layer in layers:
            units.setdefault((groups or {}).get(layer.path, layer.path), []).append(layer)
        self._units = list(units.values())
        self._names = [*next(iter(layers)).effects, KEPT]
        self._batches = list(next(iter(latencies.values()))[KEPT])
        self._squared = verification.loss is None

    def bytes_of(self, layer: LayerSensitivity, name: str) -> int:
        """Bytes of a layer's weights."""
        return layer.bytes_16 if name == KEPT else layer.effects[name].bytes

    def outcome(self, assignment: Assignment) -> PlanFigures:
        """Figures of an assignment, its loss verified."""
        schemes = {path: scheme_of(name) for path, name in assignment.items() if name != KEPT}
        return PlanFigures(
            bytes=self._bytes(assignment),
            seconds={batch: self._seconds(assignment, batch) for batch in self._batches},
            loss=self._verification.measure(schemes),
            schemes=dict(Counter(assignment.values()).most_common()),
        )

    def estimated(self, assignment: Assignment) -> PlanFigures:
        """Figures of an assignment, its loss the sum of its harms."""
        harm = sum(
            layer.effects[assignment[layer.path]].harm
            for layer in self._layers
            if assignment[layer.path] != KEPT
        )
        return PlanFigures(
            bytes=self._bytes(assignment),
            seconds={batch: self._seconds(assignment, batch) for batch in self._batches},
            loss=math.sqrt(harm) if self._squared else harm,
            schemes=dict(Counter(assignment.values()).most_common()),
            verified=set(assignment.values()) == {KEPT},
        )

    def everywhere(self, name: str) -> Assignment:
        """One scheme in every layer."""
        return {layer.path: name for layer in self._layers}

    def advise(self, budget: Budget) -> Advice:
        """The plan for a budget.

        Raises:
            InputError: the budget is below what the cheapest schemes take, or its batch was not timed.
        """
        if budget.batch not in self._batches:
            raise InputError(
                f"latencies were measured at batch {', '.join(map(str, self._batches))}, not {budget.batch}"
            )
        singles = {name: self.estimated(self.everywhere(name)) for name in self._names}
        notes: list[str] = []
        if budget.kind == "loss":
            assignment = self._within_loss(budget, singles, notes)
        else:
            assignment = self._within_cost(budget, singles, notes)
        planned = self.outcome(assignment)
        rivals = sorted(
            (
                name
                for name, single in singles.items()
                if name != KEPT
                and single.bytes <= planned.bytes
                and (budget.kind == "loss" or budget.allows(single, singles[KEPT]))
            ),
            key=lambda name: singles[name].loss,
        )
        for name in [name for name in rivals if singles[name].loss <= _NEAR * singles[rivals[0]].loss]:
            singles[name] = single = self.outcome(self.everywhere(name))
            if budget.allows(single, singles[KEPT]) and single.loss < planned.loss:
                notes.append(
                    f"{name} everywhere has a verified loss of {single.loss:+.4f} with no more bytes, "
                    f"the proposal {planned.loss:+.4f}: the plan is {name} everywhere"
                )
                assignment, planned = self.everywhere(name), single
        return Advice(assignment=assignment, planned=planned, singles=singles, notes=notes)

    def _bytes(self, assignment: Assignment) -> int:
        return sum(self.bytes_of(layer, assignment[layer.path]) for layer in self._layers)

    def _seconds(self, assignment: Assignment, batch: int) -> float:
        return sum(self._time(layer, assignment[layer.path], batch) for layer in self._layers)

    def _time(self, layer: LayerSensitivity, name: str, batch: int) -> float:
        return self._latencies[layer.shape][name][batch] if layer.timed else 0.0

    def _harms(self) -> list[list[float]]:
        return [
            [0.0 if name == KEPT else sum(one.effects[name].harm for one in unit) for name in self._names]
            for unit in self._units
        ]

    def _costs(self, budget: Budget) -> list[list[float]]:
        if budget.kind == "latency":
            return [
                [sum(self._time(one, name, budget.batch) for one in unit) for name in self._names]
                for unit in self._units
            ]
        return [
            [float(sum(self.bytes_of(one, name) for one in unit)) for name in self._names]
            for unit in self._units
        ]

    def _proposal(self, choice: Sequence[int]) -> Assignment:
        return {
            one.path: self._names[index]
            for unit, index in zip(self._units, choice, strict=True)
            for one in unit
        }

    def _within_cost(
        self, budget: Budget, singles: Mapping[str, PlanFigures], notes: list[str]
    ) -> Assignment:
        """Least harm within bytes or time."""
        costs, harms = self._costs(budget), self._harms()
        whole = sum(row[self._names.index(KEPT)] for row in costs)
        limit = budget.value * whole
        choice = choose(costs, harms, limit)
        if choice is None:
            least = sum(min(row) for row in costs) / whole
            raise InputError(
                f"a budget of {budget.text} cannot be met: the cheapest schemes take {least:.3f}; "
                "raise it or allow other schemes"
            )
        candidates = [self._proposal(choice)]
        # Start from one scheme everywhere, and change it only to what harms a layer less: where harms do not quite add up, the
        # result still cannot be worse in any layer.
        fitting = [
            index
            for index, name in enumerate(self._names)
            if name != KEPT and sum(row[index] for row in costs) <= limit
        ]
        fitting.sort(key=lambda index: singles[self._names[index]].loss)
        for index in fitting[:_RIVALS]:
            improved = choose(costs, [[h if h <= row[index] else 1e30 for h in row] for row in harms], limit)
            if improved is not None and self._proposal(improved) not in candidates:
                candidates.append(self._proposal(improved))
        outcomes = [self.outcome(candidate) for candidate in candidates]
        best = min(range(len(candidates)), key=lambda at: (outcomes[at].loss, outcomes[at].bytes))
        if best:
            notes.append(
                f"the proposal's verified loss is {outcomes[0].loss:+.4f}, that of a variant in which no layer is worse than "
                f"under one scheme {outcomes[best].loss:+.4f}: the variant was taken"
            )
        return candidates[best]

    def _within_loss(
        self, budget: Budget, singles: Mapping[str, PlanFigures], notes: list[str]
    ) -> Assignment:
        """Fewest bytes within a verified loss increase."""
        costs, harms = self._costs(budget), self._harms()
        goal = budget.value**2 if self._squared else budget.value
        allowance = goal
        # Nothing quantized always fits; the cheapest that does is kept.
        best = {layer.path: KEPT for layer in self._layers}
        hopeful = [name for name in singles if name != KEPT and singles[name].loss <= 2 * budget.value]
        for name in sorted(hopeful, key=lambda name: singles[name].bytes)[:_RIVALS]:
            single = self.outcome(self.everywhere(name))
            if single.loss <= budget.value and single.bytes < self._bytes(best):
                best = self.everywhere(name)
        fits, exceeds = 0.0, float("inf")
        seen: set[tuple[int, ...]] = set()
        for _ in range(_TRIES):
            choice = choose(harms, costs, allowance)
            assert choice is not None  # keeping everything harms nothing
            if tuple(choice) in seen:
                break
            seen.add(tuple(choice))
            proposal = self._proposal(choice)
            outcome = self.outcome(proposal)
            if outcome.loss <= budget.value:
                fits = max(fits, allowance)
                if outcome.bytes < self._bytes(best):
                    best = proposal
            else:
                exceeds = min(exceeds, allowance)
            reached = max(outcome.loss, 0.0) ** 2 if self._squared else max(outcome.loss, 0.0)
            # Aim at the goal in proportion, but at most at the middle between an allowance that fits and one that does not.
            wanted = allowance * (4.0 if reached == 0 else min(4.0, max(0.25, 0.95 * goal / reached)))
            middle = (fits * exceeds) ** 0.5 if fits and exceeds < float("inf") else wanted
            allowance = wanted if fits < wanted < exceeds else middle
        if set(best.values()) == {KEPT}:
            notes.append(f"no plan keeps to a {budget.text}: every layer stays as it is")
        elif exceeds <= goal:
            notes.append(
                f"harms add up to more than their sum here: the allowance was lowered from {goal:.4g} to {fits:.4g}"
            )
        return best


def most_verified(budget: Budget) -> int:
    """How many times at most a plan reads a text: for proposals and rivals on the second, for the model itself and what was
    verified on the third, and for the model on the second."""
    proposals = _RIVALS + _TRIES if budget.kind == "loss" else 1 + _RIVALS
    return 1 + proposals + _RIVALS + 1 + 1 + 2 * _RIVALS


def reason(layer: LayerSensitivity, chosen: str, criterion: str) -> str:
    """One line: what the channels look like, and what the chosen scheme and its nearest alternatives do."""
    seen = layer.range
    one = [f"one matrix with {', '.join(layer.also)}"] if layer.also else []
    if seen.outliers:
        plural = "s" if seen.outliers > 1 else ""
        verb = "hold" if seen.outliers > 1 else "holds"
        parts = [
            *one,
            f"{seen.outliers} channel{plural} of {seen.channels} {verb} up to {seen.ratio:.0f}x the median",
        ]
    else:
        parts = [*one, f"largest channel of {seen.channels} {seen.ratio:.1f}x the median"]
    unit = "nats" if criterion == "loss" else "squared output error"
    effects = layer.effects
    if chosen == KEPT and not effects:
        return f"{'; '.join(parts)}: no scheme has a form for it"
    if chosen == KEPT:
        name = min(effects, key=lambda other: effects[other].harm)
        parts.append(f"even {name} costs {effects[name].harm:.2g} {unit}")
        return f"{'; '.join(parts)}: left as it is"
    own = effects[chosen]
    told = [f"{chosen} error {own.error:.2g} ({own.harm:.2g} {unit})"]
    cheaper = [name for name in effects if effects[name].bytes < 0.98 * own.bytes]
    equal = [
        name
        for name in effects
        if name != chosen and 0.98 * own.bytes <= effects[name].bytes <= 1.02 * own.bytes
    ]
    for names in (equal, cheaper):
        if names:
            other = min(names, key=lambda name: effects[name].harm)
            told.append(f"{other} {effects[other].error:.2g} ({effects[other].harm:.2g})")
    dearer = [name for name in effects if effects[name].bytes > 1.02 * own.bytes]
    if dearer and not cheaper:
        other = min(dearer, key=lambda name: effects[name].harm)
        ratio = effects[other].bytes / own.bytes
        told.append(
            f"{other} {effects[other].error:.2g} ({effects[other].harm:.2g}) at {ratio:.1f}x the bytes"
        )
    parts.append(", ".join(told))
    return f"{'; '.join(parts)}: {chosen}"
