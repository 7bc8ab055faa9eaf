"""The help of ``glm train PRESET`` in parts: an overview of what every run needs and the groups of flags, one group, or all of it.

tyro generates some two hundred flags from the configuration, and nobody reads that page whole. This module takes apart what tyro
writes where there is no terminal: a title, a rule, what the group is, a rule again, the flags.
"""

from __future__ import annotations

import re

from glm.errors import InputError

ALL = "all"
_TITLE = re.compile(r"^ (?:(?P<group>[\w.-]+) )?options$")
_RULE = re.compile(r"^ +-+$")


def help_text(page: str, program: str, group: str | None) -> str:
    """The part of tyro's page to print.

    Args:
        page: all of it, without colours.
        program: name of the command, for the hint.
        group: whose flags, those of its own groups included; "all"; None: the overview.

    Raises:
        InputError: there is no such group.
    """
    head, boxes = _boxes(page)
    if group == ALL:
        return page
    if group is None:
        width = max(len(name) for name in boxes) + 2
        names = "\n".join(f"  {name:{width}}{_summary(box)}" for name, box in boxes.items() if name)
        return (
            f"{head}\n{boxes.get('', '')}\n\ngroups of flags, --GROUP.FLAG VALUE:\n{names}\n\n"
            f"{program} --help GROUP lists a group's, --help {ALL} every flag."
        )
    chosen = [box for name, box in boxes.items() if name == group or name.startswith(f"{group}.")]
    if not chosen:
        known = ", ".join(name for name in boxes if name)
        raise InputError(f"{program} has no group of flags {group!r}: choose one of {known}, or {ALL}")
    return "\n\n".join(chosen)


def _boxes(page: str) -> tuple[str, dict[str, str]]:
    """The text before the first box, and the boxes by group; the first box's group is the empty name."""
    head: list[str] = []
    boxes: dict[str, list[str]] = {}
    into = head
    for line in (line.rstrip() for line in page.splitlines()):
        if title := _TITLE.match(line):
            into = boxes.setdefault(title["group"] or "", [])
        into.append(line)
    return "\n".join(head).strip(), {name: "\n".join(lines).rstrip() for name, lines in boxes.items()}


def _summary(box: str) -> str:
    """The first sentence between a box's two rules."""
    words: list[str] = []
    for line in box.splitlines()[2:]:
        if _RULE.match(line):
            return " ".join(" ".join(words).split()).partition(". ")[0].rstrip(".")
        words.append(line)
    return ""
