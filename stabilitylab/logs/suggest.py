"""A pattern for a text whose lines name no loss, ready to paste.

    step 10 | train 2.31 | val 2.40        step {step}{*}train {loss}

Which number is the loss only its user knows: ``train`` is proposed where there is one, else the first that changes from line to
line and is neither a counter, a rate nor a clock.
"""

from __future__ import annotations

import re
from collections import Counter

from stabilitylab.errors import InputError
from stabilitylab.logs.any_text import ANY_TEXT
from stabilitylab.logs.columns import counter_of
from stabilitylab.logs.pattern import NUMBER, compiled

_FEWEST = 3
_NEVER = re.compile(r"lr|learning|norm|time|sec|eta|acc|mem|speed|tok|loss|epoch|\d", re.IGNORECASE)
_OPENS = re.compile(r"\s*[\[(]\s*(?=\d)")
_PROPOSED = ("train", "training")


def _before(word: str, line: str) -> re.Match[str] | None:
    """A name and what parts it from its number."""
    return re.search(rf"{re.escape(word)}['\"]?\s*[:=]?\s*\[?(?={NUMBER})", line, re.IGNORECASE)


def suggested_pattern(head: str) -> str | None:
    """The pattern; None: too few lines are alike, or none counts."""
    read = [(line, values) for line in head.splitlines() if (values := ANY_TEXT.read(line + " | loss 0"))]
    if not read:
        return None
    names, count = Counter(tuple(values) for _, values in read).most_common(1)[0]
    counter = next((name for name in names if counter_of(name)), None)
    if count < _FEWEST or counter is None:
        return None
    alike = [(line, values) for line, values in read if tuple(values) == names]
    for name in sorted(names, key=lambda name: name.lower() not in _PROPOSED):
        if _NEVER.search(name) or counter_of(name) or len({values[name] for _, values in alike}) < 2:
            continue
        line = alike[0][0]
        step, loss = _before(counter, line) or _OPENS.match(line), _before(name, line)
        if step is None or loss is None or loss.start() < step.end():
            continue
        pattern = re.sub(r"\s+", " ", f"{step[0]}{{step}}{{*}}{loss[0]}{{loss}}")
        if "'" in pattern:
            continue
        try:
            seek = compiled(pattern)
        except InputError:
            continue
        if sum(seek.search(line) is not None for line, _ in alike) >= _FEWEST:
            return pattern
    return None
