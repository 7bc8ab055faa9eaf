"""Finds a suite or study by its name, or in a Python file of the user's own.

A file holds ``SUITE`` (an ``experiments.arm.Suite``) or ``STUDY`` (an ``experiments.study.Study``) at its top level. Python
executes it as the user's program, and nothing else from outside. ``load`` checks before anything runs that the claims' arms and
metrics exist.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections import Counter
from pathlib import Path

from experiments.arm import Suite
from experiments.metrics import METRICS
from experiments.study import Study
from experiments.suites import SUITES
from stabilitylab.errors import InputError

# A suite with rates has it beside the metrics of its runs.
OF_RATES = "frontier"


def load(name: str) -> Suite | Study:
    """The suite or study of that name, or of that file. Raises InputError with the known names, or with what a file lacks."""
    if name in SUITES:
        return checked(_held(importlib.import_module(SUITES[name]), name), name)
    if not name.endswith(".py"):
        raise InputError(
            f"there is no suite {name!r}: choose one of {', '.join(SUITES)}, or give a file of your own (FILE.py)"
        )
    path = Path(name)
    if not path.is_file():
        raise InputError(f"{name} is no file: give a Python file that holds SUITE or STUDY")
    module_name = f"_asked_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up
    # Its neighbours are importable, as for a script.
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise InputError(f"{name} cannot be run ({type(error).__name__}: {error}): mend it") from error
    finally:
        sys.path.remove(str(path.resolve().parent))
    return checked(_held(module, name), name)


def _held(module: object, name: str) -> Suite | Study:
    for held, kind in (("STUDY", Study), ("SUITE", Suite)):
        if isinstance(found := getattr(module, held, None), kind):
            return found
    raise InputError(
        f"{name} holds no SUITE (experiments.arm.Suite) and no STUDY (experiments.study.Study) at its top level"
    )


def made(folder: Path) -> Path:
    """Make and return the folder of a suite's runs."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be made a folder ({error.strerror}): give another --out") from None
    return folder


def checked(asked: Suite | Study, name: str) -> Suite | Study:
    """The same. Raises InputError where nothing is to run, or a claim names an arm or metric that it lacks."""
    arms = Counter(arm.name for arm in asked.arms)
    if not arms or arms.most_common(1)[0][1] > 1:
        twice = f"has the arm {arms.most_common(1)[0][0]!r} twice" if arms else "has no arms"
        raise InputError(f"{name} {twice}: give each arm a name of its own")
    for word, kind in ((asked.name, "name"), *((arm.name, "arm") for arm in asked.arms)):
        if not word or word.startswith(".") or any(sign in word for sign in "/\\:\0"):
            raise InputError(f"{name} has the {kind} {word!r}, which is to name a folder: give a plain word")
    if isinstance(asked, Suite) and not (asked.seeds and asked.steps >= 1):
        lacks = "no seeds" if not asked.seeds else f"{asked.steps} steps"
        raise InputError(f"{name} has {lacks}: give one at least")
    metrics = set(asked.outcomes) if isinstance(asked, Study) else {*METRICS}
    if isinstance(asked, Suite) and asked.rates:
        metrics.add(OF_RATES)
    for claim in asked.claims:
        for arm in (claim.arm, claim.baseline):
            if arm is not None and arm not in arms:
                raise InputError(
                    f"{name}: the claim {claim.text!r} is of the arm {arm!r}, which is none of {', '.join(arms)}"
                )
        if claim.metric not in metrics:
            raise InputError(
                f"{name}: the claim {claim.text!r} is of the metric {claim.metric!r}, which is none of "
                f"{', '.join(sorted(metrics))}"
            )
        if claim.direction not in ("less", "more"):
            raise InputError(
                f"{name}: the claim {claim.text!r} has the direction {claim.direction!r}: give less or more"
            )
    return asked
