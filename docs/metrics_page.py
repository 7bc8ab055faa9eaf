"""The page ``metrics.md``, made from the tables in the probes' docstrings when the site is built.

A test holds those tables against what the probes record (tests/stabilitylab/probes/test_tables.py): the page is never out of date.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
HEAD = """# Metrics

A number's name is `family/site/statistic`, with an index where there are several (a head, a row). This page is made from the
docstrings of the probes, which tests hold against what is recorded. The step's own numbers are `train/-/loss`,
`train/-/gradient_norm`, `train/-/learning_rate`, `train/-/loss_scale`, and whatever else is handed to `monitor.step`.
"""


def on_files(files: Files, config: Any) -> Files:
    """mkdocs calls this once it has listed the pages."""
    files.append(File.generated(config, "metrics.md", content=page()))
    return files


def page() -> str:
    """Every probe with a table, in the order of their names."""
    sources = sorted((ROOT / "stabilitylab" / "probes").glob("*.py")) + [
        ROOT / "glm" / "train" / "range_probe.py"
    ]
    parts = [HEAD]
    for source in sources:
        text = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
        if "| statistic |" in text:
            title, _, rest = text.partition("\n\n")
            title = " ".join(title.split())
            parts.append(f"## {source.stem.replace('_', ' ')}\n\n{_markdown(title)}\n\n{_markdown(rest)}")
    return "\n\n".join(parts)


def _markdown(text: str) -> str:
    return re.sub(r"``([^`]+)``", r"`\1`", text)
