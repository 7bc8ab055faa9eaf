"""Layers measured so far, in a file that an interrupted plan is taken up from.

    {"mark": ...}                        what was measured: model, text, schemes; another mark begins anew
    {"path": ..., "schemes": {...}}      a layer, a line each, written when it is done

The last line may be cut off, where a machine went down; it is measured again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from stabilitylab.models import TextModel, Window
from stabilitylab.quantization.estimate import Estimated, EstimatedLayer
from stabilitylab.quantization.ranges import ChannelRange
from stabilitylab.quantization.schemes import LinearScheme
from stabilitylab.quantization.texts import mark_of_windows


class LayersSoFar:
    """Reads what is there and adds to it.

    Args:
        file: made when a layer is added.
        mark: of what is measured (``mark_of``).
    """

    def __init__(self, file: Path, mark: str) -> None:
        self._file, self._mark = file, mark
        self.known = self._read()

    def add(self, layer: EstimatedLayer) -> None:
        """Write a layer down."""
        fresh = not self.known and not self._same_mark()
        with self._file.open("w" if fresh else "a", encoding="utf-8") as out:
            if fresh:
                out.write(json.dumps({"mark": self._mark}) + "\n")
            out.write(json.dumps(dataclasses.asdict(layer)) + "\n")

    def finish(self) -> None:
        """The plan is written: the file has done its service."""
        self._file.unlink(missing_ok=True)

    def _lines(self) -> list[str]:
        try:
            return self._file.read_text(encoding="utf-8", errors="replace").split("\n")
        except OSError:
            return []

    def _same_mark(self) -> bool:
        lines = self._lines()
        return bool(lines) and lines[0] == json.dumps({"mark": self._mark})

    def _read(self) -> list[EstimatedLayer]:
        if not self._same_mark():
            return []
        found = {}
        whole = self._lines()[1:]
        for line in whole:
            try:
                data = json.loads(line)
                found[data["path"]] = EstimatedLayer(
                    path=data["path"],
                    shape=(data["shape"][0], data["shape"][1]),
                    range=ChannelRange(**data["range"]),
                    schemes={name: Estimated(**sums) for name, sums in data["schemes"].items()},
                )
            except (ValueError, KeyError, TypeError):
                continue
        if whole and whole[-1]:
            # What is added next must not continue a line that was cut off.
            with self._file.open("a", encoding="utf-8") as out:
                out.write("\n")
        return list(found.values())


def mark_of(model: TextModel, windows: Sequence[Window], schemes: Sequence[LinearScheme], draws: int) -> str:
    """16 hexadecimal digits of what sensitivities depend on: the model, the text as it reads it, the schemes, the draws."""
    return mark_of_windows(windows, f"{model.fingerprint} {draws} {[scheme.name for scheme in schemes]}")
