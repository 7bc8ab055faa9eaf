"""Lines of any trainer that name a training loss (``line_numbers`` reads what else they hold).

    2026-03-01 10:00:01 | INFO | step 12/300 | loss 2.31 | grad norm 0.9
    Epoch: [1][ 20/100]  Loss 2.3e+00 (2.4e+00)  lr: 1e-4

A line of validation alone is no record; the reader counts it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from stabilitylab.logs.column_names import counter_of, is_evaluation, is_loss
from stabilitylab.logs.languages import in_english
from stabilitylab.logs.line_numbers import NO_LOSS, OF, named, placed
from stabilitylab.logs.pattern import ABOVE, LineValues, TextFormat

# Words that make a line one of validation, where they stand before its first loss and no word of training does.
_OF_VALIDATION = re.compile(
    r"(?:^|[\s\[(|:])(?:eval|evaluation|evaluating|valid|validation|validate|validating|val|test|testing|dev|development)\b(?![./_=-]\w)"
    r"|^\s*\w+_(?:eval|val|valid|validation|test|dev)\b",
    re.IGNORECASE,
)
# What follows them where they are not a logger's name.
_OF_WHAT = re.compile(r" (?:epoch|set|loss|error|results?|metrics|avg|average|mean)\b", re.IGNORECASE)
# "Validation:", "--- Test results ---", "Val Epoch [3/10]" on a line of its own; the first group is training's.
HEADING = re.compile(
    rb"(?im:^(?:\[?[\d:.,/ T-]+\]? )?(?:\[?[A-Z]+\]?[ :-]+(?:[\w.]+:)?)?[ \t=*#>-]{0,40}"
    rb"(?:(train(?:ing)?)|valid(?:ation)?|val|test(?:ing)?|eval(?:uation|uating)?)\b"
    rb"(?: (?:set|phase|results?|metrics?|summary|stats|performance|error))*[ :.=*#-]*"
    rb"(?:epoch\W*\d+(?:\W*\d+)?)?[\])]?[ \t:.=*#-]*\r?$)"
)
MAY_HEAD = (b"train", b"val", b"test")  # and evaluation
RIGHT_ABOVE = 2  # a heading of validation stands right above
# Python's own words on an exception or a warning, which may name a loss: "RuntimeError: loss 3 is nan".
_OF_A_PROGRAM = re.compile(
    r"\s*(?:[\w.]*(?:Error|Exception|Warning): |File \"|warnings\.warn\()|\S*:\d+: \w*Warning: |.{0,60}? \w+Warning: "
)
_OF_TRAINING = re.compile(r"train", re.IGNORECASE)
_LOSS = re.compile(r"loss|xent|nll", re.IGNORECASE)
_INFO = b" Info: "
_INFO_LINES = re.compile("(?m:^(?:\\[|┌) Info: .*$(?:\\n(?:│|└) .*$)*)".encode())
_INFO_GOES_ON = re.compile("\\r?\\n(?:│|└)[ \\t]+(?=\\w+ = )".encode())
_FLOAT32 = re.compile(rb"(?<![\w.])([-+]?\d+\.\d+)f(?=[-+]?\d+\b)")
# Remembered from the line before; no number of the log.
_LAST, _EPOCHS, _MOVES, _GAP = "\0last", "\0epochs", "\0moves", "\0gap"


@dataclass(frozen=True, kw_only=True)
class AnyText(TextFormat):
    """The format of a text that no known trainer prints.

    Attributes:
        strict: leave out lines that name validation before the loss ("Test: [3/40] Loss 2.1").
    """

    strict: bool = True

    def read(self, line: str) -> LineValues | None:
        """The numbers of a line; None: it holds no loss."""
        if ("Error" in line or "arning" in line or "File " in line) and _OF_A_PROGRAM.match(line):
            return None
        line, values = named(line)
        losses = [name for name in values if is_loss(name) and not NO_LOSS.search(name)]
        if not losses:
            return None
        if self.strict and all(is_evaluation(name) for name in losses):
            return {}
        if is_of_validation(line, self.strict) and not any(_OF_TRAINING.search(name) for name in losses):
            return {}
        return placed(line, values)


def prepared(chunk: bytes) -> bytes:
    """The piece with each of Julia's records of several lines on one line: ``@info "Epoch 3" loss lr``, whose Float32 are
    2.31f0."""
    if _INFO not in chunk:
        return chunk
    lines = _INFO_LINES.sub(lambda m: _FLOAT32.sub(rb"\1e", m[0]), chunk)
    return _INFO_GOES_ON.sub(b" | ", lines)


def prepared_english(chunk: bytes) -> bytes:
    """The same, put into English."""
    return in_english(prepared(chunk).decode("utf-8", "replace")).encode()


class LogSigns:
    """Whether lines with a loss are a log, since a sentence, a setting or a stack trace names one too.

    A log has three lines of one loss with a counter or two different values, or two lines whose counter advances.
    """

    LINES = 3

    def __init__(self) -> None:
        self.lines = 0
        self._seen: dict[str, list[float | None]] = {}
        self._counted: float | None = None

    def suffices(self, values: LineValues) -> bool:
        """Take a line's numbers; returns whether the lines so far are a log."""
        self.lines += 1
        counter = next((values[n] for n in values if counter_of(n)), None)
        goes_on = counter is not None and self._counted is not None and counter > self._counted
        self._counted = counter if counter is not None else self._counted
        for name in values:
            if is_loss(name):
                seen = self._seen.setdefault(name, [])
                seen.append(values[name])
                if len(seen) > 1 and goes_on:
                    return True
                if len(seen) >= self.LINES and (counter is not None or len(set(map(repr, seen))) > 1):
                    return True
        return False


def counted_on(values: LineValues, before: LineValues) -> LineValues:
    """Count on where a full bar begins again, in the next epoch; bars that are always full count nothing."""
    if OF not in values and OF not in before and _LAST not in before:
        return values
    length, step = values.get(OF), values.get("step")
    if length is None or step is None:
        values |= {
            name: before[name]
            for name in (OF, _LAST, _EPOCHS, _MOVES, _GAP)
            if name in before and name not in values
        }
        return {name: value for name, value in values.items() if not name.startswith("\0")}
    last, epochs = before.get(_LAST), before.get(_EPOCHS) or 0.0
    moves = bool(before.get(_MOVES)) or step < length
    gap = before.get(_GAP) or 0.0
    if last is not None and step < last:
        # The bar was full, or its next value would have been past the end.
        if before.get(OF) == length and last + gap >= length > step and "epoch" not in values:
            epochs += 1
    elif last is not None:
        gap = step - last
    values |= {_LAST: step, _EPOCHS: epochs, _MOVES: float(moves), _GAP: gap}
    kept = {name: value for name, value in values.items() if not name.startswith("\0") and name != "step"}
    return {**kept, "step": step + epochs * length} if moves else kept


def is_of_validation(line: str, strict: bool = True) -> bool:
    """Whether a line names validation before its loss. Without ``strict``, only where that is not a logger's name."""
    loss = _LOSS.search(line)
    before = line[: loss.start()] if loss else line
    said = _OF_VALIDATION.search(before)
    if said is None or _OF_TRAINING.search(before):
        return False
    surely = re.search(r"\bval", said[0], re.IGNORECASE) or _OF_WHAT.match(line, said.end())
    return strict or surely is not None


ANY_TEXT = AnyText(
    name="text",
    trigger=re.compile(b"(?i:loss|xent|(?:\\b|_)nll)"),
    lines=(),
    finish=counted_on,
    above=ABOVE,
    words=(b"loss", b"xent", b"nll"),
)
# Where every line names validation, it is only a logger's name.
ANY_LINE = replace(ANY_TEXT, strict=False)
