r"""A pattern for one line of a text log, written as the line itself.

    step {step}/{*} | loss {loss} | norm {grad_norm}

    {name}       a number: 12, 1,234, 3.2e-05, nan, inf, also in quotes; kept under that name
    {*}          anything, as little as possible
    {pairs}      everything that follows as ``name: number`` or ``name=number``
    {? ... ?}    a part that may be missing
    a blank      any number of blanks, or none
    the rest     stands for itself; upper and lower case are one

A line matches wherever the pattern occurs in it; the reader removes colours (ANSI codes) first. A file of several formats is TOML:

    [mytrainer]
    line = ["it {step} l={loss}", "it {step} |{pairs}"]    # the first that matches counts; one text will do
    follow = true                                          # indented ``name=number`` lines below belong to it
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from stabilitylab.errors import InputError

NUMBER = (
    r"[-+]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|[-+]?(?:nan|inf(?:inity)?)\b"
)
_QUOTED = r"['\"]?({})['\"]?"
_PART = re.compile(r"\{\?|\?\}|\{(\*|[A-Za-z_][\w/ .-]*)\}|\s+|[^{}\s?]+|.", re.DOTALL)
# A name is letters, then words; between it and the number stand : = or blanks.
_PAIR = re.compile(
    rf"([A-Za-z_][\w/.()*-]*(?: (?:[A-Za-z(]|\d+\))[\w/.()*-]*){{0,6}})['\"]?\s*[:=]\s*['\"]?\[?({NUMBER})((?-i:[KMGT])(?!\w))?"
    rf"(?=['\"\s,;|%\]}})a-zA-Z]|$)",
    re.IGNORECASE,
)
# ``| learning rate 1.5E-4 |``: a name and a number alone between bars.
_CELL = re.compile(rf"(?:^|\|)\s*([A-Za-z][A-Za-z _-]*?)\s+({NUMBER})\s*(?=\||$)", re.IGNORECASE)
# nanotron prints 65536 as 65.5K.
_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_ANSI = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07")

# A counter on a line of its own: "Epoch 3/10", "EPOCH: 8", "=== Step 200 ===", "INFO: Step 100 took 0.5 s".
_GOES_ON = (  # what may follow the number, so that it does not belong to a sentence
    rb"[/\])|,:=*-]|\(|\.{2}|(?:of|per|took|starts|begins|started|finished|complete|done)\b|[ \t]+[^\s\d,;]{1,40}:?[ \t]*\r?$|$|\r"
)
ABOVE = re.compile(
    rb"(?im:(?:^|[\s\]\-|>=*#:])(epoch|step|iteration|iter|update|round)\b\s*[:=#]?\s*[\[(]?\s*(\d+)(?:\.0)?(?=\s*(?:"
    + _GOES_ON
    + rb")))"
)

LineValues = dict[str, float | None]


@dataclass(frozen=True, kw_only=True)
class TextFormat:
    """Lines of a text log that hold numbers.

    Attributes:
        name: the trainer's or format's name.
        source: repository and file that print the line.
        version: of that source.
        trigger: a regular expression in which every such line matches; a literal start makes it fast.
        lines: patterns; the first that matches counts.
        follow: indented ``name=number`` lines below belong to the record.
        losses: names of the loss, best first.
        finish: corrects a record that the trainer writes oddly, given the one before; gives None for no record.
        skip: matches in lines of validation.
        above: finds counters and their values in the lines between records.
        words: in small letters; every line in which the trigger matches holds one. Searching for them is some twenty times faster
            than for a trigger that does not begin with a word; without words the reader searches for the trigger.
        prepare: applied first to each piece of text.
        steady: the reading of a line does not depend on how large its numbers are (``line_templates``).
        loose: other trainers print such lines too; where they hold more, they are read as any trainer's.
        one_part: lines belong to one run, whether they name a rank or not.
        least: a file with fewer records is read as any trainer's.
    """

    name: str
    source: str = ""
    version: str = ""
    trigger: re.Pattern[bytes]
    lines: tuple[re.Pattern[str], ...]
    follow: bool = False
    losses: tuple[str, ...] = ()
    finish: Callable[[LineValues, LineValues], LineValues | None] | None = None
    skip: re.Pattern[str] | None = None
    above: re.Pattern[bytes] | None = None
    words: tuple[bytes, ...] = ()
    prepare: Callable[[bytes], bytes] | None = None
    loose: bool = False
    one_part: bool = False
    least: int = 1
    steady: bool = True

    def read(self, line: str) -> LineValues | None:
        """The numbers of a line, empty for one of validation; None: it is no record."""
        if self.skip is not None and self.skip.search(line):
            return {}
        for pattern in self.lines:
            found = pattern.search(line)
            if found:
                values: LineValues = {}
                for group, text in found.groupdict().items():
                    if text is not None:
                        if group == "pairs_":
                            values |= pairs(text)
                        else:
                            values[_unmangled(group)] = number(text)
                return values
        return None


def text_format(
    name: str,
    *lines: str,
    source: str = "",
    version: str = "",
    trigger: str | None = None,
    follow: bool = False,
    losses: tuple[str, ...] = (),
    finish: Callable[[LineValues, LineValues], LineValues | None] | None = None,
    skip: str | None = None,
    words: tuple[bytes, ...] = (),
    loose: bool = False,
    one_part: bool = False,
) -> TextFormat:
    """A format of patterns; without a trigger, it looks for the longest literal of each pattern."""
    seek = trigger if trigger is not None else "|".join(_longest(line) for line in lines)
    return TextFormat(
        name=name,
        source=source,
        version=version,
        trigger=re.compile(seek.encode()),
        lines=tuple(compiled(line) for line in lines),
        follow=follow,
        losses=losses,
        finish=finish,
        skip=None if skip is None else re.compile(skip),
        words=words,
        loose=loose,
        one_part=one_part,
    )


def compiled(pattern: str) -> re.Pattern[str]:
    """The regular expression of a pattern.

    Raises:
        InputError: a brace is not closed, a name occurs twice, or the pattern holds no number.
    """
    out: list[str] = []
    depth = 0
    for part in _PART.finditer(pattern):
        text, name = part[0], part[1]
        if text == "{?":
            out.append("(?:")
            depth += 1
        elif text == "?}":
            out.append(")?")
            depth -= 1
        elif name == "*":
            out.append(".*?")
        elif name == "pairs":
            out.append("(?P<pairs_>.*)")
        elif name is not None:
            out.append(rf"['\"]?(?P<{_mangled(name)}>{NUMBER})['\"]?")
        elif text.isspace():
            out.append(r"\s*")
        elif text in "{}":
            raise InputError(f"pattern {pattern!r}: a brace is not closed, or holds no name")
        else:
            out.append(re.escape(text))
    if depth:
        raise InputError(f"pattern {pattern!r}: {{? and ?}} do not pair")
    if "(?P<" not in "".join(out):
        raise InputError(f"pattern {pattern!r} holds no {{name}}: nothing would be read")
    try:
        return re.compile("".join(out), re.IGNORECASE)
    except re.error as error:
        raise InputError(f"pattern {pattern!r}: {error}") from None


def own_formats(given: str) -> list[TextFormat]:
    """The formats that ``--pattern`` gives: one pattern, or the name of a TOML file of formats.

    Raises:
        InputError: the file cannot be read, or a pattern is wrong.
    """
    if not given.endswith(".toml"):
        return [text_format("--pattern", given, trigger=_seek(given))]
    try:
        tables = tomllib.loads(Path(given).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"--pattern {given}: {error}") from None
    found = []
    for name, entry in tables.items():
        lines = entry.get("line") if isinstance(entry, Mapping) else None
        lines = [lines] if isinstance(lines, str) else lines
        if not isinstance(lines, list) or not lines or not all(isinstance(line, str) for line in lines):
            raise InputError(
                f'--pattern {given}: [{name}] needs a line = "..." with {{name}} for each number'
            )
        trigger = "|".join(_seek(line) for line in lines)
        found.append(text_format(name, *lines, trigger=trigger, follow=bool(entry.get("follow"))))
    if not found:
        raise InputError(f"--pattern {given} holds no formats: [name] and line = ... make one")
    return found


def pairs(text: str) -> LineValues:
    """``name: number`` and ``name=number`` anywhere in the text; the first for each name."""
    values: LineValues = {}
    for name, value, unit in _PAIR.findall(text):
        values.setdefault(name.strip(), number(value, unit))
    if "|" in text:
        for name, value in _CELL.findall(text):
            values.setdefault(name.strip(), number(value))
    return values


def number(text: str, unit: str = "") -> float | None:
    """A number as trainers print it, in thousands (K), millions... where a ``unit`` says so; None: no number."""
    try:
        value = float(text)
    except ValueError:
        try:
            value = float(text.replace(",", ""))
        except ValueError:
            return None
    if unit:
        value *= _UNITS[unit.upper()]
    # Stores without infinities write the largest number of their type instead.
    return value if -3.4028234e38 < value < 3.4028234e38 or value != value else math.copysign(math.inf, value)


def next_place(words: Sequence[bytes], chunk: bytes) -> Callable[[int], int]:
    """A function: place -> the first place from there on of one of the words, in small letters, or -1."""
    small = chunk.lower()
    places = {word: place for word in words if (place := small.find(word)) >= 0}

    def after(at: int) -> int:
        nearest = -1
        for word, place in list(places.items()):
            if place < at:
                place = places[word] = small.find(word, at)
                if place < 0:
                    del places[word]
                    continue
            if nearest < 0 or place < nearest:
                nearest = place
        return nearest

    return after


def without_colours(text: bytes) -> bytes:
    """The text without ANSI codes."""
    return _ANSI.sub(b"", text)


def plain_text(line: bytes) -> str:
    """A line as text, without colours."""
    if b"\x1b" in line:
        line = _ANSI.sub(b"", line)
    return line.decode("utf-8", errors="replace")


def _longest(pattern: str) -> str:
    words = [
        p[0] for p in _PART.finditer(re.sub(r"\{\?.*?\?\}", " ", pattern)) if p[1] is None and p[0].strip()
    ]
    return re.escape(max(words, key=len, default=""))


def _seek(pattern: str) -> str:
    """The longest literal, in any case of letters."""
    return f"(?i:{_longest(pattern)})"


def _mangled(name: str) -> str:
    return "n_" + "".join(c if c.isalnum() else f"_{ord(c):x}_" for c in name)


@lru_cache(4096)
def _unmangled(group: str) -> str:
    return re.sub(r"_([0-9a-f]+)_", lambda m: chr(int(m[1], 16)), group[2:])
