"""The benchmark's own judgement: which module a diagnosis names, and what counts as right or as a neighbour."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from experiments.benchmarks._planted import PARTS, PLANTS
from experiments.benchmarks.forensics import module_of, near
from stabilitylab.runs.places import Places
from stabilitylab.spikes.suspects import CAUSES


def test_every_plant_has_a_cause_of_the_table_and_a_place() -> None:
    assert len(PLANTS) >= 16
    for plant in PLANTS.values():
        assert {plant.cause, *plant.causes} <= set(CAUSES)
        assert not plant.site or all(plant.site in parts for parts in PARTS.values())


@pytest.mark.parametrize(
    ("site", "module"),
    [
        ("blocks.1.up.weight", "blocks.1.up"),
        ("blocks.1.up:input", "blocks.1.up"),
        ("layers.0.attention, head 2", "layers.0.attention"),
        ("blocks.1", "blocks.1"),
    ],
)
def test_the_module_of_a_site(site: str, module: str) -> None:
    assert module_of(site) == module


def test_neighbours() -> None:
    order = [
        "embed",
        "blocks.0.ln1",
        "blocks.0.attn.query",
        "attention/blocks.0.attn",
        "blocks.1.ln1",
        "head",
    ]
    run = SimpleNamespace(places=Places({"order": order}))
    assert near(run, "blocks.0.attn", "blocks.0.attn.query")  # type: ignore[arg-type]
    assert near(run, "embed", "blocks.0.ln1")  # type: ignore[arg-type]
    assert not near(run, "head", "blocks.0.ln1")  # type: ignore[arg-type]
