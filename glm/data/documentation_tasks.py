"""Seven kinds of real tasks, made from the default corpus's packages, in Chinese and English.

| task | asked | given | choices |
| --- | --- | --- | --- |
| translate-zh-en, translate-en-zh | the translation | a parameter's description | descriptions of other parameters |
| describe-zh, describe-en | the description | a parameter's name and class | descriptions of other parameters |
| name-zh, name-en | the parameter's name | its description | names of other parameters |
| match-zh, match-en | whether they belong together | a name and a description | yes, no |
| type-zh, type-en | the parameter's type | its name and description | types |
| topic-en | the service | an operation's description | names of four services |
| required-en | whether a parameter must be given | its name and description | yes, no |

Wrong choices come from the same service, so that the subject alone does not give the answer away. Each description appears once, in
the first service that has it, so what a held-out service shares with others is either in training or in its tasks, not in both. The
tasks that answer yes or no have as many of each, up to chance.

Limits: service, version, class and parameter align the two languages; where one language's documentation has moved on, a pair is
loose.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from glm.data.packages import parameters, plain, spread
from glm.data.tasks import TaskExample
from glm.data.templates import Template

CHOICES = 4
_CHINESE = re.compile(r"[\u4e00-\u9fff]")
# Sentences that stand at thousands of parameters and say nothing about any of them.
_NULL = re.compile(
    r"\s*(注意：此字段可能返回 ?null，表示取不到有效值。?"
    r"|Note: ?This (field|parameter) may return null,? indicating that no valid values? can be obtained\.?)"
)
_LENGTHS = {
    "zh": (4, 90),
    "en": (12, 220),
}  # characters of a description: a longer one does not fit a row
_TYPES = {
    "zh": {"str": "字符串", "int": "整数", "bool": "布尔", "float": "浮点数", "list": "列表"},
    "en": {"str": "string", "int": "integer", "bool": "boolean", "float": "float", "list": "list"},
}
_YES_NO = {"zh": ("是", "否"), "en": ("yes", "no")}

_CHOICES = " ||| {{ answer }} ||| {{ choices | join('\n') }}"
PROMPTS: dict[str, tuple[str, ...]] = {
    "translate-zh-en": ("{{ text }}\n英文：[MASK]", "把这句话译成英文：{{ text }}\n[MASK]"),
    "translate-en-zh": ("{{ text }}\n中文：[MASK]", "Translate into Chinese: {{ text }}\n[MASK]"),
    "describe-zh": ("{{ owner }} 的参数 {{ name }}：[MASK]", "{{ name }}（{{ owner }}）表示什么？[MASK]"),
    "describe-en": (
        "{{ owner }}, parameter {{ name }}: [MASK]",
        "What does {{ name }} of {{ owner }} mean? [MASK]",
    ),
    "name-zh": ("{{ text }}\n参数名：[MASK]", "说明为“{{ text }}”的参数是[MASK]"),
    "name-en": ("{{ text }}\nParameter: [MASK]", 'The parameter described as "{{ text }}" is [MASK]'),
    "match-zh": (
        "{{ name }}：{{ text }}\n说明与参数相符吗？[MASK]",
        "“{{ text }}”说的是 {{ name }} 吗？[MASK]",
    ),
    "match-en": (
        "{{ name }}: {{ text }}\nDoes the description fit the parameter? [MASK]",
        'Is {{ name }} described by "{{ text }}"? [MASK]',
    ),
    "type-zh": ("{{ name }}：{{ text }}\n类型：[MASK]", "参数 {{ name }}（{{ text }}）的类型是[MASK]"),
    "type-en": ("{{ name }}: {{ text }}\nType: [MASK]", "The type of {{ name }} ({{ text }}) is [MASK]"),
    "topic-en": ("{{ text }}\nService: [MASK]", "Which service is this about? {{ text }}\n[MASK]"),
    "required-en": (
        "{{ name }} of {{ owner }}: {{ text }}\nRequired: [MASK]",
        "{{ text }}\nMust {{ owner }} have {{ name }}? [MASK]",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parameter:
    owner: str
    name: str
    type: str
    text: str


def tencent_tasks(chinese: Path, english: Path, per_service: int) -> Iterator[TaskExample]:
    """Tasks from the wheels of the two languages, at most ``per_service`` of each for each service."""
    seen: set[str] = set()
    with zipfile.ZipFile(chinese) as zh_archive, zipfile.ZipFile(english) as en_archive:
        in_english = set(en_archive.namelist())
        for file in spread(name for name in zh_archive.namelist() if name.endswith("/models.py")):
            group = f"tencent/{file.split('/')[1]}"
            zh = _parameters(zh_archive, file, "zh", seen)
            en = _parameters(en_archive, file, "en", seen) if file in in_english else {}
            for language, known in (("zh", zh), ("en", en)):
                ordered = _ordered(known, per_service, language)
                yield from _about_parameters(known, ordered, language, group)
            both = {key: zh[key] for key in zh if key in en}
            for key in _ordered(both, per_service, "pairs"):
                for task, text, answers in (
                    ("translate-zh-en", zh[key].text, en),
                    ("translate-en-zh", en[key].text, zh),
                ):
                    answer = answers[key].text
                    choices = _choices(answer, [answers[other].text for other in both], task + text)
                    if choices:
                        yield _fill(task, "", group, text=text, answer=answer, choices=choices)


def aws_tasks(wheel: Path, per_service: int) -> Iterator[TaskExample]:
    """Tasks from botocore's wheel, at most ``per_service`` of each for each service."""
    seen: set[str] = set()
    with zipfile.ZipFile(wheel) as archive:
        files = spread(name for name in archive.namelist() if "/service-2.json" in name)
        titles: list[str] = []  # of earlier services: wrong choices
        for file in files:
            raw = archive.read(file)
            model = json.loads(gzip.decompress(raw) if file.endswith(".gz") else raw)
            group = f"aws/{file.split('/')[2]}"
            title = str(model["metadata"]["serviceFullName"])
            if len(titles) >= CHOICES:
                yield from _topics(model, title, titles, group, per_service, seen)
            if title not in titles:
                titles.append(title)
            yield from _required(model, group, per_service, seen)


def _parameters(
    archive: zipfile.ZipFile, file: str, language: str, seen: set[str]
) -> dict[tuple[str, str], _Parameter]:
    """Described parameters of a service by (class, name), each description once."""
    found = {}
    for owner, name, said, kind in parameters(archive.read(file).decode("utf-8", errors="replace")):
        text = _NULL.sub("", plain(said))
        if _fits(text, language) and text not in seen:
            seen.add(text)
            found[owner, name] = _Parameter(owner=owner, name=name, type=kind.split(" ")[0], text=text)
    return found


def _fits(text: str, language: str) -> bool:
    least, most = _LENGTHS[language]
    return least <= len(text) <= most and bool(_CHINESE.search(text)) == (language == "zh")


def _about_parameters(
    known: dict[tuple[str, str], _Parameter],
    ordered: Sequence[tuple[str, str]],
    language: str,
    group: str,
) -> Iterator[TaskExample]:
    texts, names = [p.text for p in known.values()], [p.name for p in known.values()]
    types = _TYPES[language]
    yes, no = _YES_NO[language]
    for number, key in enumerate(ordered):
        it = known[key]
        fields = {"owner": it.owner, "name": it.name, "text": it.text}
        if choices := _choices(it.text, texts, "describe" + it.text):
            yield _fill(f"describe-{language}", language, group, **fields, answer=it.text, choices=choices)
            other = next(text for text in choices if text != it.text)
            said, answer = (it.text, yes) if number % 2 else (other, no)
            yield _fill(
                f"match-{language}",
                language,
                group,
                **{**fields, "text": said},
                answer=answer,
                choices=(yes, no),
            )
        if choices := _choices(it.name, names, "name" + it.text):
            yield _fill(f"name-{language}", language, group, **fields, answer=it.name, choices=choices)
        if it.type in types:
            yield _fill(
                f"type-{language}",
                language,
                group,
                **fields,
                answer=types[it.type],
                choices=tuple(types.values()),
            )


def _topics(
    model: dict[str, Any], title: str, titles: list[str], group: str, per_service: int, seen: set[str]
) -> Iterator[TaskExample]:
    made = 0
    for name, operation in sorted(model["operations"].items()):
        text = plain(str(operation.get("documentation", "")))
        if made < per_service and _fits(text, "en") and text not in seen:
            seen.add(text)
            made += 1
            if choices := _choices(title, titles, name + text):
                yield _fill("topic-en", "en", group, text=text, answer=title, choices=choices)


def _required(model: dict[str, Any], group: str, per_service: int, seen: set[str]) -> Iterator[TaskExample]:
    known: dict[tuple[str, str], tuple[str, bool]] = {}
    for owner, shape in model["shapes"].items():
        if shape.get("type") == "structure" and owner.endswith(("Request", "Input")):
            for name, member in shape.get("members", {}).items():
                text = plain(str(member.get("documentation", "")))
                if _fits(text, "en") and text not in seen:
                    seen.add(text)
                    known[owner, name] = (text, name in shape.get("required", ()))
    yes, no = _YES_NO["en"]
    ordered = _ordered(known, len(known), "required")
    must, may = ([key for key in ordered if known[key][1] is needed] for needed in (True, False))
    each = min(len(must), len(may), per_service // 2)
    for keys, answer in ((must, yes), (may, no)):
        for owner, name in keys[:each]:
            text = known[owner, name][0]
            yield _fill(
                "required-en",
                "en",
                group,
                owner=owner,
                name=name,
                text=text,
                answer=answer,
                choices=(yes, no),
            )


def _choices(answer: str, others: Sequence[str], salt: str) -> tuple[str, ...]:
    """The answer among three others, in an order that does not give it away; empty where there are not three."""
    found = [answer]
    start = _hash(salt) % max(1, len(others))
    for step in range(len(others)):
        other = others[(start + step * 7919) % len(others)]
        if other not in found and "\n" not in other:
            found.append(other)
            if len(found) == CHOICES:
                return tuple(sorted(found, key=lambda text: _hash(salt + text)))
    return ()


def _ordered(known: dict[tuple[str, str], Any], count: int, salt: str) -> list[tuple[str, str]]:
    return sorted(known, key=lambda key: _hash(f"{salt} {key}"))[:count]


def _fill(task: str, language: str, group: str, **record: Any) -> TaskExample:
    templates = _templates(task)
    template = templates[_hash(f"{task} {record}") % len(templates)]
    return template.fill(record, task=task, language=language, group=group, where=group)


@cache
def _templates(task: str) -> tuple[Template, ...]:
    return tuple(Template(source + _CHOICES, task) for source in PROMPTS[task])


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.md5(text.encode()).digest()[:8], "big")
