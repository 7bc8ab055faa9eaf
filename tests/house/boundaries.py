"""Who may import whom, read from the source without importing it."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

# A package and the packages that its modules must not import. An arrow runs down only:
# experiments -> glm -> stabilitylab; and glm's rooms that know only torch know nothing of the instrument.
FORBIDDEN = {
    "stabilitylab": ("glm", "experiments"),
    "glm": ("experiments",),
    "glm/distributed": ("stabilitylab",),
    "glm/model": ("stabilitylab",),
    "glm/data": ("stabilitylab", "glm.distributed", "glm.precision", "glm.model"),
    "glm/precision": ("stabilitylab", "glm.distributed"),
    "glm/planning": ("stabilitylab", "glm.data", "glm.distributed"),
    "glm/parallel": ("stabilitylab", "glm.data"),
}

# The rooms of a floor, lowest first. A room imports rooms below it, never one above, so there is no cycle.
ROOMS = {
    "stabilitylab": (
        "errors", "lazy_names", "compat", "command_line", "c_compiler", "telemetry", "forward_watch", "formats",
        "statistics", "model_structure", "runs", "figures", "charts", "probes", "logs", "models", "spikes",
        "attribution", "sinks", "monitoring", "watching", "forecast", "report", "outliers", "quantization", "integrations",
        "laboratory", "demo", "cli",
    ),
    "glm": (
        "errors", "c_compiler", "device", "distributed", "precision", "model", "data", "planning", "train", "presets", "parallel",
        "inference", "commands", "cli",
    ),
    "experiments": (
        "program", "statistics", "verdicts", "arm", "metrics", "outcomes", "trial", "study", "data", "suites", "lookup",
        "execution", "results", "report", "commands", "benchmarks", "cli",
    ),
}  # fmt: skip


# Imports that may close a cycle: a scheme makes the layer that is built on it.
CLOSING = {("stabilitylab.quantization.scheme", "stabilitylab.quantization.linear")}


def circles(root: Path) -> list[list[str]]:
    """Import cycles between files, including imports inside functions; imports for types alone do not count."""
    files = {}
    for floor in ROOMS:
        for file in (root / floor).rglob("*.py"):
            parts = file.relative_to(root).with_suffix("").parts
            files[".".join(parts).removesuffix(".__init__")] = file
    reached: dict[str, set[str]] = {}
    for module, file in files.items():
        names = set(imported(file, types=False)) & files.keys()
        # ``from room import file`` names both; the room's own front is meant only where the file is none.
        names -= {name.rpartition(".")[0] for name in names} if file.name != "__init__.py" else set()
        reached[module] = {name for name in names if name != module and (module, name) not in CLOSING}
    for between in files:
        for module in files:
            if between in reached[module]:
                reached[module] |= reached[between]
    groups = {
        tuple(sorted({module, *(other for other in reached[module] if module in reached[other])}))
        for module in files
        if module in reached[module]
    }
    return sorted(map(list, groups))


def violations(root: Path) -> list[str]:
    """Every import under ``root`` that runs the wrong way, as ``file: imports name``; every room without a place."""
    found = []
    for package, forbidden in FORBIDDEN.items():
        for file in sorted((root / package).rglob("*.py")):
            for name in imported(file):
                if any(name == bad or name.startswith(bad + ".") for bad in forbidden):
                    found.append(f"{file.relative_to(root)}: imports {name}")
    for floor, rooms in ROOMS.items():
        height = {room: i for i, room in enumerate(rooms)}
        for file in sorted((root / floor).rglob("*.py")):
            room = file.relative_to(root / floor).parts[0].removesuffix(".py")
            if room.startswith("__"):  # the front door, and python -m
                continue
            if room not in height:
                found.append(f"{file.relative_to(root)}: give the room {room} its place in ROOMS")
                continue
            for name in imported(file):
                other = name.split(".")[1] if name.startswith(floor + ".") else room
                if height.get(other, -1) > height[room]:
                    found.append(f"{file.relative_to(root)}: imports {name}, a room above")
    return found


def foreign(root: Path) -> dict[str, list[str]]:
    """Names with one leading underscore that the instrument and the stack use and do not define, with the files that use them."""
    used: dict[str, list[str]] = {}
    defined: set[str] = set()
    for file in sorted(file for floor in ("stabilitylab", "glm") for file in (root / floor).rglob("*.py")):
        names: set[str] = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            match node:
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                    defined.add(name)
                case ast.Name(id=name, ctx=ast.Store()):
                    defined.add(name)
                case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                    defined.add(name)
                case ast.Attribute(attr=name):
                    names.add(name)
                case ast.Call(
                    func=ast.Name(id="getattr" | "hasattr" | "setattr"),
                    args=[_, ast.Constant(value=str(name)), *_],
                ):
                    names.add(name)
                case ast.ImportFrom(module=str(module), names=aliases) if (
                    module.partition(".")[0] not in ROOMS
                ):
                    names.update((*module.split("."), *(alias.name for alias in aliases)))
        for name in names:
            if name.startswith("_") and not name.startswith("__"):
                used.setdefault(name, []).append(str(file.relative_to(root)))
    return {name: where for name, where in used.items() if name not in defined}


def imported(file: Path, *, types: bool = True) -> tuple[str, ...]:
    """Absolute names that a module imports anywhere, also inside functions and, with ``types``, in type-checking blocks."""
    outside, for_types = _imports(file)
    return outside + for_types if types else outside


@cache
def _imports(file: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names outside type-checking blocks and names in them. A file is parsed once, however many rules ask."""
    found: tuple[list[str], list[str]] = ([], [])
    waiting: list[tuple[ast.AST, bool]] = [(ast.parse(file.read_text(encoding="utf-8")), False)]
    while waiting:
        node, for_types = waiting.pop()
        for_types = for_types or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        waiting += [(child, for_types) for child in ast.iter_child_nodes(node)]
        if isinstance(node, ast.Import):
            found[for_types].extend(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found[for_types].extend((node.module, *(f"{node.module}.{alias.name}" for alias in node.names)))
    return tuple(found[False]), tuple(found[True])
