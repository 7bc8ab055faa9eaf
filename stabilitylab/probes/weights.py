"""How large weights are, in which directions, and at which angles to gradients and updates.

The largest singular value comes from power iteration, v <- W'Wv / |W'Wv|, sigma = |Wv|. The probe keeps v from one measured step to
the next: weights move slowly, so a few iterations follow them. The value is a lower bound, and may be too low in the first measured
steps, before v has converged. A weight of more than two dimensions counts as the matrix [out, all the rest].

Before a norm without epsilon the loss does not depend on a weight's size, so cos(gradient, weight) = 0 there (2506.02285, and
with AdamW |g| / |w| -> sqrt(2 decay / rate)); a falling stable rank precedes instabilities (MSign, 2602.01734).

Family ``weight``, site = parameter path:

| statistic | meaning | unit | source |
| --- | --- | --- | --- |
| l2 | Euclidean norm before the update | weight | definition |
| sigma_max | largest singular value, of matrices | weight | power iteration (von Mises and Pollaczek-Geiringer 1929) |
| stable_rank | l2^2 / sigma_max^2, of matrices | 1 | Rudelson and Vershynin, math/0503442 |
| cos_gradient_weight | cosine of the gradient and the weight | 1 | arXiv:2506.02285 |
| cos_update_gradient | cosine of the update and the gradient: -1 where it goes straight down | 1 | definition |
| group_l2 | Euclidean norm of all weights of a group; the site is the group | weight | ``model_structure.parameter_groups`` |

The gradient is the one that the optimizer gets. The probe is not among ``all_probes()``: ask for it,
``probes=[*all_probes(), WeightProbe()]``. Limits: it leaves out parameters of which each rank has only a part.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from stabilitylab.model_structure import parameter_groups
from stabilitylab.probes.base import Found, Readings
from stabilitylab.probes.hooking import HookingProbe
from stabilitylab.statistics.buffer import Slots
from stabilitylab.statistics.gathering import Gathered
from stabilitylab.statistics.summary import measurable
from stabilitylab.telemetry import Key

STATISTICS = ("l2", "sigma_max", "stable_rank", "cos_gradient_weight", "cos_update_gradient")
OF_VECTORS = ("l2", "cos_gradient_weight", "cos_update_gradient")
# In the first measured step, and in each later one.
FIRST_ITERATIONS, ITERATIONS = 12, 2
_FIELDS = 6  # |w|^2, sigma, <g, w>, |g|^2, <u, g>, |u|^2


class WeightProbe(HookingProbe):
    """Statistics of every weight; see the module's docstring."""

    name = "weights"
    stays_in_graphs = False

    def __init__(self) -> None:
        super().__init__()
        self._slots: dict[str, Slots] = {}
        self._vectors: dict[str, Tensor] = {}
        # Name -> weight before the update and its gradient, during a step.
        self._before: dict[str, tuple[Tensor, Tensor]] = {}
        self._matrices: set[str] = set()
        self._keys: dict[tuple[str, ...], tuple[Key, ...]] = {}

    def _find(self) -> None:
        self.name_parameters()

    def name_parameters(self) -> None:
        """Take the context's parameters, some of which may be new."""
        context = self._context
        self._names = {
            id(p): name
            for name, p in context.parameters.items()
            if context.wanted(name)
            and type(p.data) is Tensor
            and not context.is_sharded(name)
            and not context.is_scattered(name)
        }
        self._groups = {
            name: label
            for label, members in parameter_groups(context.model, context.parameters).items()
            for name in members
        }
        self._keys.clear()

    def _begin(self, measured: bool) -> None:
        self._before.clear()

    def _hook(self) -> None:
        # Read gradients where the optimizer takes them.
        self._around_step(self._take, self._measure)

    @torch.no_grad()
    def _take(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                name = self._names.get(id(p))
                gradient = p.grad
                if name is None or gradient is None or gradient.is_sparse or not measurable(gradient):
                    continue
                # The step itself may clip a gradient in place: copy it, as it is given, with the weight.
                self._before[name] = (p.detach().clone(), gradient.detach().clone())

    @torch.no_grad()
    def _measure(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        updated = {id(p) for group in optimizer.param_groups for p in group["params"]}
        names = [name for i, name in self._names.items() if i in updated and name in self._before]
        if not names:
            return
        weights, gradients = ([self._before[name][k].float() for name in names] for k in (0, 1))
        moved = list(
            torch._foreach_sub([self._context.parameters[name].detach().float() for name in names], weights)
        )
        columns = [
            torch.stack(torch._foreach_norm(weights)).square(),
            torch.stack([self._sigma(name, w) for name, w in zip(names, weights, strict=True)]),
            _dots(gradients, weights),
            torch.stack(torch._foreach_norm(gradients)).square(),
            _dots(moved, gradients),
            torch.stack(torch._foreach_norm(moved)).square(),
        ]
        numbers = torch.stack(columns, dim=1).double()
        buffer = self._context.buffer
        for name, row in zip(names, numbers, strict=True):
            slots = self._slots.get(name)
            if slots is None or slots.device != row.device:
                slots = self._slots[name] = buffer.reserve("replicated", _FIELDS, row.device)
            slots.stamp = -1
            buffer.put(slots, row)
            del self._before[name]

    def _sigma(self, name: str, weight: Tensor) -> Tensor:
        """The largest singular value, as well as the kept vector gives it; -1 for vectors."""
        if weight.dim() < 2 or min(weight.shape[0], weight[0].numel()) < 2:
            return torch.full((), -1.0, device=weight.device)
        self._matrices.add(name)
        matrix = weight.flatten(1)
        kept = self._vectors.get(name)
        rounds = ITERATIONS
        if kept is None or kept.shape[0] != matrix.shape[1] or kept.device != matrix.device:
            # Any start that is not orthogonal to the answer, without drawing from training's generators.
            kept = torch.cos(torch.arange(1, matrix.shape[1] + 1, device=matrix.device, dtype=matrix.dtype))
            kept, rounds = kept / torch.linalg.vector_norm(kept), FIRST_ITERATIONS
        for _ in range(rounds):
            moved = matrix.T @ (matrix @ kept)
            norm = torch.linalg.vector_norm(moved)
            # A non-finite or zero vector does not become the next start.
            kept = torch.where((norm > 0) & torch.isfinite(norm), moved / norm, kept)
        self._vectors[name] = kept
        sigma: Tensor = torch.linalg.vector_norm(matrix @ kept)
        return sigma

    def collect(self) -> Found | None:
        """Every weight that was updated."""
        stamp = self._context.buffer.stamp
        seen = [(name, slots) for name, slots in self._slots.items() if slots.stamp == stamp]
        if not seen:
            return None
        names = tuple(name for name, _ in seen)
        return Found(
            sites=names,
            slots=[(slots,) for _, slots in seen],
            extra=(tuple(self._groups.get(name, name) for name in names), frozenset(self._matrices)),
        )

    def finish(self, gathered: Gathered) -> Readings:
        """The table's statistics."""
        groups, matrices = gathered.extra
        rows = np.asarray(gathered.rows(), dtype=np.float64)
        sites = gathered.sites
        with np.errstate(divide="ignore", invalid="ignore"):
            w2, sigma, gw, g2, ug, u2 = rows.T
            values = np.stack(
                [np.sqrt(w2), sigma, w2 / sigma**2, gw / np.sqrt(g2 * w2), ug / np.sqrt(u2 * g2)], axis=1
            )
        keys = self._keys.get(sites)
        if keys is None:
            keys = tuple(
                Key("weight", site, name)
                for site in sites
                for name in (STATISTICS if site in matrices else OF_VECTORS)
            ) + tuple(Key("weight", label, "group_l2") for label in dict.fromkeys(groups))
            self._keys = {sites: keys}
        whole = [site in matrices for site in sites]
        parts = [row if full else row[[0, 3, 4]] for row, full in zip(values, whole, strict=True)]
        sums = dict.fromkeys(groups, 0.0)
        for label, square in zip(groups, w2, strict=True):
            sums[label] += square
        return Readings(keys, np.concatenate([*parts, np.sqrt(np.array(list(sums.values())))]))

    def detach(self) -> None:
        """Remove the optimizer's hooks."""
        super().detach()
        self._before.clear()


def _dots(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return torch.stack([torch.dot(x.flatten(), y.flatten()) for x, y in zip(a, b, strict=True)])
