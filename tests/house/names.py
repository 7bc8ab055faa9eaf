"""Which names of the three floors stand for more than one thing, read from the source without importing it.

Names are those of modules, packages and classes; a type alias counts where a class has the same name. Suites and benchmarks are
scripts of one question each, whose names go no further, and a name with a leading underscore belongs to its module.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

FLOORS = ("stabilitylab", "glm", "experiments")
SCRIPTS = ("experiments/suites", "experiments/benchmarks")

# Names of modules and packages that several rooms share, since they mean the same thing in each, and that meaning.
MODULE_ROLES = {
    "base": "the protocol that the room's things have",
    "cli": "a floor's command line",
    "commands": "the room's commands",
    "config": "the room's settings",
    "data": "text: the suites', and what `glm corpus`, `tokenizer` and `shards` make of one",
    "errors": "InputError, under the floor's own name",
    "executors": "where work is computed: here or in other processes",
    "kernel": "the room's compiled kernel",
    "loading": "opening what lies on disk",
    "page": "the room's HTML page",
    "reference": "the room's float64 oracle",
    "tables": "the room's figures as tables",
    "terminal": "the room's words on the terminal",
    "words": "the room's findings in sentences",
    # One thing, seen from two rooms.
    "attention": "the layer, and the probe of it",
    "c_compiler": "the builder of C sources, under the floor's own name",
    "charts": "to hover and zoom: of runs, and of suites",
    "checkpoint": "of one process, and of several",
    "curves": "for pictures, and for pages",
    "engine": "of one process, and of several",
    "figures": "pictures: of runs, and of a scan",
    "formats": "number formats of few bits, and the probe of them",
    "inference": "using a trained model, and the commands that do",
    "loop": "a training loop: our own, and what any must have to be forked",
    "maps": "for pictures, and for pages",
    "monitoring": "the monitor, and the trainer's callback that holds one",
    "optimizer": "of one process, and of several",
    "planning": "a model's costs on paper, and the command that tells them",
    "precision": "the number formats of a run, and the probe of them",
    "report": "a page: of runs, and of suites",
    "statistics": "numbers that sum others up: of tensors, and of runs",
    "tensorboard": "its files, read and written",
    "text_model": "a model that reads text, and a GLM as one",
    "trackers": "their stores, read and written",
    "train": "training, and the command that does it",
    "updates": "the statistics of an update, and the probe that takes them",
    "vocabulary_loss": "of one process, and of several",
}
CLASS_ROLES = {"MonitorCallback": "a trainer's callback that watches its model"}


def faults(root: Path) -> list[str]:
    """Names under ``root`` that stand twice and are no role, with where; roles that stand once, which are none."""
    modules, classes, aliases = names(root)
    for name in classes:
        classes[name] += aliases.get(name, [])
    found = []
    for kind, places, roles in (("module", modules, MODULE_ROLES), ("class", classes, CLASS_ROLES)):
        twice = {name: where for name, where in places.items() if len(where) > 1}
        found += [f"{kind} {name}: {', '.join(twice[name])}" for name in sorted(twice.keys() - roles.keys())]
        found += [
            f"{kind} {name} is no role: it stands once at most"
            for name in sorted(roles.keys() - twice.keys())
        ]
    return found


def names(root: Path) -> tuple[dict[str, list[str]], dict[str, list[str]], dict[str, list[str]]]:
    """Modules and packages, classes, and named types, each with the files that have it."""
    modules, classes, aliases = (defaultdict[str, list[str]](list) for _ in range(3))
    for file in files(root):
        where = str(file.relative_to(root))
        name = file.parent.name if file.stem == "__init__" else file.stem
        if not name.startswith("_"):
            modules[name].append(where)
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            match node:
                case ast.ClassDef(name=name) if not name.startswith("_"):
                    classes[name].append(where)
                case ast.Assign(targets=[ast.Name(id=name)]) if name[:1].isupper() and not name.isupper():
                    aliases[name].append(where)
    return modules, classes, aliases


def files(root: Path) -> Iterator[Path]:
    """Modules that are no scripts."""
    for floor in FLOORS:
        for file in sorted((root / floor).rglob("*.py")):
            if not str(file.relative_to(root)).startswith(SCRIPTS):
                yield file
