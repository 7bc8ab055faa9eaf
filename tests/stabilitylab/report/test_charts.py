"""Charts lose no extreme, can draw odd values, and let no name of a run reach the network or the script."""

from __future__ import annotations

import base64
import gzip
import json
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from stabilitylab.charts import curves as charts
from stabilitylab.charts.look import Chart, library, words
from stabilitylab.charts.maps import heat_map
from stabilitylab.figures.lines import Mark

EMPTY = pd.Series(dtype=float)
NAN, INF = math.nan, math.inf


def columns(chart: Chart) -> list[dict[str, np.ndarray]]:
    """Every data source of the chart, as the page will read it."""
    found: list[dict[str, np.ndarray]] = []

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if node.get("name") == "ColumnDataSource":
                entries = dict(node["attributes"]["data"]["entries"])
                found.append({name: _decoded(column) for name, column in entries.items()})
            for child in node.values():
                walk(child)
        elif isinstance(node, list):
            for child in node:
                walk(child)

    walk(json.loads(chart.json()))
    return found


def _decoded(column: Any) -> np.ndarray:
    if isinstance(column, dict) and column.get("type") == "ndarray":
        array = column["array"]
        if isinstance(array, dict):
            return np.frombuffer(gzip.decompress(base64.b64decode(array["data"])), column["dtype"]).reshape(
                column["shape"]
            )
        return np.array(array)
    return np.array(column, dtype=object)


@pytest.mark.parametrize("seeds", [1, 40])
def test_a_spike_of_one_step_is_drawn_at_its_height(seeds: int) -> None:
    dice = np.random.default_rng(0)
    many = [pd.Series(dice.normal(size=100_000)) for _ in range(seeds)]
    many[-1].iloc[77_777], many[-1].iloc[5] = 1e6, -1e6
    chart = charts.curves({"a": many}, title="t", mean=False)
    drawn = [source for source in columns(chart) if "y" in source]
    assert max(source["y"].max() for source in drawn) == 1e6
    assert min(source["y"].min() for source in drawn) == -1e6
    assert sum(len(source["y"]) for source in drawn) < 1.5 * charts.POINTS
    (where,) = [source["x"][source["y"].argmax()] for source in drawn if source["y"].max() == 1e6]
    assert where == 77_777


def test_what_is_not_finite_is_marked_where_it_was() -> None:
    chart = charts.curves({"a": [pd.Series([1.0, NAN, 3.0, INF])]}, title="t")
    crosses = [list(source["x"]) for source in columns(chart) if "name" in source]
    assert crosses == [[1, 3]]


def test_a_layer_can_be_chosen() -> None:
    matrix = pd.DataFrame([[1.0, 2.0], [3.0, 9.0]], index=["layers.0", "layers.1"], columns=[0, 10])
    chart = charts.layer_curves(matrix, title="t")
    assert chart.chosen == "layers.1"  # where the largest value is
    (source,) = columns(chart)
    assert source[chart.choices["layers.0"]].tolist() == [1.0, 2.0]
    assert source["y"].tolist() == [3.0, 9.0]


ODD = {
    "nothing": lambda: charts.curves({}, title="t"),
    "empty": lambda: charts.curves({"a": [EMPTY]}, title="t", log=True),
    "one step": lambda: charts.curves(
        {"a": [pd.Series([2.0], index=[7])]}, title="t", marks={"a": [Mark(7, None, "x")]}
    ),
    "all nan": lambda: charts.curves({"a": [pd.Series([NAN] * 3)]}, title="t", log="auto"),
    "all inf": lambda: charts.curves({"a": [pd.Series([INF] * 3)], "b": []}, title="t", log=True),
    "zeros on a log axis": lambda: charts.curves({"a": [pd.Series([0.0, 1.0])]}, title="t", log=True),
    "all of float32": lambda: charts.curves({"a": [pd.Series([3.4e38, 1e-45])]}, title="t", log=True),
    "beyond float32": lambda: charts.curves({"a": [pd.Series([1e300, 1.0])]}, title="t"),
    "depth of nan": lambda: charts.by_depth({"a": [pd.Series([NAN, NAN])]}, title="t", limit=(65504.0, "l")),
    "depth of nothing": lambda: charts.by_depth({"a": []}, title="t"),
    "layers of nan": lambda: charts.layer_curves(pd.DataFrame([[NAN]]), title="t"),
    "map of nan": lambda: heat_map(pd.DataFrame([[NAN]]), title="t"),
    "map of nothing": lambda: heat_map(pd.DataFrame(), title="t"),
    "map of one value": lambda: heat_map(pd.DataFrame([[2.0]]), title="t"),
    "map of negatives": lambda: heat_map(pd.DataFrame([[-2.0, -1.0]]), title="t", log=True),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_values_can_be_drawn(name: str) -> None:
    json.loads(ODD[name]().json())


def test_names_reach_neither_the_script_nor_the_network() -> None:
    evil = "</script><script>alert(1)</script> $$x$$ @{y}"
    chart = charts.curves(
        {evil: [pd.Series([1.0, 2.0])]}, title=evil, unit=evil, marks={evil: [Mark(0, 1, evil)]}
    )
    assert "<" not in chart.json()
    assert "$$" not in chart.json()
    assert "$$" not in words("$$a$$")
    assert "</script" not in library()


def test_a_hundred_layers_over_a_hundred_thousand_steps_are_light() -> None:
    """Four maps, four choices of layers and four curves of such a run, beside the library, leave a page under 5 MB."""
    dice = np.random.default_rng(0)
    matrix = pd.DataFrame(dice.random((100, 2_000)) + 1, index=[f"layers.{i}" for i in range(100)])
    matrix.columns = pd.Index(np.arange(2_000) * 50)
    curve = pd.Series(dice.random(100_000))
    parts = [
        charts.layer_curves(matrix, title="t"),
        heat_map(matrix, title="t"),
        charts.curves({"a": [curve]}, title="t"),
    ]
    assert 4 * sum(len(part.json()) for part in parts) + len(library()) < 5_000_000


@pytest.mark.parametrize("value", [3e-4, -5.0, 4e6, 0.0])
def test_a_constant_is_seen_at_its_value(value):
    chart = charts.curves({"a": [pd.Series([value] * 9)]}, title="a")
    assert chart.figure.y_range.default_span == (abs(value) or 2.0)
