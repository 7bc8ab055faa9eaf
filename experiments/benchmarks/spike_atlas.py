"""Makes spikes by recipe, proves their causes by forks, keeps them with the telemetry around them, and scores who names the cause.

    python -m experiments.benchmarks spike_atlas --spikes 500 --out atlas [--minutes 60] [--only FAMILY] [--score] [--json]
    python -m experiments.benchmarks spike_atlas --forensics seen|held-out [--seed 100] --spikes 60 --out FOLDER

The benchmark runs recipes of ``_atlas_recipes.py`` with one seed after another, always one of the kind with the fewest spikes,
until there are ``--spikes`` of them or the minutes are over; it keeps finished ones, so the same command resumes. For each spike it
writes

    atlas/spikes.jsonl           recipe, seed, plant, diagnosis, every fork's verdict
    atlas/telemetry/N.parquet    what every layer did around it: tidy
    atlas/spikes.parquet, telemetry.parquet, CARD.md    at the end: all of it in two files, and how it was made

``pandas.read_parquet("atlas/telemetry.parquet")`` is all of the telemetry.

The second trains no forks: forensics alone against what was planted, on seeds of their own, in a quarter of the time.

The scores: of detector, forensics and forks (``stabilitylab.attribution``) against the planted cause, and of forensics against the
proven one, by cause and by recipe, in the tuning half and in the held-out half of the recipes; the detector's kind against the one
that the twin shows; and the cost of recovered spikes over their twins at equal steps.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import binom, binomtest

from experiments.benchmarks._atlas_recipes import Recipe, recipes
from experiments.benchmarks._atlas_spike import spike

Row = dict[str, Any]


def main(argv: Sequence[str]) -> int:
    """Make the missing spikes, write the files, print the scores."""
    parser = argparse.ArgumentParser(prog="experiments.benchmarks spike_atlas")
    parser.add_argument("--spikes", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("atlas"))
    parser.add_argument("--minutes", type=float, help="stop after this many")
    parser.add_argument("--only", help="recipes whose name holds this")
    parser.add_argument("--score", action="store_true", help="make none: judge those that are there")
    parser.add_argument("--forensics", choices=("seen", "held-out"), help="of that half; no forks")
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(list(argv))
    torch.set_num_threads(1)
    file = asked.out / "spikes.jsonl"
    rows = read(file)
    if not asked.score:
        until = float("inf") if asked.minutes is None else time.monotonic() + 60 * asked.minutes
        chosen = [(n, r) for n, r in enumerate(recipes()) if not asked.only or asked.only in r.name]
        if asked.forensics:
            chosen = [(n, r) for n, r in chosen if r.held_out == (asked.forensics == "held-out")]
        make(rows, chosen, asked.out, asked.spikes, until, first=asked.seed, forks=not asked.forensics)
    write(rows, asked.out)
    scores = {half: score(of) for half, of in halves(rows).items() if of}
    costs = harm(rows)
    if asked.json:
        print(json.dumps({**scores, "harm": costs}))
    else:
        show(rows, scores)
        for name, of in costs.items():
            Console(width=140).print(f"harm, {name}: {of}", highlight=False)
    return 0


def read(file: Path) -> list[Row]:
    """The existing rows; the benchmark makes a line again that a kill cut short."""
    rows = []
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows


def make(
    rows: list[Row],
    chosen: list[tuple[int, Recipe]],
    out: Path,
    count: int,
    until: float,
    *,
    first: int = 0,
    forks: bool = True,
) -> None:
    """Run recipes until there are ``count`` spikes: always one of the family with the fewest, and of those the least tried."""
    out.mkdir(parents=True, exist_ok=True)
    tries, made = Counter(row["recipe"] for row in rows), Counter[str]()
    families = Counter[str]()
    for row in rows:
        made[row["recipe"]] += row["onset"] is not None
        families[row["family"]] += row["onset"] is not None
    while made.total() < count and time.monotonic() < until:
        # Drop a recipe that made nothing twice.
        left = [(n, r) for n, r in chosen if made[r.name] or tries[r.name] < 2]
        if not left:
            return
        number, recipe = min(left, key=lambda one: (families[one[1].family], tries[one[1].name], one[0]))
        seed = first + tries[recipe.name]
        kept = out / "telemetry" / f"{number:03d}-{seed:03d}.parquet"
        row = spike(recipe, number, seed, kept, forks=forks)
        row["number"] = f"{number:03d}-{seed:03d}"
        rows.append(row)
        tries[recipe.name] += 1
        made[recipe.name] += row["onset"] is not None
        families[recipe.family] += row["onset"] is not None
        with (out / "spikes.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def halves(rows: list[Row]) -> dict[str, list[Row]]:
    """Spikes by whether their recipe is held out."""
    found = [row for row in rows if row["onset"] is not None]
    return {
        "seen": [row for row in found if not row["held_out"]],
        "held out": [row for row in found if row["held_out"]],
    }


def score(rows: list[Row]) -> dict[str, Any]:
    """Counts of right ones, as (right, of)."""
    planted = [row for row in rows if row["planted"] is not None]
    placed = [row for row in planted if row["truth_site"]]
    told = [row for row in planted if not row["missed"]]
    # Leave out those between spike and divergence.
    known = [row for row in planted if row["true_kind"]]

    def share(of: list[Row], right: Callable[[Row], bool]) -> tuple[int, int]:
        return sum(right(row) for row in of), len(of)

    def forked(of: list[Row]) -> list[Row]:
        return [row for row in of if row["attribute"] is not None]

    by_cause = {}
    for cause in sorted({row["truth"] for row in planted}):
        of = [row for row in planted if row["truth"] == cause]
        by_cause[cause] = {
            "attribute": share(forked(of), lambda r: r["attribute"] in r["truths"]),
            "forensics": share(of, lambda r: r["forensics"] in r["truths"]),
            "forensics with forks": share(forked(of), lambda r: r["forensics"] == r["attribute"]),
        }
    by_family = {
        family: share(
            [row for row in forked(planted) if row["family"] == family],
            lambda r: r["attribute"] in r["truths"],
        )
        for family in sorted({row["family"] for row in rows})
    }
    emergent = {}
    for family in sorted({row["family"] for row in rows if row["planted"] is None}):
        of = [row for row in rows if row["family"] == family]
        emergent[family] = {
            "spikes": len(of),
            "attribute": Counter(row["attribute"] for row in of),
            "forensics": Counter(row["forensics"] for row in of),
            "forensics with forks": share(forked(of), lambda r: r["forensics"] == r["attribute"]),
        }
    return {
        "spikes": len(rows),
        "attribute, cause": share(forked(planted), lambda r: r["attribute"] in r["truths"]),
        "attribute, site": share(forked(placed), lambda r: r["attribute_site"] == r["truth_site"]),
        "forensics, cause": share(planted, lambda r: r["forensics"] in r["truths"]),
        "forensics, site": share(placed, lambda r: r["forensics_site"] == r["truth_site"]),
        "forensics with forks, cause": share(forked(rows), lambda r: r["forensics"] == r["attribute"]),
        "control bit-identical": share(forked(rows), lambda r: bool(r["repeats"])),
        "attribute, cause, of those told by the detector": share(
            forked(told), lambda r: r["attribute"] in r["truths"]
        ),
        "detector, found": share(planted, lambda r: not r["missed"]),
        "detector, onset within 2 steps": share(told, lambda r: 0 <= r["onset"] - r["planted"] <= 2),
        "detector, kind": share(known, lambda r: r["kind"] == r["true_kind"]),
        "by cause": by_cause,
        "by family": by_family,
        "kinds": Counter(f"{row['true_kind']} told as {row['kind'] or 'nothing'}" for row in known),
        "emergent": emergent,
    }


def harm(rows: list[Row]) -> dict[str, dict[str, Any]]:
    """The cost of recovered spikes over their twins: median with the sign test's 95 % interval, and the share that is worse."""
    found: dict[str, dict[str, Any]] = {}
    for kind in ("hard-batch", "spike"):
        chosen = [row["harm"] for row in rows if row.get("harm") and row.get("true_kind") == kind]
        for name in sorted({name for row in chosen for name in row}):
            values = np.sort([row[name] for row in chosen if name in row and math.isfinite(row[name])])
            n = len(values)
            if n < 6:
                continue
            # Order statistics k and n - 1 - k hold the median with 1 - 2 P(binomial(n, 1/2) <= k - 1).
            k = int(binom.ppf(0.025, n, 0.5))
            found[f"{kind}, {name}"] = {
                "n": n,
                "median": float(np.median(values)),
                "interval": [float(values[k - 1]), float(values[n - k])] if k else [math.nan, math.nan],
                "worse": [int((values > 0).sum()), n],
            }
    return found


def write(rows: list[Row], out: Path) -> None:
    """The two Parquet files and the card."""
    found = [row for row in rows if row["onset"] is not None]
    if not found:
        return
    frame = pd.DataFrame(found)
    for column in {"truths", "forks", "harm", "losses"} & set(frame.columns):
        frame[column] = frame[column].map(json.dumps)
    frame.to_parquet(out / "spikes.parquet", index=False)
    parts = [
        pd.read_parquet(out / "telemetry" / f"{row['number']}.parquet").assign(spike=row["number"])
        for row in found
        if (out / "telemetry" / f"{row['number']}.parquet").is_file()
    ]
    if parts:
        pd.concat(parts, ignore_index=True).to_parquet(
            out / "telemetry.parquet", index=False, compression="zstd"
        )
    (out / "CARD.md").write_text(card(found), encoding="utf-8")


def card(rows: list[Row]) -> str:
    """How each was made."""
    lines = [
        "# Spikes with proven causes",
        "",
        f"{len(rows)} spikes of a pre-norm GPT (3 blocks of 32, 8 rows of 32 tokens of a sparse Markov chain of 64, AdamW at 3e-3,",
        "clip 1), each in a run of its own, healthy but for what its recipe does to it. `spikes.parquet`: one row a spike;",
        "`telemetry.parquet`: step, family, site, statistic, index, value, spike; up to 24 steps before the onset and 16 after.",
        "Read it with `pandas.read_parquet('telemetry.parquet')`.",
        "",
        "| column | meaning |",
        "| --- | --- |",
        "| recipe, family, seed, planted | what was done, at which update; planted is empty for settings of the whole run |",
        "| truth, truths, truth_site | the planted cause, further ones as right, the module |",
        "| held_out | half of the recipes, by the CRC-32 of their names |",
        "| true_kind | hard-batch, spike, divergence, non-finite, by what the loss has over that of the same run without a plant |",
        "| onset, kind, height, told_at | what the detector told of the loss alone; height is over the twin's |",
        "| missed | the detector told nothing; the onset is where half of .4 nats were passed |",
        "| harm | loss, NVFP4's loss and outliers over the twin's, 10 and 40 steps after, of what is over and was recovered from |",
        "| losses | of every step |",
        "| forensics, forensics_site | what the telemetry suggested |",
        "| attribute, attribute_site, sentence | what forks proved |",
        "| repeats | whether the control fork was the run to the last bit |",
        "| forks | each fork: without, verdict, height and area over the control's |",
        "",
        "| recipe | cause | spikes |",
        "| --- | --- | --- |",
    ]
    count = Counter((row["recipe"], row["truth"]) for row in rows)
    lines += [f"| {recipe} | {cause} | {n} |" for (recipe, cause), n in sorted(count.items())]
    return "\n".join(lines) + "\n"


def show(rows: list[Row], scores: dict[str, dict[str, Any]]) -> None:
    """Three tables."""
    console = Console(width=140)
    barren = {row["recipe"] for row in rows} - {row["recipe"] for row in rows if row["onset"] is not None}
    made = sum(row["onset"] is not None for row in rows)
    console.print(
        f"{made} spikes of {len({r['recipe'] for r in rows}) - len(barren)} recipes; without any: {len(barren)}"
    )
    table = Table("", *scores, title="Right, of all", title_justify="left")
    for name in [key for key, value in next(iter(scores.values())).items() if isinstance(value, tuple)]:
        table.add_row(name, *(_share(of[name]) for of in scores.values()))
    console.print(table)
    causes = Table(
        "cause",
        "half",
        "attribute",
        "forensics",
        "forensics with forks",
        title="By planted cause",
        title_justify="left",
    )
    for half, of in scores.items():
        for cause, right in of["by cause"].items():
            causes.add_row(cause, half, *(_share(value) for value in right.values()))
    console.print(causes)
    for half, of in scores.items():
        console.print(f"{half}: {dict(of['kinds'])}; by kind of recipe {of['by family']}", highlight=False)
    emergent = Table(
        "recipe",
        "half",
        "spikes",
        "forks",
        "forensics",
        "agree",
        title="Settings no run bears",
        title_justify="left",
    )
    for half, of in scores.items():
        for family, what in of["emergent"].items():
            told = [
                ", ".join(f"{cause} {n}" for cause, n in what[who].most_common())
                for who in ("attribute", "forensics")
            ]
            emergent.add_row(family, half, str(what["spikes"]), *told, _share(what["forensics with forks"]))
    console.print(emergent)


def _share(right_of: tuple[int, int]) -> str:
    right, of = right_of
    if not of:
        return ""
    low, high = binomtest(right, of).proportion_ci()
    return f"{right / of:.2f} ({right}/{of}; {low:.2f} to {high:.2f})"
