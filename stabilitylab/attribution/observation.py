"""Watches the control while it repeats the event: which tensors and modules grew, and what changed from outside.

It says what is worth a fork, and what is usual. At each step it takes the norm of gradients (as the optimizer gets them), and the
RMS of module outputs and of the gradients with respect to them; a site *stands out* where it reaches ``GREW`` times the largest
value of the first ``QUIET`` steps, or is not finite. Watching changes nothing: the control is the original to the last bit.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stabilitylab.attribution.interventions import Act, Optimizer
from stabilitylab.attribution.loop import Subject
from stabilitylab.attribution.module_interventions import AttentionCalls, first_tensor, largest_scores, rms_of
from stabilitylab.attribution.undo_changes import LastUpdate, settings_of
from stabilitylab.model_structure import blocks, is_embedding, is_linear, is_norm, named_modules

QUIET, GREW, JUMP, LOUD = 3, 3.0, 1.5, 10.0


class Observation(Act):
    """Watches the control; see the module's docstring.

    Attributes:
        gradients, outputs, output_gradients: site -> step -> size.
        outside_weights, outside_moments: parameter -> steps before which it changed without an update.
        outside_rows: parameter -> the rows of it that did.
        settings: step -> the optimizer's settings that jumped before it, or a climbed rate.
        narrow: modules with half-precision output, in the order of execution.
        order: modules in the order of execution.
        scores: call of attention -> step -> largest score by head.
        callers: call of attention -> the module that made it.
    """

    def __init__(self, begin: int, onset: int) -> None:
        super().__init__()
        self._begin, self._onset = begin, onset
        self.gradients: dict[str, dict[int, float]] = defaultdict(dict)
        self.outputs: dict[str, dict[int, float]] = defaultdict(dict)
        self.output_gradients: dict[str, dict[int, float]] = defaultdict(dict)
        self.outside_weights: dict[str, set[int]] = defaultdict(set)
        self.outside_moments: dict[str, set[int]] = defaultdict(set)
        self.outside_rows: dict[str, set[int]] = defaultdict(set)
        self.settings: dict[int, set[str]] = {}
        self.narrow: dict[str, None] = {}
        self.order: dict[str, None] = {}
        self.scores: dict[int, dict[int, Tensor]] = defaultdict(dict)
        self.callers: dict[int, str] = {}
        self._settings: dict[int, list[dict[str, Any]]] = {}
        self._first: dict[int, Sequence[Mapping[str, Any]]] = {}
        # The rate's factor from one update to the next, in the previous step; None: none yet.
        self._factor: float | None = None
        self._running: list[str] = []
        self._mode = AttentionCalls(self._scored)
        self._snapshots: LastUpdate | None = None
        self._subject: Subject | None = None

    @property
    def mode(self) -> AttentionCalls:
        """A context around each step."""
        return self._mode

    def install(self, subject: Subject) -> None:
        self._subject, self._snapshots = subject, LastUpdate(subject)
        chosen = {id(block) for block in blocks(subject.model).values()}
        for path, module in named_modules(subject.model):
            if not path:
                continue
            watched = is_linear(module) or is_norm(module) or is_embedding(module) or id(module) in chosen
            self.handles.append(module.register_forward_pre_hook(self._enter(path)))
            self.handles.append(module.register_forward_hook(self._leave(path, watched), always_call=True))

    def _enter(self, path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any) -> None:
            del module, args
            self._running.append(path)

        return hook

    def _leave(self, path: str, watched: bool) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            del module, args
            if self._running:
                self._running.pop()
            tensor = first_tensor(output)
            if not watched or tensor is None or self._subject is None:
                return
            step = self._subject.step
            self.order.setdefault(path)
            if tensor.dtype in (torch.float16, torch.bfloat16):
                self.narrow.setdefault(path)
            _most(self.outputs[path], step, rms_of(tensor))
            if tensor.requires_grad:
                tensor.register_hook(  # type: ignore[no-untyped-call]
                    lambda g: _most(self.output_gradients[path], step, rms_of(g))
                )

        return hook

    def start(self, subject: Subject) -> None:
        self._mode.count = 0
        self._running.clear()

    def forward(self, subject: Subject) -> None:
        if self._snapshots is None:
            return
        for name in self._snapshots.changed_weights(subject.parameters):
            self.outside_weights[name].add(subject.step)
            if subject.parameters[name].dim() > 1:
                self.outside_rows[name].update(self._snapshots.changed_rows(name))
        for name in self._snapshots.changed_moments(subject.parameters):
            self.outside_moments[name].add(subject.step)

    def before(self, subject: Subject, optimizer: Optimizer) -> None:
        self.forward(subject)
        now = settings_of(optimizer)
        before = self._settings.get(id(optimizer))
        if before is not None and (keys := self._jumped(before, now)):
            self.settings.setdefault(subject.step, set()).update(keys)
        self._settings[id(optimizer)] = now
        if subject.step <= self._onset and self._climbed(id(optimizer), now):
            self.settings.setdefault(subject.step, set()).add("lr")
        for name, p, _ in subject.of(optimizer):
            if p.grad is not None:
                self.gradients[name][subject.step] = float(torch.linalg.vector_norm(p.grad.detach().float()))

    def after(self, subject: Subject, optimizer: Optimizer) -> None:
        if self._snapshots is not None:
            self._snapshots.take(optimizer)

    def _jumped(self, before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> set[str]:
        """Settings that differ from those of the last update. Schedules move a rate, so it must change by more than half, and more
        than in the previous step (a warm-up from zero begins with factors of 2, 3/2, ...).
        """
        found: set[str] = set()
        factor = self._factor
        for old, new in zip(before, now, strict=False):
            for key in old.keys() & new.keys():
                a, b = old[key], new[key]
                if key == "lr":
                    factor = float(b) / float(a) if float(a) > 0 else None
                    usual = max(1.0, self._factor or 1.0)
                    # The first factor has no predecessor to compare with: a fork may begin in a warm-up.
                    same = factor is None or self._factor is None or 1 / JUMP <= factor <= JUMP * usual
                else:
                    same = bool(torch.equal(a, b)) if isinstance(a, Tensor) else a == b
                if not same:
                    found.add(key)
        self._factor = factor
        return found

    def _climbed(self, optimizer: int, now: Sequence[Mapping[str, Any]]) -> bool:
        """Whether a rate has become ``JUMP`` times its first step's, in whatever steps."""
        first = self._first.setdefault(optimizer, now)
        return any(
            0 < float(old["lr"]) < float(new["lr"]) / JUMP
            for old, new in zip(first, now, strict=False)
            if "lr" in old and "lr" in new
        )

    def _scored(self, number: int, q: Tensor, k: Tensor, scale: float) -> Tensor:
        assert self._subject is not None
        self.scores[number][self._subject.step] = largest_scores(q, k, scale)
        self.callers.setdefault(number, self._running[-1] if self._running else "")
        return q

    # Conclusions from it.

    def usual(self, of: Mapping[str, Mapping[int, float]]) -> dict[str, float]:
        """The largest value of each site in the first steps."""
        found = {}
        for site, values in of.items():
            quiet = [v for step, v in values.items() if step < self._begin + QUIET and math.isfinite(v)]
            if quiet and max(quiet) > 0:
                found[site] = max(quiet)
        return found

    def standing_out(self, of: Mapping[str, Mapping[int, float]], last: int) -> list[str]:
        """Sites that grew up to step ``last``, the earliest first; within a step in the order of ``of``."""
        return [site for _, _, site in self.grown(of, last)]

    def grows_at(self, of: Mapping[str, Mapping[int, float]], last: int) -> int | None:
        """The step at which the first of them grew."""
        return next((step for step, _, _ in self.grown(of, last)), None)

    def grown(self, of: Mapping[str, Mapping[int, float]], last: int) -> list[tuple[int, int, str]]:
        """Step, place in ``of`` and name of each of them."""
        usual, found = self.usual(of), list[tuple[int, int, str]]()
        for place, (site, values) in enumerate(of.items()):
            for step in sorted(values):
                if self._begin + QUIET <= step <= last and not values[step] <= GREW * usual.get(
                    site, math.inf
                ):
                    if site in usual:
                        found.append((step, place, site))
                    break
        return sorted(found)

    def changed_outside(self, of: Mapping[str, set[int]], last: int) -> list[str]:
        """What changed between updates, up to step ``last``, without what routinely changes in the first steps too."""
        return [
            name
            for name, steps in of.items()
            if any(step <= last for step in steps)
            and not any(self._begin < step < self._begin + QUIET for step in steps)
        ]

    def is_quiet(self) -> bool:
        """Whether the first steps themselves were quiet: no output, nor the norm of all gradients, grew tenfold in them."""
        squares: dict[int, float] = defaultdict(float)
        for values in self.gradients.values():
            for step, value in values.items():
                squares[step] += value * value
        norms = {step: math.sqrt(value) for step, value in squares.items()}
        for values in (norms, *self.outputs.values()):
            quiet = [v for step, v in values.items() if step < self._begin + QUIET and v != 0]
            if not all(map(math.isfinite, quiet)) or (len(quiet) > 1 and max(quiet) > LOUD * min(quiet)):
                return False
        return True

    def usual_scores(self) -> dict[int, Tensor]:
        """The largest score by head of each call of attention in the first steps."""
        found = {}
        for number, by_step in self.scores.items():
            quiet = [scores for step, scores in by_step.items() if step < self._begin + QUIET]
            if quiet:
                found[number] = torch.stack(quiet).amax(dim=0)
        return found

    def scores_standing_out(self, last: int) -> list[int]:
        """Calls of attention in which a head's largest score grew ``GREW``-fold."""
        usual = self.usual_scores()
        return [
            number
            for number, by_step in self.scores.items()
            if number in usual
            and any(
                bool((~(scores <= GREW * usual[number])).any())
                for step, scores in by_step.items()
                if step <= last
            )
        ]


def _most(values: dict[int, float], step: int, value: float) -> None:
    # The largest of several micro-batches; NaN stays.
    before = values.get(step)
    values[step] = value if before is None or not value <= before else before
