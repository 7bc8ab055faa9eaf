"""Does forensics name the planted cause, and the site of the plant?

    python -m experiments.benchmarks forensics [--seeds 10] [--clean 50] [--only NAME] [--arch NAME] [--runs FOLDER] [--json]

Every plant of ``_planted.py`` disturbs a run at step 90 of 112, on two architectures (``--arch`` names others), watched with
every=1, and with every=10 and a recorder of 64 steps. Of the diagnoses that a run writes when it ends, the first one counts whose
onset lies within 16 steps from the plant on:

    cause        the word for the plant in the table of ``stabilitylab/spikes/suspects.py``
    site         the module of the plant, for causes with a place
    neighbour    its parent, its sibling, or its direct neighbour in the order of execution, counted apart

No diagnosis counts as wrong. In runs without a plant every diagnosis and every departure is false.

With ``--runs`` the run folders stay, and the benchmark explains existing ones anew without training them again: so an interrupted
benchmark resumes where it stopped, and judges a changed rule on the same runs in minutes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import binomtest

from experiments.benchmarks._planted import ARCHITECTURES, PARTS, PLANTED, PLANTS, Plant
from stabilitylab.runs import Run, load_run
from stabilitylab.spikes.diagnosis import Diagnosis
from stabilitylab.spikes.forensics import diagnose, explicable
from stabilitylab.telemetry import DEPARTURES

WITHIN = 16
WATCHING = {"every=1": {"every": 1, "recorder": 0}, "every=10, recorder": {"every": 10, "recorder": 64}}
ASKED = ("plain", "glm")


def told(run: Run) -> Diagnosis | None:
    """The first diagnosis from the planted step on."""
    found = [one for one in explicable(run.events) if PLANTED <= one.onset <= PLANTED + WITHIN]
    return diagnose(run, min(found, key=lambda one: one.onset)) if found else None


@contextmanager
def trained(runs: Path | None, name: str, arch: str, watching: str, seed: int) -> Iterator[Run]:
    """The run with that plant (or ``clean``): the kept one, or a new one, which ``runs`` keeps."""
    plant = PLANTS.get(name)
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        words = (arch, watching.replace("=", "-").replace(", ", "-"), name.replace(" ", "-"), str(seed))
        kept = None if runs is None else runs.joinpath(*words)
        if kept is not None and kept.is_dir():
            yield load_run(kept)
            return
        folder = Path(scratch) / "run" if kept is None else kept.with_name(f"{seed}.partial")
        shutil.rmtree(folder, ignore_errors=True)  # of an interrupted process
        run = ARCHITECTURES[arch](folder, plant, seed, **WATCHING[watching])
        if kept is not None:
            folder.rename(kept)
            run = load_run(kept)
        yield run


def module_of(site: str) -> str:
    """The module of a diagnosed site: without the head, ``:input``, and the parameter's own name."""
    path = site.partition(",")[0].removesuffix(":input")
    stem, _, last = path.rpartition(".")
    return stem if last in ("weight", "bias") else path


def near(run: Run, told_module: str, planted: str) -> bool:
    """Whether two modules are parent and child, siblings, or neighbours in the order of execution."""
    parent = planted.rpartition(".")[0]
    if told_module in (parent, planted) or (parent and told_module.rpartition(".")[0] == parent):
        return True
    order = [module_of(site.removeprefix("attention/")) for site in run.places.order]
    order = list(dict.fromkeys(order))
    return (
        told_module in order
        and planted in order
        and abs(order.index(told_module) - order.index(planted)) == 1
    )


def trial(name: str, arch: str, watching: str, seed: int, runs: Path | None = None) -> dict[str, Any]:
    """One run with a plant, and its diagnosis."""
    plant = PLANTS[name]
    row: dict[str, Any] = {"plant": name, "arch": arch, "watching": watching, "seed": seed}
    with trained(runs, name, arch, watching, seed) as run:
        one = told(run)
        if one is None:
            nothing = {"cause_right": False, "site_right": False if plant.site else None, "near": None}
            return {**row, "cause": None, "site": None, **nothing}
        row |= {"cause": one.cause, "site": one.site, "sentences": one.sentences}
        row["cause_right"] = one.cause in (plant.cause, *plant.causes)
        return row | _placed(run, plant, PARTS[arch], one.site)


def _placed(run: Run, plant: Plant, parts: Mapping[str, str], site: str | None) -> dict[str, bool | None]:
    if not plant.site:
        return {"site_right": None, "near": None}
    planted, found = parts[plant.site], module_of(site or "")
    # A tied table is the head too; attention's scores are those of the queries inside it.
    right = found == planted
    return {"site_right": right, "near": right or (bool(found) and near(run, found, planted))}


def clean(arch: str, watching: str, seed: int, runs: Path | None = None) -> int:
    """The number of diagnoses of a run without a plant."""
    with trained(runs, "clean", arch, watching, 500 + seed) as run:
        false = [one.kind for one in explicable(run.events)]
        false += [event.kind for event in run.events if event.kind in DEPARTURES]
        if false:
            print("told of a clean run:", arch, watching, seed, *false, flush=True)
        return bool(false)


def main(arguments: list[str]) -> int:
    """Run and print the table; ``--json`` prints every run's line as it ends."""
    parser = argparse.ArgumentParser(
        prog="forensics", description="planted causes against what is told of them"
    )
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument(
        "--clean", type=int, default=50, help="runs without a plant, over architectures and ways of watching"
    )
    parser.add_argument("--only", action="append", help="plants by name, or part of it")
    parser.add_argument("--arch", choices=sorted(ARCHITECTURES), action="append")
    parser.add_argument("--runs", type=Path, help="folder in which the runs are kept")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    names = [name for name in PLANTS if not asked.only or any(part in name for part in asked.only)]
    archs = asked.arch or list(ASKED)
    rows = []
    for seed in range(asked.seeds):
        for arch in archs:
            for watching in WATCHING:
                for name in names:
                    rows.append(trial(name, arch, watching, seed, asked.runs))
                    if asked.json:
                        print(json.dumps(rows[-1]), flush=True)
    settings = [(arch, watching) for arch in archs for watching in WATCHING]
    false = sum(clean(*settings[i % len(settings)], i, asked.runs) for i in range(asked.clean))
    _show(rows, names, false, asked.clean)
    return 0


def _show(rows: list[dict[str, Any]], names: list[str], false: int, clean_runs: int) -> None:
    table = Table(title="Planted causes: top-1 cause, site, site or neighbour", title_justify="left")
    for column in ("plant", "cause", "site", "or neighbour", "told instead"):
        table.add_column(column)
    for name in [*names, "all"]:
        of = [row for row in rows if name in (row["plant"], "all")]
        placed = [row for row in of if row["site_right"] is not None]
        wrong = Counter(str(row["cause"]) for row in of if not row["cause_right"])
        table.add_row(
            name,
            _share(sum(row["cause_right"] for row in of), len(of)),
            _share(sum(row["site_right"] for row in placed), len(placed)),
            _share(sum(bool(row["near"]) for row in placed), len(placed)),
            ", ".join(f"{cause} {count}" for cause, count in wrong.most_common()),
        )
    console = Console(width=140)
    console.print(table)
    for setting in sorted({(row["arch"], row["watching"]) for row in rows}):
        of = [row for row in rows if (row["arch"], row["watching"]) == setting]
        placed = [row for row in of if row["site_right"] is not None]
        console.print(
            f"{', '.join(setting)}: cause {_share(sum(r['cause_right'] for r in of), len(of))}, "
            f"site {_share(sum(r['site_right'] for r in placed), len(placed))}",
            highlight=False,
        )
    console.print(
        f"runs without a plant of which something was told: {false} of {clean_runs}", highlight=False
    )


def _share(count: int, of: int) -> str:
    if not of:
        return ""
    low, high = binomtest(count, of).proportion_ci()  # Clopper and Pearson's
    return f"{count / of:.2f} ({count}/{of}; {low:.2f} to {high:.2f})"
