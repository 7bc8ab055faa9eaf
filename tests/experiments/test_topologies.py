"""The topologies that exist, and when two orders of them agree."""

from __future__ import annotations

import pytest

from experiments.benchmarks.topologies import Settings, agreement, layouts


@pytest.mark.parametrize(
    ("ranks", "rows", "there"),
    [
        (2, 8, {(1, 1, 2), (1, 2, 1), (2, 1, 1)}),
        (4, 8, {(1, 1, 4), (1, 2, 2), (1, 4, 1), (2, 1, 2), (2, 2, 1), (4, 1, 1)}),
        (
            4,
            4,
            {(1, 2, 2), (1, 4, 1), (2, 1, 2), (2, 2, 1), (4, 1, 1)},
        ),  # four replicas have a row each, and take two
    ],
)
def test_every_topology_that_rows_and_heads_allow(
    ranks: int, rows: int, there: set[tuple[int, int, int]]
) -> None:
    found = layouts(Settings(ranks=ranks, rows=rows, micro_rows=2), heads=8)
    assert {(one.tensor, one.pipeline, one.data) for one in found} == there


def test_heads_that_cannot_be_shared_out() -> None:
    assert all(one.tensor == 1 for one in layouts(Settings(ranks=2), heads=3))


def test_agreement_of_orders() -> None:
    assert agreement([(1.0, 10.0), (2.0, 20.0), (3.0, 21.0)]) == pytest.approx(1)
    assert agreement([(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)]) == pytest.approx(-1)
