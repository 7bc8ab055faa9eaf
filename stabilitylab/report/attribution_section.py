"""What forks proved about a run's events: sentence, verdict table and the control's numbers, from its events ``attribution``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stabilitylab.attribution.fork_verdicts import EVENT
from stabilitylab.errors import InputError
from stabilitylab.report.page import Page, Section, Table
from stabilitylab.runs.run import Run

_ORDER = {"prevents": 0, "halves": 1}
_NOTE = (
    "Prevents: height and area are at most a quarter of the control's, or the height is within its noise; halves: at most a half. "
    "A fork that brings the event ends there, so its shares are of what it had shown by then."
)


def attribution_section(run: Run) -> Section | None:
    """The newest proof of each event; None where none was asked for."""
    newest: dict[tuple[int, str], Mapping[str, Any]] = {}
    for event in run.events:
        if event.kind == EVENT:
            newest[event.step, str(event.data["episode"]["kind"])] = event.data
    if not newest:
        return None
    proofs = [newest[key] for key in sorted(newest)]
    return Section(
        title="What forks prove",
        text=tuple(text for proof in proofs for text in _said(proof)),
        parts=[_table(proof) for proof in proofs],
    )


def attribution_page(run: Run, out: Path) -> Path:
    """The section alone, as a page. Raises InputError where nothing was proven."""
    section = attribution_section(run)
    if section is None:
        raise InputError(f"{run.path} holds no attribution: run `glm attribute {run.path} --event N`")
    return Page(
        title=f"What forks prove about {run.name}",
        lead="",
        facts={"folder": str(run.path)},
        sections=[section],
    ).write(out)


def _said(proof: Mapping[str, Any]) -> Sequence[str]:
    same = {
        True: "repeats the run to the last bit",
        False: f"departs from the run at step {proof['departs']}"
        + (f" (forks have {proof['otherwise']})" if proof.get("otherwise") else ""),
    }
    control = same.get(proof["repeats"], "repeats itself")
    lines = [
        str(proof["sentence"]),
        f"The control, from step {proof['begin']} to {proof['end']}, {control}: it rises by {_number(proof['height'])} over "
        f"{_number(proof['base'])}, where the noise is {_number(proof['noise'])}.",
    ]
    if proof["untried"]:
        lines.append(f"The budget ended before {len(proof['untried'])} more forks.")
    return lines


def _table(proof: Mapping[str, Any]) -> Table:
    forks = sorted(proof["forks"], key=lambda fork: _ORDER.get(fork["verdict"], 2))
    rows = [
        (str(fork["words"]), str(fork["verdict"]), _number(fork["height"]), _number(fork["area"]))
        for fork in forks
    ]
    episode = proof["episode"]
    columns = (
        f"{episode['kind']} at step {episode['onset']}: without",
        "verdict",
        "height / control's",
        "area / control's",
    )
    return Table(columns=columns, rows=rows, note=_NOTE)


def _number(value: Any) -> str:
    return (
        f"{value:.3g}" if isinstance(value, (int, float)) else "–" if value in (None, "nan") else str(value)
    )
