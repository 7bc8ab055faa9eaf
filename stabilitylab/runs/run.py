"""A run read back: its configuration, its events and its telemetry, as pandas objects.

``Run`` reads nothing before the caller asks for it, and then only what is needed: a metric's rows lie together in the files, and it
skips row groups of other families and statistics. It keeps what it has read, so the next metric of the same family and statistic
costs nothing. Superseded history (``rewind`` in ``runs/folder.py``) never appears.

Non-finite values are values. In a reduction (the largest over heads), a NaN makes the result NaN.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stabilitylab.errors import InputError
from stabilitylab.runs.folder import RunFolder
from stabilitylab.runs.parts import SCHEMA, list_parts, read_rows, step_limits
from stabilitylab.runs.places import Places
from stabilitylab.telemetry import SCALAR, Event, Key

if TYPE_CHECKING:  # pandas takes longer to load than a short run's steps: only readers load it
    import pandas as pd

Index = int | Literal["max"] | None


def load_run(path: str | os.PathLike[str]) -> Run:
    """Open a run folder for reading.

    Raises:
        InputError: there is no run, or one of its files is damaged. Skips files that a killed run left half written, with a
            warning.
    """
    return Run(RunFolder.open(path))


class Run:
    """What a run folder holds, made by ``load_run``. It reads each attribute at first use.

    Attributes:
        kind: its source: a folder, or a log (``report.of_log``).
    """

    kind = "folder"

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._frames: dict[tuple[str, str], pd.DataFrame] = {}

    @property
    def path(self) -> Path:
        return self.folder.path

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.resolve().name

    @cached_property
    def config(self) -> dict[str, Any]:
        """``config.json``; empty where there is none."""
        return self._object(self.folder.config)

    @property
    def loss_unit(self) -> str:
        """Nats where the configuration has an objective over tokens, like ``glm train``'s; else empty, as a loss may be
        anything."""
        return "nats" if "objective" in self.config else ""

    @cached_property
    def places(self) -> Places:
        """The places of its sites in the model: from ``model_structure.json``, else from their paths."""
        return Places(self._object(self.folder.structure))

    def _object(self, file: Path) -> dict[str, Any]:
        """A JSON file's object; empty where there is no file."""
        if not file.is_file():
            return {}
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{file} is not JSON ({error}): repair it or move it away") from None
        if not isinstance(found, dict):
            raise InputError(f"{file} holds no JSON object: repair it or move it away")
        return found

    @cached_property
    def events(self) -> list[Event]:
        """The events whose history stands, in order of occurrence."""
        return self.folder.read_events()

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """Every recorded metric, one per row: family, site, statistic, and ``size``: 0 for a scalar, else the vector's.

        In the order of first appearance within a family and statistic, which is the model's own order of modules.
        """
        # A file's rows are sorted, so that a metric's lie together: keep one row per metric and index of a file.
        table = self._table(["family", "site", "statistic", "index"], reduce=_without_repeats)
        frame: pd.DataFrame = table.to_pandas()
        found: pd.DataFrame = (
            frame.groupby(["family", "site", "statistic"], observed=True, sort=False)["index"]
            .max()
            .add(1)
            .rename("size")
            .reset_index()
            .astype({"family": str, "site": str, "statistic": str})
        )
        return found

    @cached_property
    def telemetry(self) -> pd.DataFrame:
        """All standing rows: step, family, site, statistic, index, value; the words are categories."""
        frame: pd.DataFrame = self._table(SCHEMA.names).to_pandas()
        return frame

    def rows(self, family: str, statistic: str) -> pd.DataFrame:
        """Standing rows of one family and statistic: step, site (a category), index, value. Empty where none are.

        Where one number was recorded twice for a step, the later one counts.
        """
        if (family, statistic) not in self._frames:
            repeats = _Repeats()
            columns = ["step", "site", "index", "value"]
            table = self._table(columns, family=family, statistic=statistic, reduce=repeats.look)
            frame = table.to_pandas(split_blocks=True, self_destruct=True)
            if repeats.possible:
                frame = frame[~frame.duplicated(["step", "site", "index"], keep="last")]
            self._frames[family, statistic] = frame
        return self._frames[family, statistic]

    def near(self, family: str, statistic: str, first: int, last: int) -> pd.DataFrame:
        """``rows`` of steps from ``first`` to ``last``; reads no others, for a look at one place of a long run."""
        if (family, statistic) in self._frames:
            rows = self._frames[family, statistic]
            return rows[(rows["step"] >= first) & (rows["step"] <= last)]
        columns = ["step", "site", "index", "value"]
        table = self._table(columns, family=family, statistic=statistic, steps=(first, last))
        frame: pd.DataFrame = table.to_pandas()
        return frame[~frame.duplicated(["step", "site", "index"], keep="last")]

    def series(self, metric: str, index: Index = None) -> pd.Series[float]:
        """One metric over the steps: a series of values, indexed by step. Empty where it was not recorded.

        Args:
            metric: ``family/site/statistic``.
            index: for a metric with several values per step (one per head), which of them, or "max".
        """
        key = Key.parse(metric)
        rows = self.rows(key.family, key.statistic)
        rows = rows[rows["site"] == key.site]
        values = _choose(rows, index, metric)
        series = values.set_index("step")["value"].sort_index()
        return series.rename(metric)

    def vectors(self, metric: str) -> pd.DataFrame:
        """A metric with several values per step: one row per step, one column per index. NaN also where none was recorded."""
        key = Key.parse(metric)
        rows = self.rows(key.family, key.statistic)
        return (
            rows[rows["site"] == key.site].pivot(index="step", columns="index", values="value").sort_index()
        )

    def matrix(self, family: str, statistic: str, index: Index = None) -> pd.DataFrame:
        """A statistic at every site: one row per site in the model's order, one column per step.

        NaN also where nothing was recorded; ``recorded`` distinguishes the two.

        Args:
            family: for example "activation".
            statistic: for example "absmax".
            index: for statistics with several values per step, which of them, or "max".
        """
        rows = _choose(self.rows(family, statistic), index, f"{family}/*/{statistic}")
        return _spread(rows, rows["value"].to_numpy(dtype=np.float64), np.nan)

    def recorded(self, family: str, statistic: str) -> pd.DataFrame:
        """Where ``matrix`` has a recorded value, even NaN: booleans, rows and columns as in ``matrix``."""
        rows = self.rows(family, statistic)
        return _spread(rows, np.ones(len(rows), dtype=bool), False)

    def _table(
        self,
        columns: list[str],
        family: str | None = None,
        statistic: str | None = None,
        steps: tuple[int, int] | None = None,
        reduce: Callable[[pa.Table], pa.Table] = lambda table: table,
    ) -> pa.Table:
        """Standing rows of all files, oldest first, sites in order of first appearance, after applying ``reduce`` to each
        file's."""
        for attempt in range(5):
            try:
                parts = list_parts(self.folder.telemetry)
                limits = step_limits(parts)
                tables = [
                    reduce(
                        read_rows(
                            part,
                            columns,
                            family=family,
                            statistic=statistic,
                            below=limits[part.segment],
                            steps=steps,
                        )
                    )
                    for part in parts
                    if part.rows
                ]
                break
            except FileNotFoundError:  # the run still writes, and merged a file since the listing
                if attempt == 4:
                    raise
        schema = pa.schema([SCHEMA.field(name) for name in columns])
        return pa.concat_tables([schema.empty_table(), *tables]).unify_dictionaries()


class _Repeats:
    """Cheap signs that a number is recorded twice for a step; searching for repeats costs more than reading the rest."""

    def __init__(self) -> None:
        self._spans: list[tuple[int, int]] = []
        self._inside = False

    def look(self, table: pa.Table) -> pa.Table:
        """Check a file's rows of one statistic, which are sorted by site, index and step."""
        if len(table):
            steps = table["step"].to_numpy()
            self._spans.append((int(steps.min()), int(steps.max())))
            same = np.flatnonzero(steps[1:] == steps[:-1])
            if len(same):  # neighbours of one step are other sites or indices
                near = table.take(pa.array(np.unique(np.concatenate([same, same + 1]))))
                self._inside |= bool(near.to_pandas().duplicated(["step", "site", "index"]).any())
        return table

    @property
    def possible(self) -> bool:
        """Whether a file holds a number twice, or two files hold the same steps."""
        spans = sorted(self._spans)
        return self._inside or any(b[0] <= a[1] for a, b in itertools.pairwise(spans))


def _without_repeats(table: pa.Table) -> pa.Table:
    """The rows without those that repeat the one before them."""
    if not len(table):
        return table
    table = table.unify_dictionaries().combine_chunks()
    changes = np.zeros(len(table), dtype=bool)
    changes[0] = True
    for column in table.columns:
        chunk = column.chunk(0)
        codes = (chunk.indices if pa.types.is_dictionary(chunk.type) else chunk).to_numpy()
        changes[1:] |= codes[1:] != codes[:-1]
    return table.take(pa.array(np.flatnonzero(changes)))


def _spread(rows: pd.DataFrame, values: NDArray[Any], empty: float | bool) -> pd.DataFrame:
    """Values by site, in order of first appearance, and step; ``empty`` where there is no row."""
    import pandas as pd

    codes = rows["site"].cat.codes.to_numpy()
    present, first, place = np.unique(codes, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")
    rank = np.empty(len(order), dtype=np.intp)
    rank[order] = np.arange(len(order))
    steps, at = np.unique(rows["step"].to_numpy(), return_inverse=True)
    spread = np.full((len(present), len(steps)), empty, dtype=values.dtype)
    spread[rank[place], at] = values
    sites = rows["site"].cat.categories.to_numpy()[present[order]].astype(object)
    return pd.DataFrame(
        spread, index=pd.Index(sites, name="site", dtype=object), columns=pd.Index(steps, name="step")
    )


def _choose(rows: pd.DataFrame, index: Index, name: str) -> pd.DataFrame:
    """Reduce rows to one value per site and step."""
    if len(rows) and index in ("max", None) and (rows["index"] == SCALAR).all():
        return rows
    if index == "max":
        # np.maximum keeps a NaN, which pandas' own maximum would drop.
        rows = rows.sort_values(["site", "step"], kind="stable")
        site, step = rows["site"].cat.codes.to_numpy(), rows["step"].to_numpy()
        if not len(rows):
            return rows
        starts = np.flatnonzero(np.r_[True, (site[1:] != site[:-1]) | (step[1:] != step[:-1])])
        largest = np.maximum.reduceat(rows["value"].to_numpy(), starts)
        return rows.iloc[starts].assign(value=largest, index=SCALAR)
    if index is not None:
        return rows[rows["index"] == index]
    scalars = rows[rows["index"] == SCALAR]
    if len(rows) and not len(scalars):
        raise InputError(f'{name} has several values a step: give index="max", a number, or use vectors()')
    return scalars
