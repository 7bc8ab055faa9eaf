r"""One regular expression reads all lines that differ only in their numbers.

    [step 10/300] loss: 2.31 | lr: 1e-4           [step (\d+)/300] loss: (\d+\.\d+) | lr: (\d+)e-(\d+)

A log repeats one line; to analyse it anew costs twenty times as much as to read its numbers. ``Plans`` makes a plan of a line by
trial: it replaces the line's numbers with random ones of the same shape, and sees from what the format then reads which number
became which value. It keeps a plan only where every trial agrees, so that the plan reads what the format would read; the format
itself reads any other line. A number that belongs to a word (``loss1``) or is the length of something (``3/100``) stands for
itself.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from stabilitylab.logs.pattern import LineValues, number

ReadLine = tuple[LineValues | None, str]  # a line's values, and the part of the log it belongs to

_TOKEN = re.compile(
    r"(?<![\w./])(?<!\d,)(?<!/ )(?<!of )\d+(?:,\d{3})*(?!\d)(?:\.\d+)?(?:[eE][-+]?\d+)?", re.ASCII
)
_SHAPE = re.compile(r"(\d[\d,]*)(\.\d+)?(?:([eE][-+]?)(\d+))?", re.ASCII)
_JOINED = re.compile(r"\d[-:T]")
_LENGTH = re.compile(r"(?:/ ?|of )(\d+)")
_TRIALS = 4
_WARM = 48  # lines read before the first plan: short logs pay nothing
_MOST = 256  # plans; a log of more kinds of lines is read line by line
_RECENT = 4


@dataclass(frozen=True, slots=True)
class Plan:
    """How to read one kind of line.

    Attributes:
        line: matches the whole line; has a group for each number that is a value.
        groups: name -> its group, in the order of ``names``.
        names: all values' names.
        constant: values the same in every such line.
        counted: name -> (group, group, length): the first times the length and the second.
        part: the part of the log.
    """

    line: re.Pattern[str]
    groups: tuple[tuple[str, int], ...]
    constant: tuple[tuple[str, float | None], ...]
    counted: tuple[tuple[str, int, int, float], ...]
    names: tuple[str, ...]
    part: str
    record: bool

    def read(self, texts: tuple[str, ...]) -> ReadLine:
        """The values of a line whose groups these are."""
        if not self.record:
            return None, self.part
        values: dict[str, float | None] = {}
        for name, group in self.groups:
            values[name] = number(texts[group])
        if self.constant or self.counted:
            values.update(self.constant)
            for name, times, plus, length in self.counted:
                values[name] = float(texts[times]) * length + float(texts[plus])
            values = {name: values[name] for name in self.names}
        return values, self.part


class Plans:
    """Reads lines as ``read`` does, by plans where it can.

    Args:
        read: gives the values of a line and its part of the log.
    """

    def __init__(self, read: Callable[[str], ReadLine]) -> None:
        self._read = read
        self._recent: list[Plan] = []
        self._made = self._seen = 0
        self._shapes: dict[str, Plan | None] = {}

    def read(self, line: str) -> ReadLine:
        """What the format reads in the line."""
        for plan in self._recent:
            if found := plan.line.fullmatch(line):
                if plan is not self._recent[0]:
                    self._recent.remove(plan)
                    self._recent.insert(0, plan)
                return plan.read(found.groups())
        self._seen += 1
        if self._seen < _WARM or self._made > _MOST:
            return self._read(line)
        shape = _TOKEN.sub(_shape_of, line)
        if shape in self._shapes:
            plan_ = self._shapes[shape]
        else:
            self._made += 1
            plan_ = self._shapes[shape] = _plan(self._read, line)
        if plan_ is None or (found := plan_.line.fullmatch(line)) is None:
            return self._read(line)
        self._recent = [plan_, *self._recent[: _RECENT - 1]]
        return plan_.read(found.groups())


def _shape_of(found: re.Match[str]) -> str:
    whole, fraction, exponent, _ = _parts(found)
    kept = re.sub(r"\d", "0", whole) if _is_locked(found) or "," in whole else "0"
    return f"\0{kept}{'.' if fraction else ''}{exponent or ''}"


def _is_locked(found: re.Match[str]) -> bool:
    """Whether it is part of a date or a time, so that its length matters."""
    line = found.string
    before, after = line[max(found.start() - 2, 0) : found.start()], line[found.end() : found.end() + 2]
    return bool(_JOINED.fullmatch(before) or _JOINED.fullmatch(after[::-1]))


def _plan(read: Callable[[str], ReadLine], line: str) -> Plan | None:
    """The plan of a line; None: its reading depends on the numbers themselves."""
    tokens = list(_TOKEN.finditer(line))
    values, part = read(line)
    draw = random.Random(len(line))
    trials: list[tuple[list[str], LineValues | None]] = [([t[0] for t in tokens], values)]
    for _ in range(_TRIALS):
        texts = [_another(token, draw) for token in tokens]
        there, where = read(_filled(line, tokens, texts, draw))
        if where != part or (there is None) != (values is None):
            return None
        if there is not None and values is not None and list(there) != list(values):
            return None
        trials.append((texts, there))
    groups: list[tuple[str, int]] = []
    constant: list[tuple[str, float | None]] = []
    counted: list[tuple[str, int, int, float]] = []
    lengths = [float(length) for length in _LENGTH.findall(line)]
    for name in values or ():
        told = [there[name] for _, there in trials if there is not None]
        known = [[number(text) for text in texts] for texts, _ in trials]
        every = range(len(tokens))
        fit = [i for i in every if all(numbers[i] == x for numbers, x in zip(known, told, strict=True))]
        if fit:
            groups.append((name, fit[0]))
        elif len(set(map(repr, told))) == 1:
            constant.append((name, told[0]))
        else:
            several = [
                (name, i, j, length)
                for length in lengths
                for i in every
                for j in every
                if i != j
                and all(
                    x is not None and (numbers[i] or 0.0) * length + (numbers[j] or 0.0) == x
                    for numbers, x in zip(known, told, strict=True)
                )
            ]
            if not several:
                return None
            counted.append(several[0])
    used = sorted({i for _, i in groups} | {i for _, a, b, _ in counted for i in (a, b)})
    at = {token: group for group, token in enumerate(used)}
    return Plan(
        line=re.compile(_expression(line, tokens, set(used)), re.ASCII),
        groups=tuple((name, at[i]) for name, i in groups),
        constant=tuple(constant),
        counted=tuple((name, at[i], at[j], length) for name, i, j, length in counted),
        names=tuple(values or ()),
        part=part,
        record=values is not None,
    )


def _another(token: re.Match[str], draw: random.Random) -> str:
    """Another number of the same shape."""
    whole, fraction, exponent, power = _parts(token)
    if _is_locked(token) or "," in whole:
        new = re.sub(r"\d", lambda m: str(draw.randint(1, 9)), whole)
    else:
        new = str(draw.randint(1, 10 ** draw.randint(1, 6)))
    if fraction:
        new += "." + "".join(str(draw.randint(1, 9)) for _ in range(draw.randint(1, 8)))
    return new + (f"{exponent}{draw.randint(1, 9):0{len(power)}d}" if exponent else "")


def _filled(line: str, tokens: list[re.Match[str]], texts: list[str], draw: random.Random) -> str:
    out, end = [], 0
    for token, text in zip(tokens, texts, strict=True):
        between = line[end : token.start()]
        if between.endswith("  "):  # right-aligned numbers
            between = between.rstrip(" ") + " " * draw.randint(1, 5)
        out += [between, text]
        end = token.end()
    return "".join([*out, line[end:]])


def _expression(line: str, tokens: list[re.Match[str]], used: set[int]) -> str:
    out, end = [], 0
    for i, token in enumerate(tokens):
        between = line[end : token.start()]
        flush = between.endswith("  ")
        out.append(re.escape(between.rstrip(" ")) + " +" if flush else re.escape(between))
        text = _digits(token)
        out.append(f"({text})" if i in used else text)
        end = token.end()
    return "".join([*out, re.escape(line[end:])])


def _digits(token: re.Match[str]) -> str:
    whole, fraction, exponent, _ = _parts(token)
    fixed = _is_locked(token) or "," in whole
    text = re.sub(r"\d+", lambda m: rf"\d{{{len(m[0])}}}", whole) if fixed else r"\d+"
    return text + (r"\.\d+" if fraction else "") + (re.escape(exponent) + r"\d+" if exponent else "")


def _parts(token: re.Match[str]) -> tuple[str, str, str, str]:
    """The digits before the point, those after it, the exponent's sign, the exponent."""
    found = _SHAPE.fullmatch(token[0])
    assert found is not None
    whole, fraction, exponent, power = found.groups(default="")
    return whole, fraction, exponent, power
