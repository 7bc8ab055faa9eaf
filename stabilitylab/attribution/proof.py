"""What forks prove about an event: the table, what is needed, what is enough, and the sentence to read first.

The cause is a word of the table in ``stabilitylab/spikes/suspects.py``, so that one can compare what forks prove with what
forensics suspects. It is the first of these that the forks support:

    parameter, optimizer, learning-rate   putting back what changed from outside prevents it
    batch           leaving one batch out prevents it, and leaving its neighbours out does not
    overflow        fp32 prevents it
    attention, activation     bounding scores or outputs prevents it, and withholding updates does not, at least not up to the step
                    at which outputs grow: the computation is at fault
    gradient        bounding gradients prevents it, and half the rate does not, or few of them grew
    optimizer       bounding updates by Adam's own scale prevents it, and half the rate does not
    learning-rate   half the rate prevents it
    optimizer       beginning the second moments, or the first, anew does
    batch           earlier data prevent it: the new ones are harder
    unknown         none of these
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from stabilitylab.attribution.ablation import Without
from stabilitylab.attribution.fork_verdicts import EVENT, HALVES, PREVENTS, Yardstick
from stabilitylab.attribution.forks import Fork
from stabilitylab.spikes.episodes import Episode
from stabilitylab.telemetry import Event

NOUNS = {
    "non-finite": "loss of finite numbers",
    "dead": "dead loss",
    "frozen": "frozen loss",
    "hard-batch": "hard batch",
}
# Kinds that put back changes between updates.
CHANGES = ("outside weights", "outside moments", "settings")


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """What forks proved about an event.

    Attributes:
        episode: the event.
        begin: the step at which forks begin.
        yardstick: the control, measured.
        repeats: whether the control is the original to the last bit; None: there was nothing to compare with.
        departs: the first step at which it differs.
        forks: all trained forks, in order.
        cause: see the module's docstring.
        site: its place, if it has one.
        needed: without the updates of these alone the event does not come.
        enough: with the updates of these alone it comes.
        remedy: the fork that prevents it and leaves out least.
        untried: interventions that the budget did not reach.
        seconds: spent.
        settings: names of the optimizer's settings that jumped.
        otherwise: how forks differ from the original, where known.
        ignores_index: a fork without a batch gives the same numbers: the loop's data advance by themselves.
    """

    episode: Episode
    begin: int
    yardstick: Yardstick
    repeats: bool | None
    departs: int | None
    forks: tuple[Fork, ...]
    cause: str
    site: str | None = None
    needed: Without | None = None
    enough: Without | None = None
    remedy: Fork | None = None
    untried: tuple[Without, ...] = ()
    seconds: float = 0.0
    settings: tuple[str, ...] = field(default=())
    otherwise: str = ""
    ignores_index: bool = False

    @property
    def prevents(self) -> list[Fork]:
        """Forks without the event."""
        return [fork for fork in self.forks if fork.verdict.word == PREVENTS]

    @property
    def halves(self) -> list[Fork]:
        """Forks with at most half of it."""
        return [fork for fork in self.forks if fork.verdict.word == HALVES]

    @property
    def sentence(self) -> str:
        """The sentence to read first."""
        if not self.ignores_index:
            return self._first
        return (
            f"{self._first} No batch could be left out: train_step(index) takes the same one whatever its index, "
            "so data are to be read by index."
        )

    @property
    def _first(self) -> str:
        what = f"the {NOUNS.get(self.episode.kind, self.episode.kind)}"
        if not self.yardstick.shows:
            said = f"The control does not repeat {what} at step {self.episode.onset}"
            if self.departs is not None:
                if self.otherwise:
                    return f"{said}: it departs from the original at step {self.departs}; forks have {self.otherwise}."
                return (
                    f"{said}: it departs from the original at step {self.departs}. What made it is neither in the kept state "
                    "nor in data or code: a weight changed by hand, or a machine's fault."
                )
            return f"{said}: nothing rises there by more than the noise."
        if self.remedy is None and self.untried:
            tried = (
                f"none of {len(self.forks)} forks prevents"
                if self.forks
                else "no fork was trained that might prevent"
            )
            return f"The budget ended: {tried} {what} at step {self.episode.onset}, and not all were tried."
        if self.remedy is None:
            return (
                f"Nothing that was left out from step {self.begin} on prevents {what} at step {self.episode.onset}: "
                "it is decided before, or more than one thing brings it."
            )
        said = f"{self.remedy.without.opening} {what} at step {self.episode.onset} does not come"
        share = self.remedy.verdict.height
        if share == share:
            said += f" (height {max(0.0, share):.0%} of the control's)"
        if self.enough is not None:
            said += f"; the updates of {self.enough.where} alone bring it"
        return said + "."

    @property
    def rows(self) -> list[tuple[str, str, str, str]]:
        """The verdict table: without, verdict, height, area; forks that prevent first."""
        order = {PREVENTS: 0, HALVES: 1}
        ranked = sorted(self.forks, key=lambda fork: order.get(fork.verdict.word, 2))
        return [
            (fork.without.words, fork.verdict.word, _share(fork.verdict.height), _share(fork.verdict.area))
            for fork in ranked
        ]

    @property
    def event(self) -> Event:
        """An event of kind ``attribution`` at the onset."""
        return Event(step=self.episode.onset, kind=EVENT, data=self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``events.jsonl``."""
        of = self.yardstick
        return {
            "sentence": self.sentence,
            "cause": self.cause,
            "site": self.site,
            "episode": {
                "kind": self.episode.kind,
                "onset": self.episode.onset,
                "signal": self.episode.signal,
            },
            "begin": self.begin,
            "end": of.end,
            "base": of.base,
            "noise": of.noise,
            "height": of.height,
            "area": of.area,
            "repeats": self.repeats,
            "departs": self.departs,
            "otherwise": self.otherwise,
            "needed": None if self.needed is None else self.needed.to_json(),
            "enough": None if self.enough is None else self.enough.to_json(),
            "remedy": None if self.remedy is None else self.remedy.without.to_json(),
            "forks": [
                {
                    "without": fork.without.to_json(),
                    "words": fork.without.words,
                    "verdict": fork.verdict.word,
                    "height": fork.verdict.height,
                    "area": fork.verdict.area,
                    "error": fork.error,
                }
                for fork in self.forks
            ],
            "untried": [without.words for without in self.untried],
            "seconds": self.seconds,
        }


def _share(value: float) -> str:
    return "" if value != value else f"{max(0.0, value):.2f}"


@dataclass(frozen=True, kw_only=True)
class Conclusion:
    """Cause, and the fork that shows it, to narrow down."""

    cause: str
    fork: Fork | None = None


def conclude(
    forks: Sequence[Fork], settings: Sequence[str], *, few: bool = False, computes: bool = False
) -> Conclusion:
    """The module's rule that applies to the trained forks.

    Args:
        few: the gradients of a quarter of the parameters, or fewer, grew.
        computes: it comes without the updates up to the step at which outputs grow.
    """
    by_kind: dict[str, list[Fork]] = {}
    for fork in forks:
        by_kind.setdefault(fork.without.kind, []).append(fork)

    def preventing(kind: str) -> Fork | None:
        return next((fork for fork in by_kind.get(kind, ()) if fork.verdict.prevents), None)

    causes = ("parameter", "optimizer", "learning-rate" if set(settings) == {"lr"} else "optimizer")
    still = next((fork for fork in by_kind.get("updates", ())), None)
    moves = still is not None and still.verdict.prevents
    batches = by_kind.get("batch", [])
    guilty = [fork for fork in batches if fork.verdict.prevents]
    order = list(zip(CHANGES, causes, strict=True))
    if len(guilty) == 1 and len(batches) > 1:
        order.append(("batch", "batch"))
    order.append(("rounding", "overflow"))
    if not moves or (computes and preventing("rate") is None):
        order += [("outputs", "activation"), ("scores", "attention")]
    bounds = [("output gradients", "gradient"), ("tensor norms", "gradient"), ("stale moments", "optimizer")]
    if preventing("rate") is not None:
        bounds = [*bounds[:2], ("rate", "learning-rate")] if few else [("rate", "learning-rate")]
    order += [*bounds, ("past of moments", "optimizer"), ("past of momentum", "optimizer"), ("data", "batch")]
    for kind, cause in order:
        if (found := preventing(kind)) is not None:
            return Conclusion(cause=cause, fork=found)
    return Conclusion(cause="unknown", fork=still if moves else None)
