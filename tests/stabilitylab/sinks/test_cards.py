"""Maps as small pictures: the same cells as in a chart, in the right colours."""

from __future__ import annotations

import io

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import LogNorm, to_rgb

from stabilitylab.figures.cards import map_card
from stabilitylab.figures.map_cells import BROKEN, named_sites
from stabilitylab.figures.style import save_pixels, tidy


def test_a_card_has_the_cells_of_its_map() -> None:
    """Pixels of the middle of each cell: the colour map's, white where nothing was recorded, red where it is not finite."""
    values = np.array([[1.0, 2.0, 4.0], [8.0, np.nan, np.nan]])
    recorded = np.array([[True, True, True], [True, True, False]])
    matrix = pd.DataFrame(values, index=["layers.0", "层"], columns=[0, 1, 2])
    with tidy():
        shown = pd.DataFrame(recorded, matrix.index, [0, 1, 2])
        figure = map_card(matrix, title="a", log=True, recorded=shown)
    pasted, _ = figure.images
    pixels = pasted.get_array()
    height, width = pixels.shape[:2]
    middle = [
        [pixels[height * (2 * r + 1) // 4, width * (2 * c + 1) // 6] for c in range(3)] for r in range(2)
    ]
    scale, colours = LogNorm(1, 8), mpl.colormaps["viridis"]
    expected = [[colours(scale(v))[:3] for v in (1, 2, 4)], [colours(1.0)[:3], to_rgb(BROKEN), (1, 1, 1)]]
    np.testing.assert_allclose(middle, expected, atol=1e-6)
    words = [one.get_text() for one in figure.texts]
    assert {"a", "layers.0", "层", "1", "2", "5", "step; red: not finite"} <= set(words)


@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize("value", [0.0, -1.0, 1e-300, 3.0, np.inf])
def test_a_card_of_one_value_can_be_drawn(log: bool, value: float) -> None:
    matrix = pd.DataFrame([[value]], index=["layers.0"], columns=[7])
    content = io.BytesIO()
    save_pixels(
        map_card(matrix, title="a", log=log, recorded=matrix.notna()), content, dpi=90, ground="white"
    )
    assert content.getvalue().startswith(b"\x89PNG")


def test_of_many_rows_those_of_round_numbers_are_named():
    sites = ["embedding", *(f"layers.{i}" for i in range(100)), "head"]
    named = [sites[row] for row in named_sites(sites, 16)]
    assert named == ["embedding", *(f"layers.{i}" for i in range(10, 100, 10)), "head"]
    assert named_sites(sites[:16], 16) == list(range(16))
    assert len(named_sites(["no number"] * 99, 16)) <= 17
