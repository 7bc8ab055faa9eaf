"""Curves and maps: they show every value, mark what is not finite, and put each step at its place."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from stabilitylab.figures import curves as figures
from stabilitylab.figures.lines import Mark
from stabilitylab.figures.maps import heat_map
from stabilitylab.figures.numbers import plain, thinned
from stabilitylab.report.page import picture_html

EVIL = "<script>document.title='broken'</script>\"'&"


def texts(figure: Figure) -> str:
    figure.canvas.draw()
    return "|".join(t.get_text() for axes in figure.axes for t in [*axes.texts, axes.title, axes.xaxis.label])


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (65504.0, "65,504"),
        (0.002, "0.002"),
        (3e-9, "3e-9"),
        (1.5, "1.5"),
        (math.inf, "inf"),
        (math.nan, "nan"),
    ]
    + [(0.0, "0"), (2e7, "2e7"), (-20.0, "-20"), (123456.0, "123,456")],
)
def test_numbers_as_people_write_them(value: float, shown: str) -> None:
    assert plain(value) == shown


@pytest.mark.parametrize("seed", range(3))
def test_thinning_loses_no_extreme_and_no_nan(seed: int) -> None:
    dice = np.random.default_rng(seed)
    values = dice.normal(size=50_000)
    values[dice.integers(50_000, size=3)] = [1e9, -1e9, math.nan]
    series = pd.Series(values, index=np.arange(50_000) * 7)
    thin = thinned(series, 900)
    assert len(thin) < 1300
    assert thin.max() == 1e9
    assert thin.min() == -1e9
    assert thin.isna().any()
    assert thin.index.is_monotonic_increasing
    assert (series.loc[thin.index].to_numpy() == thin.to_numpy())[thin.notna()].all()
    assert thinned(pd.Series(np.full(5000, np.nan)), 900).isna().all()


def test_curves_show_what_is_not_finite() -> None:
    series = pd.Series([1.0, math.nan, 3.0, math.inf], index=[0, 1, 2, 3])
    figure = figures.curves({"a": [series]}, title="Loss")
    crosses = [line for line in figure.axes[0].lines if line.get_marker() == "x" and len(line.get_xdata())]
    assert [list(line.get_xdata()) for line in crosses] == [[1, 3]]


def test_the_mean_of_seeds_is_not_finite_where_a_seed_is_not() -> None:
    a = pd.Series([1.0, math.nan, 3.0], index=[0, 1, 2])
    b = pd.Series([3.0, 4.0, 5.0, 6.0], index=[0, 1, 2, 3])
    figure = figures.curves({"arm": [a, b]}, title="t")
    (mean,) = [line for line in figure.axes[0].lines if line.get_label() == "arm"]
    np.testing.assert_equal(np.asarray(mean.get_ydata(), dtype=float), [2.0, math.nan, 4.0, 6.0])


def test_maps_tell_gaps_from_broken_cells() -> None:
    matrix = pd.DataFrame(
        [[1.0, math.nan, math.inf], [math.nan, 2.0, 3.0]], index=["a", "b"], columns=[0, 5, 9]
    )
    recorded = pd.DataFrame([[True, True, True], [False, True, True]], index=["a", "b"], columns=[0, 5, 9])
    figure = heat_map(matrix, title="m", recorded=recorded)
    red = figure.axes[0].images[1].get_array()
    assert (~np.ma.getmaskarray(red)).tolist() == [[False, True, True], [False, False, False]]
    assert "red: not finite" in texts(figure)


def test_large_maps_keep_their_largest_and_their_broken_cells() -> None:
    values = np.ones((1000, 5000))
    values[123, 4567], values[900, 17] = 1e6, math.nan
    figure = heat_map(pd.DataFrame(values), title="m")
    shown, red = (image.get_array() for image in figure.axes[0].images)
    assert max(shown.shape) <= 400
    assert shown.max() == 1e6
    assert (~np.ma.getmaskarray(red)).sum() == 1


EMPTY = pd.Series(dtype=float)
ODD: dict[str, object] = {
    "nothing": lambda: figures.curves({}, title="t"),
    "empty": lambda: figures.curves({"a": [EMPTY]}, title="t", log=True),
    "one step": lambda: figures.curves(
        {"a": [pd.Series([2.0], index=[7])]}, title="t", marks={"a": [Mark(7, None, "x")]}
    ),
    "all nan": lambda: figures.curves({"a": [pd.Series([math.nan] * 3)]}, title="t", log="auto"),
    "all inf": lambda: figures.curves({"a": [pd.Series([math.inf] * 3)]}, title="t", log=True),
    "zeros on a log axis": lambda: figures.curves({"a": [pd.Series([0.0, 1.0])]}, title="t", log=True),
    "all of float32": lambda: figures.curves({"a": [pd.Series([3.4e38, 1e-45])]}, title="t", log=True),
    "depth of nan": lambda: figures.by_depth(
        {"a": [pd.Series([math.nan, math.nan])]}, title="t", limit=(65504.0, "l")
    ),
    "depth of nothing": lambda: figures.by_depth({"a": []}, title="t"),
    "dots of nothing": lambda: figures.dots({}, title="t"),
    "dots of nan": lambda: figures.dots({"g": {"a": [math.nan, 1.0], "b": []}}, title="t"),
    "map of nan": lambda: heat_map(pd.DataFrame([[math.nan]]), title="t"),
    "map of nothing": lambda: heat_map(pd.DataFrame(), title="t"),
    "map of one value": lambda: heat_map(pd.DataFrame([[2.0]]), title="t"),
    "map of negatives": lambda: heat_map(pd.DataFrame([[-2.0, -1.0]]), title="t", log=True),
    "markup in names": lambda: heat_map(pd.DataFrame([[1.0]], index=[EVIL]), title="層 <b>"),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.filterwarnings("ignore:Glyph .* missing from font")
def test_odd_values_can_be_drawn(name: str) -> None:
    html = picture_html(ODD[name]())  # type: ignore[operator]
    assert html.startswith(("<svg", "<img"))
    assert "<script" not in html


def test_steps_lie_across_at_their_own_places() -> None:
    """Every 10th step, and each one around 50: a step's cell is where the axis says."""
    steps = sorted({*range(0, 101, 10), *range(45, 56)})
    matrix = pd.DataFrame([[float(step) + 1 for step in steps]], index=["a"], columns=steps)
    axes = heat_map(matrix, title="m", log=False).axes[0]
    image = axes.images[0]
    left, right, *_ = image.get_extent()
    row = np.ma.getdata(image.get_array())[0]
    for step in (0, 10, 48, 50, 53, 90, 100):
        assert row[int((step - left) / (right - left) * len(row))] == step + 1
    # A measurement holds until the next one.
    assert row[int((27 - left) / (right - left) * len(row))] == 21


def test_a_long_break_stays_empty() -> None:
    matrix = pd.DataFrame(np.ones((1, 20)), index=["a"], columns=[*range(10), *range(100, 110)])
    shown = heat_map(matrix, title="m").axes[0].images[0].get_array()
    assert np.ma.getmaskarray(shown)[0, 15:95].all()


def test_names_of_curves_lie_beside_them() -> None:
    lines = {name: [pd.Series(np.ones(5) * i)] for i, name in enumerate("ab")}
    figure = figures.curves(lines, title="t")
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert legend.get_window_extent().y1 <= figure.axes[0].get_window_extent().y0
