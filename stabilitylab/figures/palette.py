"""Colours of all figures and charts: Okabe and Ito's, in their order, which colour-blind readers tell apart.

Masataka Okabe and Kei Ito, "Color Universal Design", 2008. Apart from ``style.py``, so that a page of charts alone does not load
what draws figures.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
INK = "#7f7f7e"
ALARM = "#D55E00"


def colours() -> Iterator[str]:
    """The palette, over and over."""
    return cycle(COLOURS)
