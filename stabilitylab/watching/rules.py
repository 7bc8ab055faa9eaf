"""The rules of what a watch may say, each with an id that stays the same from version to version (docs/watch.md).

An alert calls the hooks and can end the watch (``--fail-on``); a notice is only a line. Alerts that only a run folder has come from
the events of the run's own monitor.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from stabilitylab.errors import InputError


@dataclass(frozen=True, slots=True)
class Rule:
    """One kind of alert or notice.

    Attributes:
        id: its permanent name.
        severity: "critical", "warning" (both are alerts) or "notice".
        meaning: when the watch says it.
    """

    id: str
    severity: str
    meaning: str


RULES = {
    rule.id: rule
    for rule in (
        Rule("spike", "warning", "loss or gradient norm has left its level"),
        Rule("divergence", "critical", "the loss has left its level and has not come back"),
        Rule("non-finite", "critical", "a loss or gradient norm is NaN or infinite"),
        Rule("dead", "critical", "the loss is exactly 0 repeatedly"),
        Rule("frozen", "warning", "the loss repeats itself more often than chance explains"),
        Rule("loss-scale-collapse", "warning", "the loss scale fell to a sixteenth of an established one"),
        Rule("silent", "warning", "no value for --silent-after seconds"),
        Rule("run-lost", "critical", "run folders: silent, unfinished, and no process on this machine is writing it"),
        Rule("unreadable", "warning", "the log, or what was appended to it, cannot be read"),
        Rule("site-departure", "warning", "run folders: one site is far from its baseline"),
        Rule("parameter-changed", "warning", "run folders: weights moved without an update"),
        Rule("moments-changed", "warning", "run folders: Adam's second moments fell by more than a step can do"),
        Rule("optimizer-changed", "warning", "run folders: a setting of the optimizer jumped"),
        Rule("empty-steps", "warning", "run folders: an optimizer steps without gradients, and changes nothing"),
        Rule("telemetry-lost", "warning", "run folders: telemetry could not be written"),
        Rule("hard-batch", "notice", "one or two outlying values, then recovery; only with --tell hard-batch"),
        Rule("over", "notice", "an episode is over"),
        Rule("speaking-again", "notice", "values after a silence"),
        Rule("restarted", "notice", "steps went back: the run continues from a checkpoint, or a new one has begun"),
        Rule("rotated", "notice", "another file has taken the log's name"),
        Rule("truncated", "notice", "the log was truncated or rewritten"),
        Rule("run-ended", "notice", "run folders: the run is over, and with it the watch"),
    )
}  # fmt: skip
ALERTS = frozenset(rule.id for rule in RULES.values() if rule.severity != "notice")


def rules_named(given: Iterable[str], option: str) -> frozenset[str]:
    """The rules that an option names, separated by blanks, commas or bars.

    Raises:
        InputError: there is no such rule.
    """
    names = [name for words in given for name in words.replace("|", ",").split(",") if name]
    for name in names:
        if name not in RULES:
            raise InputError(f"{option}: there is no rule {name!r}: choose among {', '.join(sorted(RULES))}")
    return frozenset(names)
