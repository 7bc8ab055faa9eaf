"""Prompt templates turn a record into a task example, in Jinja.

``|||`` divides a template into two or three parts:

    {{ review }}
    这条评论是[MASK]的。 ||| {{ label }} ||| 正面
    负面

the prompt with one [MASK] (put at the end where it is missing), the answer, and the choices, one a line. Source: the form of Sanh
et al. (2110.08207), which GLM-130B takes its prompts from. ``Template`` divides the source before it fills it in, so no text in a
record can pass for a part or a mask.

Jinja's sandbox runs the templates: they reach no attribute of Python's and include no file, and a name that the record lacks is an
error, not an empty string.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from glm.data.special import MASK
from glm.data.tasks import TaskExample
from glm.errors import InputError

DIVIDER = "|||"
# Stands for [MASK] while Jinja fills in a template: a character that text does not hold.
_PLACE = "\0"

_environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, autoescape=False)


class Template:
    """A prompt template.

    Args:
        source: its text.
        name: for messages.

    Raises:
        InputError: the source is no template, has not two or three parts, or has more than one [MASK] in its prompt.
    """

    def __init__(self, source: str, name: str) -> None:
        self._name = name
        parts = source.split(DIVIDER)
        if len(parts) not in (2, 3):
            raise InputError(
                f"template {name} has {len(parts)} parts: write PROMPT {DIVIDER} ANSWER, "
                f"or PROMPT {DIVIDER} ANSWER {DIVIDER} CHOICES with one choice a line"
            )
        if MASK not in parts[0]:
            parts[0] = f"{parts[0].rstrip()} {MASK}"
        parts[0] = parts[0].replace(MASK, _PLACE)
        try:
            self._parts = [_environment.from_string(part) for part in parts]
        except jinja2.TemplateSyntaxError as error:
            raise InputError(f"template {name} is not valid Jinja ({error}): repair it") from None

    def fill(
        self, record: Mapping[str, Any], *, task: str, language: str, group: str, where: str
    ) -> TaskExample:
        """The example that a record makes. ``where`` names the record in messages.

        Raises:
            InputError: the template names what the record lacks, or fails; a prompt, answer or choice comes out empty; or the
                answer is not among the choices.
        """
        try:
            prompt, answer, *rest = (part.render(record).strip() for part in self._parts)
        except Exception as error:  # a template may do anything that Jinja allows, wrongly
            raise InputError(
                f"template {self._name} cannot be filled in from {where} ({type(error).__name__}: {error})"
            ) from None
        if prompt.count(_PLACE) != 1:
            raise InputError(
                f"template {self._name} makes {prompt.count(_PLACE)} {MASK} from {where}: a prompt has one"
            )
        before, after = prompt.split(_PLACE)
        for part, text in (("prompt", before + after), ("answer", answer)):
            if not text.strip():
                raise InputError(
                    f"template {self._name} renders nothing as the {part} from {where}: repair the template, "
                    "or leave the record out"
                )
        choices = tuple(line.strip() for line in rest[0].splitlines() if line.strip()) if rest else ()
        if rest and answer not in choices:
            raise InputError(
                f"template {self._name}: the answer from {where} is not among its {len(choices)} choices: one a line"
            )
        return TaskExample(
            before=before,
            after=after,
            answer=answer,
            choices=choices,
            task=task,
            language=language,
            group=group,
        )
