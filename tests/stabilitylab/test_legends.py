"""Legends of runs whose names are as long as a fork's."""

from __future__ import annotations

import warnings
from pathlib import Path

import pandas as pd

from stabilitylab.figures.curves import curves
from stabilitylab.figures.style import save, shortened


def test_names_as_long_as_a_forks_leave_room_for_the_axes(tmp_path: Path) -> None:
    series = pd.Series([1.0, 2.0, 3.0])
    names = [f"{'model.attention.soft_cap=30.0,' * 20}{i}" for i in range(8)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = curves({name: [series] for name in names}, title="loss")
        save(figure, tmp_path / "loss.png")
    (legend,), (axes,) = figure.legends, figure.axes
    assert legend.get_window_extent().width <= figure.bbox.width
    assert axes.get_window_extent().height > 0.3 * figure.bbox.height
    assert len({text.get_text() for text in legend.get_texts()}) == 8


def test_a_name_is_cut_in_its_middle_and_told_from_the_others() -> None:
    assert shortened(["short"], 20) == ["short"]
    (one,) = shortened(["a" * 30 + "b" * 30], 20)
    assert len(one) <= 20
    assert (one[0], one[-1]) == ("a", "b")
    alike = shortened(["a" * 30 + c + "b" * 30 for c in "xyz"], 20)
    assert len(set(alike)) == 3
    assert max(map(len, alike)) <= 20
