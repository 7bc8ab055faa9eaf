"""``python -m experiments judge TABLE.csv``: judges anybody's runs, one per row, as this project's own.

    group,seed,val_loss          python -m experiments judge runs.csv --arm muon --baseline adamw
    adamw,0,3.2812
    adamw,1,3.2790               supported: muon is better (lower val_loss) than adamw
    muon,0,3.2776                ...

An empty cell, ``nan``, ``inf`` or ``-inf`` is a run that died: worse than any number. The command compares groups as groups, or
seed by seed with ``--paired``. ``--sequential`` says that you looked after every run and would have stopped; the guarantee then
holds for that.
"""

from __future__ import annotations

import csv
import json as json_text
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import tyro

from experiments.statistics.decision import ClaimDecision, decide
from experiments.verdicts import plain, words
from stabilitylab.errors import InputError

TablePath = Annotated[Path, tyro.conf.Positional]


def judge(
    table: TablePath,
    *,
    arm: str,
    baseline: str,
    group: str = "group",
    value: str | None = None,
    seed: str = "seed",
    paired: bool = False,
    better: Literal["lower", "higher"] = "lower",
    scale: Literal["linear", "log", "rank"] = "linear",
    margin: float | None = None,
    sequential: bool = False,
    json: bool = False,
) -> int:
    """Judge whether one group's runs are better than another's.

    Args:
        table: CSV with a header, one row a run.
        arm: the group that you claim to be better.
        baseline: the group to compare it with.
        group: column that names a run's group.
        value: column to judge; by default val_loss, or the only other column of numbers.
        seed: column that pairs runs.
        paired: compare seed by seed.
        better: which end of the value is the better one.
        scale: log: compare ratios; rank: compare the order only.
        margin: smallest effect of interest: groups shown to lie within it are equivalent. With --scale log it is relative.
        sequential: you added runs while looking at the verdict.
        json: print one JSON object.
    """
    if arm == baseline:
        raise InputError(f"--arm and --baseline are both {arm!r}: name two groups")
    rows = _rows(table)
    columns = list(rows[0])
    column = value or _value_column(rows, columns, {group, seed})
    for name, flag in ((group, "group"), (column, "value"), *(((seed, "seed"),) if paired else ())):
        if name not in columns:
            raise InputError(
                f"{table} has no column {name!r}: name one of {', '.join(columns)} with --{flag}"
            )
    worst = math.inf if better == "lower" else -math.inf
    sides = [_group(table, rows, group, name, column, worst) for name in (arm, baseline)]
    values = [[number for number, _ in side] for side in sides]
    if paired:
        values = _by_shared_seeds([_by_seed(table, side, seed) for side in sides], (arm, baseline), seed)
    left_out = sum(map(len, sides)) - sum(map(len, values))
    decision = decide(
        *values,
        paired=paired,
        direction="less" if better == "lower" else "more",
        scale=scale,
        margin=margin,
        sequential=sequential,
    )
    died = [sum(math.isinf(x) for x in side) for side in values]
    if json:
        body = plain(decision) | {
            "arm": {"name": arm, "runs": len(values[0]), "died": died[0]},
            "baseline": {"name": baseline, "runs": len(values[1]), "died": died[1]},
            "unpaired_left_out": left_out,
        }
        print(_dumps(body))
        return 0
    print(_sentence(decision, arm, baseline, column, better))
    unit = "ln ratio" if scale == "log" else column
    print(
        f"effect: {decision.effect:+.4g} [{decision.low:+.4g}, {decision.high:+.4g}] ({unit}, 95 % interval)"
    )
    print(f"evidence: e = {decision.e_value:.3g} (20 decides while looking), by {decision.law}")
    print(f"runs: {arm} {len(values[0])} ({died[0]} died), {baseline} {len(values[1])} ({died[1]} died)")
    if left_out:
        print(f"{left_out} runs without a partner of the same {seed} are left out")
    return 0


def _dumps(body: Mapping[str, object]) -> str:
    return json_text.dumps(body, allow_nan=False)


def _sentence(decision: ClaimDecision, arm: str, baseline: str, column: str, better: str) -> str:
    said = words(decision)
    if decision.verdict == "supported":
        return f"{said}: {arm} is better ({better} {column}) than {baseline}"
    if decision.verdict == "against":
        return f"{said}: {arm} is worse than {baseline}; better would be {better} {column}"
    if decision.verdict == "equivalent":
        return f"{said}: {arm} and {baseline} differ by less than what matters"
    return f"{said}: {arm} and {baseline} cannot be distinguished"


def _rows(table: Path) -> list[dict[str, str]]:
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            rows = []
            for cells in reader:
                if not any(cell.strip() for cell in cells):
                    continue
                if len(cells) != len(header):
                    raise InputError(
                        f"{table}, line {reader.line_num} has {len(cells)} cells where the header has {len(header)}: "
                        "fix the line"
                    )
                rows.append(dict(zip(header, (cell.strip() for cell in cells), strict=True)))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not CSV text"
        raise InputError(f"{table} cannot be read ({reason}): give a CSV file, one row a run") from None
    if len(set(header)) != len(header):
        raise InputError(f"{table} has a column twice: {', '.join(header)}")
    if not rows:
        raise InputError(f"{table} has no runs: give a CSV file with a header and one row a run")
    return rows


def _number(text: str, worst: float) -> float | None:
    if not text:
        return worst
    try:
        # Python alone reads 1_000 as a number.
        number = float(text) if "_" not in text else None
    except ValueError:
        return None
    # A number beyond float64 (1e400) counts as dead too, whatever its sign.
    return worst if number is not None and not math.isfinite(number) else number


def _value_column(rows: list[dict[str, str]], columns: list[str], taken: set[str]) -> str:
    if "val_loss" in columns:
        return "val_loss"
    numbers = [
        name
        for name in columns
        if name not in taken and all(_number(row[name], 0.0) is not None for row in rows)
    ]
    if len(numbers) != 1:
        raise InputError(
            f"which column is judged? Name it with --value: {', '.join(numbers or columns)}"
            if numbers
            else f"no column holds numbers only, beside {', '.join(sorted(taken))}: name one with --value"
        )
    return numbers[0]


def _group(
    table: Path, rows: list[dict[str, str]], group: str, name: str, column: str, worst: float
) -> list[tuple[float, dict[str, str]]]:
    found = []
    for line, row in enumerate(rows, start=2):
        if row[group] != name:
            continue
        number = _number(row[column], worst)
        if number is None:
            raise InputError(f"{table}, run {line - 1}: {column} is {row[column]!r}, which is not a number")
        found.append((number, row))
    if not found:
        names = list(dict.fromkeys(row[group] for row in rows))
        listed = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
        raise InputError(f"{table} has no run of {group} {name!r}: choose among {listed}")
    return found


def _by_shared_seeds(keyed: list[dict[str, float]], names: tuple[str, str], seed: str) -> list[list[float]]:
    """Both sides' values of the seeds that they share, in the arm's order."""
    shared = [one for one in keyed[0] if one in keyed[1]]
    if not shared:
        raise InputError(f"{names[0]} and {names[1]} share no {seed}: judge them as groups, without --paired")
    return [[side[one] for one in shared] for side in keyed]


def _by_seed(table: Path, side: list[tuple[float, dict[str, str]]], seed: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for number, row in side:
        if row[seed] in found:
            raise InputError(
                f"{table}: {seed} {row[seed]} occurs twice in a group, so its runs cannot be paired"
            )
        found[row[seed]] = number
    return found
