"""The default bilingual corpus: documentation inside three packages of the Python index, in Chinese and English.

| package | text |
| --- | --- |
| tencentcloud-sdk-python | Chinese: what classes, parameters and calls of a cloud's services mean |
| tencentcloud-sdk-python-intl-en | the same services in English, aligned by service, class and parameter |
| botocore | English: documentation of another cloud's services |

pip downloads the wheels, and this module reads them as archives. It installs nothing (the first two would overwrite each other) and
executes nothing in them. Versions are pinned, so that everyone trains on the same text. A service is held out as a whole: its
sentences resemble each other. All three are under the Apache licence 2.0.

Limits: the domain is API documentation. For any other domain give your own files.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from html import unescape
from itertools import pairwise
from pathlib import Path

from glm.data.documents import Document
from glm.errors import InputError

VERSIONS = {
    "tencentcloud-sdk-python": "3.1.195",
    "tencentcloud-sdk-python-intl-en": "3.1.193",
    "botocore": "1.44.5",
}

_CLASS = re.compile(r'^class (\w+)\(AbstractModel\):\n\s+r?"""(.*?)"""', re.S | re.M)
_PARAMETER = re.compile(r":param _?(\w+): (.*?)\n\s*:type \w+: ([^\n]*)", re.S)
_CALL = re.compile(r'^    def (\w+)\(self, request\):\n\s+r?"""(.*?)\n\s*:param ', re.S | re.M)
_TAG = re.compile(r"<[^<>]{1,300}>")
_SPACE = re.compile(r"[ \t\u3000]+")
# Generated sentences that say nothing: "X request structure", "X返回参数结构体".
_TEMPLATE = re.compile(r"^\w*(请求参数结构体|返回参数结构体| request structure\.?| response structure\.?)$")


def download(name: str, folder: Path) -> Path:
    """Download a package's wheel unless it is there. Raises InputError with pip's last line where that fails."""
    version = VERSIONS[name]
    stem = f"{name.replace('-', '_')}-{version}-"
    if not (found := sorted(folder.glob(stem + "*.whl"))):
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
        ]
        done = subprocess.run(
            [*command, "--only-binary", ":all:", "--dest", str(folder), f"{name}=={version}"],
            capture_output=True,
            text=True,
            check=False,
        )
        found = sorted(folder.glob(stem + "*.whl"))
        if done.returncode or not found:
            said = next(
                (line for line in reversed(done.stderr.splitlines()) if "ERROR" in line), "pip failed"
            )
            raise InputError(
                f"cannot download {name} {version} for the default corpus ({said}); give files of your own"
            )
    return found[0]


def tencent_documents(wheel: Path, language: str) -> Iterator[Document]:
    """One document per class and one per service's calls, without sentences seen before."""
    seen: set[int] = set()
    with zipfile.ZipFile(wheel) as archive:
        for name in spread(n for n in archive.namelist() if n.endswith(("/models.py", "_client.py"))):
            source = archive.read(name).decode("utf-8", errors="replace")
            service = name.split("/")[1]
            for text in _texts(source, is_models=name.endswith("/models.py"), seen=seen):
                yield Document(
                    text=text, language=language, source=wheel.name.split("-")[0], group=f"tencent/{service}"
                )


def parameters(source: str) -> Iterator[tuple[str, str, str, str]]:
    """(class, parameter, description, type) of everything that a models.py describes."""
    for head, body in _classes(source):
        for name, said, kind in _PARAMETER.findall(body):
            yield head[1], name, said, kind


def _classes(source: str) -> Iterator[tuple[re.Match[str], str]]:
    """Each class's first line and docstring, and all that belongs to it."""
    starts = [match.start() for match in _CLASS.finditer(source)] + [len(source)]
    for first, last in pairwise(starts):
        body = source[first:last]
        head = _CLASS.match(body)
        assert head is not None
        yield head, body


def _texts(source: str, *, is_models: bool, seen: set[int]) -> Iterator[str]:
    if not is_models:
        lines = [_line(name, said, seen) for name, said in _CALL.findall(source)]
        if text := "\n".join(line for line in lines if line):
            yield text
        return
    for head, body in _classes(source):
        lines = [
            _line(head[1], head[2], seen),
            *(_line(name, said, seen) for name, said, _ in _PARAMETER.findall(body)),
        ]
        if text := "\n".join(line for line in lines if line):
            yield text


def _line(name: str, said: str, seen: set[int]) -> str:
    text = plain(said)
    if len(text) < 4 or _TEMPLATE.match(text) or (key := hash(text)) in seen:
        return ""
    seen.add(key)
    return f"{name}: {text}"


def botocore_documents(wheel: Path) -> Iterator[Document]:
    """One document per described operation or shape of at least 120 characters."""
    seen: set[int] = set()
    with zipfile.ZipFile(wheel) as archive:
        for name in spread(n for n in archive.namelist() if "/service-2.json" in n):
            raw = archive.read(name)
            model = json.loads(gzip.decompress(raw) if name.endswith(".gz") else raw)
            service = name.split("/")[2]
            for text in _documentation(model):
                clean = plain(text)
                if len(clean) >= 120 and (key := hash(clean)) not in seen:
                    seen.add(key)
                    yield Document(text=clean, language="en", source="botocore", group=f"aws/{service}")


def _documentation(model: object) -> Iterator[str]:
    if isinstance(model, dict):
        for key, value in model.items():
            if key == "documentation" and isinstance(value, str):
                yield value
            else:
                yield from _documentation(value)
    elif isinstance(model, list):
        for value in model:
            yield from _documentation(value)


def plain(text: str) -> str:
    """Text without HTML, its spaces and line breaks collapsed."""
    lines = (_SPACE.sub(" ", line).strip() for line in unescape(_TAG.sub(" ", text)).splitlines())
    return " ".join(line for line in lines if line)


def spread(names: Iterable[str]) -> list[str]:
    """Sort in an order that mixes services, the same everywhere, so that a corpus cut short holds a bit of many."""
    return sorted(names, key=lambda name: hashlib.md5(name.encode()).digest())
