"""Reads Aim's repositories with Aim's own package (3.29; only it opens the RocksDB data).

    repo/.aim/meta/chunks/RUN     contexts, and of each metric its name and the version of its steps
    repo/.aim/seqs/chunks/RUN     the values; version 1: the index is the step; version 2: steps stand beside them

The reader asks each run's own database. Aim itself asks an index, which lacks a run just closed until Aim's page or ``aim storage
reindex`` adds it. The reader leaves out Aim's measurements of the machine (``__system__...``).
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stabilitylab.errors import InputError
from stabilitylab.logs.pattern import LineValues
from stabilitylab.logs.reading import Reading, Row


def aim_repository(path: Path) -> Path | None:
    """The folder that holds ``.aim``; None: no Aim repository."""
    if path.name == ".aim" and (path / "meta").is_dir():
        return path.parent
    return path if (path / ".aim" / "meta").is_dir() else None


def read_aim(folder: Path) -> Reading:
    """Every run of a repository, each as a part.

    Raises:
        InputError: Aim is not installed, or cannot open the repository.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            from aim import Repo  # type: ignore[import-not-found, unused-ignore]
    except Exception as error:
        raise InputError(
            f"{folder} is an Aim repository, which only Aim's package reads ({type(error).__name__}: {error}): "
            "pip install aim, or export the metrics as CSV from Aim's explorer"
        ) from None
    logging.getLogger("aim").setLevel(logging.ERROR)

    def rows() -> Iterator[Row]:
        try:
            repository = Repo.from_path(str(folder))
            runs = sorted(repository.list_all_runs())
            held = {run: _rows(repository, run) for run in runs}
        except Exception as error:
            raise InputError(
                f"{folder} is an Aim repository that Aim does not open ({type(error).__name__}: {str(error)[:80]}): "
                "export the metrics as CSV from Aim's explorer"
            ) from None
        for run, by_step in held.items():
            for step in sorted(by_step):
                yield (run if len(runs) > 1 else ""), by_step[step]

    return Reading(format="Aim", rows=rows, step="step")


def _rows(repository: Any, run: str) -> dict[float, LineValues]:
    """Step -> values of one run."""
    meta = repository.request_tree("meta", run, read_only=True).subtree("meta")
    series = repository.request_tree("seqs", run, read_only=True).subtree("seqs")
    rows: dict[float, LineValues] = {}
    for context, named in meta.subtree(("chunks", run, "traces")).collect().items():
        subset = meta["contexts", context].get("subset")
        for name, told in named.items():
            if name.startswith("__") or told.get("dtype") not in ("float", "float64", "int", None):
                continue
            version = told.get("version", 1)
            where = ("chunks", run) if version == 1 else (f"v{version}", "chunks", run)
            tree = series.subtree((*where, context, name))
            values = tree.array("val")
            pairs = (
                values.items()
                if version == 1
                else zip(tree.array("step").values(), values.values(), strict=False)
            )
            for step, value in pairs:
                row = rows.setdefault(float(step), {"step": float(step)})
                row[f"{subset}/{name}" if subset else name] = float(value)
    return rows
