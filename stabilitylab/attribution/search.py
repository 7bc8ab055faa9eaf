"""Proves a cause: forks the state before an event, each time without one thing.

    proof = attribute(loop, event, begin=400)         # the loop is before step 400, the event begins at 412
    print(proof.sentence)

First it trains the control: the same steps with nothing left out, which must repeat the original to the last bit. It watches which
sites grow, what changes between updates, and what is usual. Then it trains one fork of each kind that could matter
(``questions.py``), reads the verdicts (``proof.py``), and narrows the answer down to the smallest set of parameters or modules
(``delta_debugging.py``), to rows of a batch or an embedding, to the fewest steps. Forks begin ``before`` steps ahead of the onset;
where no fork from there prevents the event, it was decided earlier, and the search goes back three times as far.

Two terms: updates are *needed* where the event does not come without them, *enough* where it comes with them alone.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from stabilitylab.attribution.ablation import Without
from stabilitylab.attribution.executors import InThisProcess, SideBySide, Trains
from stabilitylab.attribution.fork_verdicts import WATCHED, Yardstick, yardstick
from stabilitylab.attribution.forks import Fork, Forks, Usual, signal_of
from stabilitylab.attribution.kept_forks import KeptForks, about
from stabilitylab.attribution.loop import Loop, LoopState
from stabilitylab.attribution.minimization import Narrowing
from stabilitylab.attribution.observation import QUIET, Observation
from stabilitylab.attribution.proof import CHANGES, Attribution, conclude
from stabilitylab.attribution.questions import rounds
from stabilitylab.errors import InputError
from stabilitylab.spikes.episodes import Episode

BEFORE = 8
_WIDER = 3


def attribute(
    loop: Loop,
    event: Episode | int,
    *,
    begin: int,
    state: LoopState | None = None,
    original: Mapping[int, float] | None = None,
    signal: str = "loss",
    before: int = BEFORE,
    watched: int = WATCHED,
    budget: float = 600.0,
    groups: Sequence[str] = (),
    thorough: bool = True,
    memory: Path | None = None,
    processes: int = 1,
    open_loop: Callable[[], Loop] | None = None,
    tell: Callable[[Fork], object] | None = None,
    otherwise: str = "",
) -> Attribution:
    """Find out what an event needs.

    Args:
        loop: see ``stabilitylab.attribution.loop``; it ends at some other step.
        event: an episode, or the step at which it begins.
        begin: the index of the next step from ``state``, at or before the event's onset.
        state: where the search may begin; None: the present state of ``loop``.
        original: the recorded signal, by step, to compare with the control. Without it the search trains the control twice.
        signal: the step's number that the event is about.
        before: steps ahead of the onset at which forks begin.
        watched: steps of the control from the onset on.
        budget: seconds.
        groups: globs of parameters, instead of each block's parts.
        thorough: ask everything, even where a change from outside explains the event; narrow updates down even where something else
            prevents it.
        memory: a file that keeps forks, to resume after an interruption.
        processes: forks side by side; more than one needs ``open_loop``, which makes the loop in each process.
        tell: called with each fork as it ends.
        otherwise: how forks differ from the original ("2 threads, the run 8"), to tell where the control departs.

    Raises:
        InputError: the loop does not repeat itself, the budget is too small for one fork, a glob matches nothing, or
            ``begin`` is after the onset.
    """
    episode = event if isinstance(event, Episode) else Episode(
        kind="spike", onset=event, peak=event, end=None, height=None, signal=signal
    )  # fmt: skip
    if begin > episode.onset:
        raise InputError(
            f"the state of step {begin} lies behind the event's onset at step {episode.onset}: give an earlier one"
        )
    if processes > 1 and open_loop is None:
        raise InputError(
            "processes side by side each need the loop: give open_loop, a function that makes it"
        )
    began = time.monotonic()
    start = LoopState.of(loop, begin) if state is None else state
    reach = before
    found: Attribution | None = None
    while True:
        at = max(begin, episode.onset - max(reach, QUIET + 1))
        try:
            search = _Search(
                loop,
                start,
                at,
                episode,
                signal,
                original or {},
                watched,
                began + budget,
                budget,
                groups,
                # Forks that begin elsewhere are different forks.
                memory if memory is None or reach == before else memory.with_stem(f"{memory.stem}-{at}"),
                tell,
            )
        except BudgetTooSmallError:
            if found is None:
                raise
            return dataclasses.replace(found, otherwise=otherwise)
        if not search.seen.is_quiet() and at > begin:
            # The event has begun already: nothing here is usual.
            reach *= _WIDER
            continue
        may_widen = at > begin and time.monotonic() < began + budget / 2
        found = search.run(open_loop if processes > 1 else None, processes, thorough, may_widen)
        if found.cause != "unknown" or not found.yardstick.shows or not may_widen:
            return dataclasses.replace(found, otherwise=otherwise)
        reach *= _WIDER


class BudgetTooSmallError(InputError):
    """The remaining time is too short for a single fork."""


class _Search:
    """One search from one step: control, questions, conclusion, narrowing."""

    def __init__(
        self,
        loop: Loop,
        start: LoopState,
        at: int,
        episode: Episode,
        signal: str,
        original: Mapping[int, float],
        watched: int,
        deadline: float,
        budget: float,
        groups: Sequence[str],
        memory: Path | None,
        tell: Callable[[Fork], object] | None,
    ) -> None:
        self.loop, self.episode, self.signal, self.original = loop, episode, signal, original
        self._deadline, self._budget, self._groups = deadline, budget, groups
        self._began = time.monotonic()
        self._told, self._memory_file = tell, memory
        self.past: list[float] = [original[s] for s in range(at - 16, at) if s in original]
        self.forks = Forks(loop, self._lead_in(start, at), signal=signal)
        self.seen = Observation(at, episode.onset)
        self.control = self._control(watched)
        self.of: Yardstick = yardstick(self.control, at, episode.onset, self.past)
        self.forks.yardstick, self.forks.usual = self.of, Usual.of(self.seen)
        self.untried: list[Without] = []
        self.trained: dict[str, Fork] = {}

    def _lead_in(self, start: LoopState, at: int) -> LoopState:
        if start.index == at:
            return start
        start.put_into(self.loop)
        values = [signal_of(self.loop.train_step(step), self.signal) for step in range(start.index, at)]
        if not self.past:
            self.past = values[-16:]
        return LoopState.of(self.loop, at)

    def _control(self, watched: int) -> list[float]:
        """Train the control, first a single step to time it; compare it with the original, or with itself."""
        steps = self.episode.onset - self.forks.begin + watched
        began = time.monotonic()
        self.forks.control(1)
        took = (time.monotonic() - began) * steps
        left = self._deadline - time.monotonic()
        if took > left:
            raise BudgetTooSmallError(
                f"the budget of {self._budget:g} s is too small for one fork, which takes some {took:.0f} s of it: "
                f"give at least {math.ceil(8 * took)} s"
            )
        values = self.forks.control(steps, self.seen, onset=self.episode.onset)
        self.repeats, self.departs = self._compared(values)
        return values

    def _compared(self, values: Sequence[float]) -> tuple[bool | None, int | None]:
        begin = self.forks.begin
        theirs = {
            step: self.original[step] for step in range(begin, begin + len(values)) if step in self.original
        }
        if theirs:
            departs = next((s for s, v in theirs.items() if not _equal(v, values[s - begin])), None)
            if departs is not None:
                self._repeats_itself(values, departs - begin + 1)
            return departs is None, departs
        self._repeats_itself(values, self.episode.onset - begin + 2)
        return None, None

    def _repeats_itself(self, values: Sequence[float], steps: int) -> None:
        """Train the control's first steps again. Raises InputError where they differ."""
        begin = self.forks.begin
        again = self.forks.control(steps, onset=self.episode.onset)
        apart = next(
            (i for i, (a, b) in enumerate(zip(again, values, strict=False)) if not _equal(a, b)), None
        )
        if apart is not None:
            raise InputError(
                f"the loop does not repeat itself: from one state step {begin + apart} gave {values[apart]!r}, then "
                f"{again[apart]!r}; train_step must depend on the state and its index alone: "
                "state_dict() may leave something out, as a place in the data or a generator of random numbers; or a kernel sums "
                "in another order each time (torch.use_deterministic_algorithms(True) says which)"
            )

    # Questions.

    def in_time(self) -> bool:
        """Whether there is budget left."""
        return time.monotonic() < self._deadline

    def ask(self, several: Sequence[Without]) -> list[Fork | None]:
        """Train the unknown ones; None where the budget ended before."""
        unknown = {w.key: w for w in several if w.key not in self.trained}
        for key, without in list(unknown.items()):
            if (known := self._kept.get(without)) is not None:
                self.trained[key] = known
                del unknown[key]
        for fork in self._trains.train(list(unknown.values()), self.in_time):
            self.trained[fork.without.key] = fork
            self._kept.add(fork)
            if self._told is not None:
                self._told(fork)
        # After the end of the budget, further questions would add nothing.
        if not self.untried:
            self.untried += [w for w in unknown.values() if w.key not in self.trained]
        return [self.trained.get(w.key) for w in several]

    def _few_gradients(self) -> bool:
        """Whether the gradients of at most a quarter of the parameters grew, or did so first and tenfold; or whether any grew a
        hundredfold before others grew at all, which no rate causes.
        """
        last, most = self.of.onset + 1, len(self.forks.subject.parameters) / 4
        grown = self.seen.grown(self.seen.gradients, last)
        first = [site for step, _, site in grown if step == grown[0][0]]
        usual, of = self.seen.usual(self.seen.gradients), self.seen.gradients
        sizes = {site: of[site][grown[0][0]] / usual[site] for site in first}
        factor = max((v if v == v else math.inf for v in sizes.values()), default=0.0)
        return 0 < len(grown) <= most or (factor > 10 and len(first) <= most) or factor > 100

    def _grows_without_updates(self) -> bool:
        """Whether the event comes without the updates up to the step at which outputs grow, where bounding outputs prevents it."""
        grows = self.seen.grows_at(self.seen.outputs, self.of.onset + 1)
        bounds = any(f.without.kind == "outputs" and f.verdict.prevents for f in self.trained.values())
        if grows is None or not bounds:
            return False
        names = tuple(self.forks.subject.parameters)
        (still,) = self.ask([Without(kind="updates", sites=names, last=grows, label="all parameters")])
        return still is not None and still.verdict.comes

    def run(
        self, open_loop: Callable[[], Loop] | None, processes: int, thorough: bool, may_widen: bool
    ) -> Attribution:
        """Ask everything; narrow nothing down where that gives no cause and the search may go back."""
        narrowing = Narrowing(self.forks, self.seen, self.of, self.ask, self._groups)
        if not self.of.shows:
            return self._attribution("unknown")
        self._kept = KeptForks(
            self._memory_file,
            about(self.of.begin, self.of.onset, tuple(self.control), tuple(self.forks.subject.parameters)),
        )
        self._trains: Trains = (
            InThisProcess(self.forks) if open_loop is None else SideBySide(open_loop, self.forks, processes)
        )
        try:
            settings = sorted({key for keys in self.seen.settings.values() for key in keys})
            first, second = rounds(self.forks, self.seen, self.of)
            self.ask(first)
            concluded = conclude(list(self.trained.values()), settings)
            if thorough or concluded.fork is None or concluded.fork.without.kind not in CHANGES:
                self.ask(second)
                concluded = conclude(
                    list(self.trained.values()),
                    settings,
                    few=self._few_gradients(),
                    computes=self._grows_without_updates(),
                )
            if concluded.cause == "unknown" and may_widen and self.in_time():
                return self._attribution("unknown", settings=tuple(settings))
            cause, remedy, site = narrowing.narrow(concluded)
            needed = enough = None
            moves = next((f for f in self.trained.values() if f.without.kind == "updates"), None)
            if (
                moves is not None
                and moves.verdict.prevents
                and (thorough or remedy is None or cause == "unknown")
            ):
                needed = narrowing.needed()
                enough = narrowing.enough()
                if cause in ("unknown", "learning-rate", "optimizer", "gradient") and needed is not None:
                    fewest = narrowing.fewest_steps(needed)
                    rows = fewest.kind == "rows of updates"
                    if (cause != "gradient" or rows) and not self.seen.settings:
                        remedy = self.trained.get(fewest.key, remedy)
                        site = fewest.place if rows else site or fewest.where
                    needed = fewest
            return self._attribution(cause, site, remedy, needed, enough, tuple(settings))
        finally:
            self._trains.close()

    def _attribution(
        self,
        cause: str,
        site: str | None = None,
        remedy: Fork | None = None,
        needed: Without | None = None,
        enough: Without | None = None,
        settings: tuple[str, ...] = (),
    ) -> Attribution:
        return Attribution(
            episode=self.episode,
            begin=self.forks.begin,
            yardstick=self.of,
            repeats=self.repeats,
            departs=self.departs,
            forks=tuple(self.trained.values()),
            cause=cause,
            site=site,
            needed=needed,
            enough=enough,
            remedy=remedy,
            untried=tuple(self.untried),
            seconds=time.monotonic() - self._began,
            settings=settings,
            ignores_index=any(
                fork.without.kind == "batch"
                and not fork.error
                and all(_equal(a, b) for a, b in zip(fork.values, self.control, strict=False))
                for fork in self.trained.values()
            ),
        )


def _equal(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))
