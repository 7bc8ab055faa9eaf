"""Who may import whom, read from the source without importing it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

# A package and the packages that its modules must not import. An arrow runs down only:
# experiments -> glm -> stabilitylab; and glm's rooms that know only torch know nothing of the instrument.
FORBIDDEN = {
    "stabilitylab": ("glm", "experiments"),
    "glm": ("experiments",),
    "glm/model": ("stabilitylab", "glm.data", "glm.train", "glm.inference", "glm.parallel"),
    "glm/data": ("stabilitylab", "glm.train", "glm.inference", "glm.model", "glm.parallel", "glm.precision"),
    "glm/precision": ("stabilitylab", "glm.data", "glm.train", "glm.inference", "glm.parallel"),
    "glm/parallel": ("stabilitylab", "glm.data", "glm.inference"),
}


def violations(root: Path) -> list[str]:
    """Every import under ``root`` that runs the wrong way, as ``file: imports name``."""
    found = []
    for package, forbidden in FORBIDDEN.items():
        for file in sorted((root / package).rglob("*.py")):
            for name in imported(file):
                if any(name == bad or name.startswith(bad + ".") for bad in forbidden):
                    found.append(f"{file.relative_to(root)}: imports {name}")
    return found


def imported(file: Path) -> Iterator[str]:
    """Absolute names that a module imports anywhere, also inside functions and type-checking blocks."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
