"""From "this prevents it" to the least that does: fewer parameters, modules or steps, rows instead of batches and tables."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from stabilitylab.attribution.ablation import Without
from stabilitylab.attribution.delta_debugging import smallest
from stabilitylab.attribution.fork_verdicts import Yardstick
from stabilitylab.attribution.forks import Fork, Forks
from stabilitylab.attribution.interventions import Act
from stabilitylab.attribution.observation import GREW, Observation
from stabilitylab.attribution.parameter_globs import embedding_weights, groups_by_glob
from stabilitylab.attribution.proof import Conclusion
from stabilitylab.model_structure import parameter_groups

Ask = Callable[[Sequence[Without]], list[Fork | None]]
# Try this many of the sites that stand out, each by itself, and this many rows of a batch and of a table.
SINGLES, ROWS, TABLE_ROWS = 6, 3, 32
_STEPS = (1, 2, 4)
_BEYOND = 1e30
# Rows of a table may leave this share of the height.
WHOLLY = 0.1
# Where tensors in every eighth of the set are at fault, no single one is.
FINEST = 8


class Narrowing:
    """Asks for forks until the fork leaves out as little as possible.

    Args:
        ask: trains the given forks; None where the budget is spent.
        globs: the parameter groups that the user named; without them each block's parts.
    """

    def __init__(
        self, forks: Forks, seen: Observation, of: Yardstick, ask: Ask, globs: Sequence[str]
    ) -> None:
        self._forks, self._seen, self._of, self._ask = forks, seen, of, ask
        names = tuple(forks.subject.parameters)
        self._names = names
        self._groups = groups_by_glob(globs, names) if globs else parameter_groups(forks.subject.model, names)

    def narrow(self, concluded: Conclusion) -> tuple[str, Fork | None, str | None]:
        """Cause, the fork that leaves out least, and the site."""
        cause, fork = concluded.cause, concluded.fork
        if fork is None:
            return cause, None, None
        without = fork.without
        match without.kind:
            case "outside weights" | "outside moments":
                # The whole optimizer's state is one thing: halve it while a half prevents the event.
                least = self._smallest(without, finest=2 if cause == "optimizer" else FINEST)
                if cause == "optimizer" or 2 * len(least.without.sites) > len(self._names):
                    return cause, least, None
                if without.kind == "outside weights":
                    least = self._changed_rows(least)
                return cause, least, least.without.place
            case "batch":
                return cause, self._rows(fork), None
            case "outputs" | "output gradients":
                return self._single(cause, fork)
            case "scores":
                least = self._smallest(without)
                return cause, least, least.without.where
            case "rounding":
                least = self._smallest(without)
                return cause, least, least.without.where
            case "tensor norms":
                least = self._smallest(
                    without, first=self._seen.standing_out(self._seen.gradients, self._of.onset + 1)
                )
                few = len(least.without.sites) <= 4
                return cause, least, least.without.where if few else None
        return cause, fork, None

    def _single(self, cause: str, fork: Fork) -> tuple[str, Fork, str | None]:
        """The first module, of those that stand out, that is enough."""
        kind, sites = fork.without.kind, list(fork.without.sites)
        # As found: the earliest step first, within a step in the order of execution, for gradients in that of the backward pass.
        leaves = [s for s in sites if not any(other.startswith(s + ".") for other in sites)] or sites
        singles = [Without(kind=kind, sites=(site,)) for site in leaves[:SINGLES]]
        good = [one for one in self._ask(singles) if one is not None and one.verdict.prevents]
        if not good:
            least = self._smallest(fork.without)
            return cause, least, least.without.where
        best = good[0]
        site = best.without.sites[0]
        if cause == "activation" and self._left_the_format(site):
            cause = "overflow"
        elif cause == "activation" and self._in_scores(site):
            cause = "attention"
        return cause, best, site

    def _left_the_format(self, site: str) -> bool:
        """Whether the first sign of it was a number that its format does not hold."""
        of, usual = self._seen.outputs[site], self._seen.usual(self._seen.outputs)
        first = next((v for _, v in sorted(of.items()) if not v <= GREW * usual.get(site, math.inf)), 0.0)
        return not math.isfinite(first)

    def _in_scores(self, site: str) -> bool:
        """Whether a bound on the scores of the attention that the module feeds prevents the event as well."""
        callers = [path for path in self._seen.callers.values() if path and site.startswith(path + ".")]
        found = self._ask([Without(kind="scores", sites=(path,)) for path in dict.fromkeys(callers)])
        return any(one is not None and one.verdict.prevents for one in found)

    def _smallest(self, without: Without, first: Sequence[str] = (), finest: int = FINEST) -> Fork:
        """The fork without the fewest of the sites that still prevents it."""
        sites = [s for s in without.sites if s in set(first)] if first else []
        if sites:
            (answer,) = self._prevents(without, [tuple(sites)])
            sites = sites if answer else []
        chosen = smallest(
            sites or without.sites, lambda several: self._prevents(without, several), finest=finest
        )
        (fork,) = self._ask([_of(without, chosen)])
        (whole,) = self._ask([without])
        best = fork if fork is not None else whole
        assert best is not None
        return best

    def _prevents(self, without: Without, several: Sequence[tuple[str, ...]]) -> list[bool]:
        found = self._ask([_of(without, sites) for sites in several])
        return [one is not None and one.verdict.prevents for one in found]

    # Updates.

    def needed(self) -> Without | None:
        """The smallest set of parameters whose updates the event needs, from groups down to rows of a table; None where the search
        singled out no less than half of the groups.
        """
        chosen = smallest(tuple(self._groups), lambda several: self._prevents_labels("updates", several))
        if len(chosen) > max(1, len(self._groups) // 2):
            return None  # the budget ended, or nearly all are: none singled out
        least = self._labelled("updates", chosen)
        (fork,) = self._ask([least])
        if fork is None or not fork.verdict.prevents:
            return None
        if len(least.sites) > 1:
            sites = smallest(least.sites, lambda several: self._prevents(least, several))
            if len(sites) < len(least.sites):
                least = _of(least, sites)
        if len(least.sites) == 1 and embedding_weights(self._forks.subject.model, least.sites):
            least = self._table_rows(least)
        return least

    def enough(self) -> Without | None:
        """The smallest set of parameters with whose updates alone the event comes; None where half of them are not enough."""

        def comes(several: Sequence[tuple[str, ...]]) -> list[bool]:
            found = self._ask([self._labelled("other updates", labels) for labels in several])
            return [one is not None and one.verdict.comes for one in found]

        chosen = smallest(tuple(self._groups), comes)
        if len(chosen) > max(1, len(self._groups) // 2):
            return None
        return self._labelled("other updates", chosen)

    def fewest_steps(self, needed: Without) -> Without:
        """The same, withheld for fewer steps: the last before the onset, or from the first one that matters."""
        onset = self._of.onset
        tries = [
            dataclasses.replace(needed, first=max(self._of.begin, onset - n), last=onset) for n in _STEPS
        ]
        tries = [
            one for one in tries if one.first is not None and one.last is not None and one.first < one.last
        ]
        found = self._ask(tries)
        return next(
            (t for t, one in zip(tries, found, strict=True) if one is not None and one.verdict.prevents),
            needed,
        )

    def _labelled(self, kind: str, labels: Sequence[str]) -> Without:
        sites = tuple(dict.fromkeys(name for label in labels for name in self._groups[label]))
        shown = ", ".join(labels[:4]) + (f" and {len(labels) - 4} more" if len(labels) > 4 else "")
        return Without(kind=kind, sites=sites, label=shown)

    def _prevents_labels(self, kind: str, several: Sequence[tuple[str, ...]]) -> list[bool]:
        found = self._ask([self._labelled(kind, labels) for labels in several])
        return [one is not None and one.verdict.prevents for one in found]

    # Rows.

    def _table_rows(self, least: Without) -> Without:
        """Rows of an embedding instead of all of it."""
        rows = self._moved_rows(least.sites[0])

        def ask(several: Sequence[tuple[int, ...]]) -> list[bool]:
            found = self._ask(
                [Without(kind="rows of updates", sites=least.sites, rows=one) for one in several]
            )
            return [one is not None and _wholly(one) for one in found]

        if not rows or not ask([tuple(rows)])[0]:
            return least
        return Without(kind="rows of updates", sites=least.sites, rows=smallest(tuple(rows), ask))

    def _changed_rows(self, least: Fork) -> Fork:
        """Rows of an embedding that changed between updates, instead of all of it."""
        sites = least.without.sites
        if len(sites) != 1 or not embedding_weights(self._forks.subject.model, sites):
            return least
        rows = sorted(self._seen.outside_rows[sites[0]])
        if len(rows) == len(self._forks.subject.parameters[sites[0]]) or len(rows) > TABLE_ROWS:
            return least

        def of(several: Sequence[tuple[int, ...]]) -> list[Fork | None]:
            return self._ask([dataclasses.replace(least.without, rows=one) for one in several])

        chosen = smallest(tuple(rows), lambda several: [f is not None and _wholly(f) for f in of(several)])
        (fork,) = of([chosen])
        return fork if fork is not None and fork.verdict.prevents else least

    def _moved_rows(self, name: str) -> list[int]:
        """The rows that the control moved most before the onset."""
        self._forks.state.put_into(self._forks.loop)
        before = self._forks.subject.parameters[name].detach().clone()
        self._forks.control(max(1, self._of.onset - self._of.begin), Act())
        moved = torch.linalg.vector_norm(
            (self._forks.subject.parameters[name].detach() - before).float(), dim=1
        )
        most = moved.topk(min(TABLE_ROWS, len(moved)))
        return sorted(
            int(row) for row, size in zip(most.indices, most.values, strict=True) if float(size) > 0
        )

    def _rows(self, fork: Fork) -> Fork:
        """One row of the batch, if one is enough: tries those whose loss or gradient stands out."""
        loop, index = self._forks.loop, fork.without.rows[0]
        if not hasattr(loop, "row_losses") or not hasattr(loop, "train_step_without"):
            return fork
        self._forks.state.put_into(loop)
        if index > self._of.begin:
            self._forks.control(index - self._of.begin, Act())
        sizes = np.asarray(loop.row_losses(index), dtype=np.float64)
        chosen = standing_out(sizes)
        if not chosen:
            return fork
        asked = [Without(kind="batch rows", rows=(index, row)) for row in chosen]
        if len(chosen) > 1:
            asked.append(Without(kind="batch rows", rows=(index, *chosen)))
        return next((one for one in self._ask(asked) if one is not None and one.verdict.prevents), fork)


def standing_out(sizes_RK: np.ndarray[tuple[int, int], np.dtype[np.float64]]) -> list[int]:
    """Rows with a column over its median by more than 4 of its deviations (1.4826 MAD), farthest first, ``ROWS`` at most; always
    the farthest one.

    Args:
        sizes_RK: [rows, kinds]: loss, gradient norm.
    """
    if len(sizes_RK) < 2:
        return []
    # A row whose gradient leaves the format ranks beyond all others, and equal to other such rows.
    sizes_RK = np.nan_to_num(sizes_RK, nan=_BEYOND, posinf=_BEYOND)
    middle = np.median(sizes_RK, axis=0)
    spread = np.maximum(1.4826 * np.median(np.abs(sizes_RK - middle), axis=0), 1e-3 * np.abs(middle) + 1e-12)
    far = ((sizes_RK - middle) / spread).max(axis=1)
    order = np.argsort(-far, kind="stable")
    return [int(row) for place, row in enumerate(order[:ROWS]) if far[row] > 4 or place == 0]


def _wholly(fork: Fork) -> bool:
    """Whether the fork prevents the event almost wholly: a few of the rows at fault would be enough for the verdict's quarter."""
    return fork.verdict.prevents and not fork.verdict.height > WHOLLY


def _of(without: Without, sites: tuple[str, ...]) -> Without:
    same = len(sites) == len(without.sites)
    return dataclasses.replace(without, sites=sites, label=without.label if same else "")
