"""Keeps trained forks, one JSON line each, so that an interrupted attribution resumes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from stabilitylab.attribution.ablation import Without
from stabilitylab.attribution.fork_verdicts import ForkVerdict
from stabilitylab.attribution.forks import Fork


class KeptForks:
    """Forks by key, and the file that holds them.

    Args:
        file: None: keep them in memory alone.
        about: names what they are forks of; a file about another event starts afresh.
    """

    def __init__(self, file: Path | None, about: str) -> None:
        self._file, self._forks = file, dict[str, Fork]()
        if file is None:
            return
        lines = _lines(file)
        if lines and lines[0].get("about") == about:
            for line in lines[1:]:
                fork = _fork(line)
                self._forks[fork.without.key] = fork
            # A kill cuts a line short: the next fork needs a new line.
            whole = "".join(json.dumps(line) + "\n" for line in lines)
            if file.read_text(encoding="utf-8") != whole:
                file.write_text(whole, encoding="utf-8")
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"about": about}) + "\n", encoding="utf-8")

    def get(self, without: Without) -> Fork | None:
        """The fork without that, if trained."""
        return self._forks.get(without.key)

    def add(self, fork: Fork) -> None:
        """Keep a fork."""
        self._forks[fork.without.key] = fork
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(_line(fork)) + "\n")

    def __len__(self) -> int:
        return len(self._forks)


def _line(fork: Fork) -> dict[str, Any]:
    of = fork.verdict
    return {
        "without": fork.without.to_json(),
        "values": [repr(value) for value in fork.values],
        "verdict": [of.word, repr(of.height), repr(of.area)],
        "seconds": fork.seconds,
        "error": fork.error,
    }


def _fork(line: dict[str, Any]) -> Fork:
    word, height, area = line["verdict"]
    return Fork(
        without=Without.from_json(line["without"]),
        values=tuple(map(float, line["values"])),
        verdict=ForkVerdict(word=word, height=float(height), area=float(area)),
        seconds=line["seconds"],
        error=line["error"],
    )


def _lines(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    found = []
    for text in file.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError:  # the last line of a killed process
            break
    return found


def about(begin: int, onset: int, control: tuple[float, ...], names: tuple[str, ...]) -> str:
    """Distinguishes one event's forks from another's: by where they begin, and by the control to the last bit."""
    said = [repr(value) if math.isfinite(value) else str(value) for value in control]
    return json.dumps([begin, onset, said, sorted(names)[:4], len(names)])
