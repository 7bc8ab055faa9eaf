"""Reading a run back, against a naive reading of the samples that made it, and with everything that can be wrong."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from stabilitylab.errors import InputError
from stabilitylab.runs import load_run
from stabilitylab.runs.folder import RunFolder
from stabilitylab.sinks import ParquetSink
from stabilitylab.telemetry import Event, Key, Samples
from tests.stabilitylab import story


def write(run: Path, *flushes: tuple[list[tuple[int, Key, float]], list[Event]]) -> Path:
    sink = ParquetSink(run / "telemetry")
    for rows, events in flushes:
        sink.write(Samples.of(rows), events)
    sink.close()
    return run


@pytest.fixture(scope="module")
def run_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return story.make_run(tmp_path_factory.mktemp("runs") / "eins")


def rows_of_story() -> list[tuple[int, Key, float]]:
    return [row for samples, _ in story.flushes(120) for row in samples]


def test_series_vectors_and_matrices_equal_the_naive_reading(run_path: Path) -> None:
    run, rows = load_run(run_path), rows_of_story()
    loss = {step: value for step, key, value in rows if key.metric == "train/-/loss"}
    assert run.series("train/-/loss").to_dict() == loss
    assert run.series("train/-/loss").name == "train/-/loss"

    frame = run.vectors("attention/layers.2.attention/score_max")
    expected = {
        (step, key.index): value
        for step, key, value in rows
        if key.metric == "attention/layers.2.attention/score_max"
    }
    assert {(step, head): frame.loc[step, head] for step in frame.index for head in frame.columns} == expected

    matrix = run.matrix("attention", "score_max", "max")
    for site in matrix.index:
        for step in matrix.columns:
            heads = [v for s, k, v in rows if s == step and k.metric == f"attention/{site}/score_max"]
            assert matrix.loc[site, step] == max(heads)
    one = run.matrix("attention", "score_max", 1)
    assert one.loc["layers.0.attention", 10] == expected_at(
        rows, "attention/layers.0.attention/score_max", 10, 1
    )
    assert run.telemetry.shape == (len(rows), 6)


def expected_at(rows: list[tuple[int, Key, float]], metric: str, step: int, index: int) -> float:
    (value,) = [v for s, k, v in rows if s == step and k.metric == metric and k.index == index]
    return value


def test_metrics_are_all_that_was_recorded(run_path: Path) -> None:
    metrics = load_run(run_path).metrics
    found = {f"{f}/{s}/{t}": size for f, s, t, size in metrics.itertuples(index=False)}
    expected: dict[str, int] = {}
    for key in story.KEYS:
        expected[key.metric] = max(expected.get(key.metric, 0), key.index + 1)
    assert found == expected


def test_sites_come_in_the_models_order(tmp_path: Path) -> None:
    """Not alphabetical: layers.10 comes after layers.9, as in the samples."""
    sites = ["embedding", *(f"layers.{i}" for i in range(12)), "final_norm"]
    rows = [(0, Key("activation", site, "rms"), 1.0) for site in sites]
    assert load_run(write(tmp_path, (rows, []))).matrix("activation", "rms").index.tolist() == sites


def test_a_nan_is_not_a_gap(tmp_path: Path) -> None:
    """A NaN that was recorded, and a step that was not, look alike in ``matrix``; ``recorded`` tells them apart."""
    a, b = Key("activation", "a", "rms"), Key("activation", "b", "rms")
    run = load_run(write(tmp_path, ([(0, a, math.nan), (1, a, 2.0), (1, b, 3.0)], [])))
    assert run.matrix("activation", "rms").isna().to_numpy().tolist() == [[True, False], [True, False]]
    assert run.recorded("activation", "rms").to_numpy().tolist() == [[True, True], [False, True]]
    assert run.recorded("activation", "rms").index.tolist() == ["a", "b"]


def test_the_largest_of_heads_keeps_a_nan(tmp_path: Path) -> None:
    heads = [Key("attention", "a", "score_max", head) for head in range(3)]
    rows = [(0, heads[0], 5.0), (0, heads[1], math.nan), (0, heads[2], 1.0), (1, heads[0], -math.inf)]
    run = load_run(write(tmp_path, (rows, [])))
    np.testing.assert_equal(run.series("attention/a/score_max", "max").to_numpy(), [math.nan, -math.inf])
    with pytest.raises(InputError, match="several values a step"):
        run.series("attention/a/score_max")


def test_superseded_history_does_not_show(tmp_path: Path) -> None:
    loss = Key("train", "-", "loss")
    first = [(step, loss, float(step)) for step in range(6)]
    then = [(3, loss, 30.0), (4, loss, 40.0)]
    run = write(tmp_path, (first, []), (then, [Event(step=3, kind="rewind")]))
    assert load_run(run).series("train/-/loss").to_dict() == {0: 0, 1: 1, 2: 2, 3: 30, 4: 40}
    assert len(load_run(run).telemetry) == 5


def test_what_was_not_recorded_is_empty(run_path: Path) -> None:
    run = load_run(run_path)
    assert run.series("train/-/perplexity").empty
    assert run.matrix("activation", "nothing").empty
    assert run.recorded("activation", "nothing").empty
    assert run.vectors("a/b/c").empty
    with pytest.raises(InputError, match="family/site/statistic"):
        run.series("loss")


def test_a_run_without_telemetry(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.append_events([Event(step=0, kind="run-start")])
    loaded = load_run(tmp_path)
    assert loaded.telemetry.empty
    assert loaded.metrics.empty
    assert loaded.config == {}
    assert [event.kind for event in loaded.events] == ["run-start"]


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_a_damaged_config_is_named(tmp_path: Path, text: str) -> None:
    RunFolder(tmp_path).append_events([Event(step=0, kind="run-start")])
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        load_run(tmp_path).config  # noqa: B018


def test_a_million_values_are_read_by_metric(tmp_path: Path) -> None:
    """Only the row groups of the family and statistic that is asked for are read."""
    keys = tuple(
        Key("gradient", f"p{i}", s) for i in range(100) for s in ("absmax", "l2", "mean", "std", "share")
    )
    steps = 2000
    sink = ParquetSink(tmp_path / "telemetry")
    number = np.tile(np.arange(len(keys), dtype=np.int32), 100)
    for start in range(0, steps, 100):
        step = np.repeat(np.arange(start, start + 100), len(keys))
        sink.write(Samples(keys, step, number, step * 1000.0 + number), [])
    sink.close()
    run = load_run(tmp_path)
    matrix = run.matrix("gradient", "l2")
    assert matrix.shape == (100, steps)
    expected = np.arange(steps)[None, :] * 1000.0 + np.array([i * 5 + 1 for i in range(100)])[:, None]
    assert (matrix.to_numpy() == expected).all()
    assert isinstance(run.series("gradient/p7/std"), pd.Series)


@pytest.mark.parametrize("twice", [False, True])
def test_matrices_are_what_pandas_makes_of_the_rows(tmp_path: Path, twice: bool) -> None:
    """Sites in the order of first appearance, gaps, NaN, several files, and numbers that were recorded twice."""
    dice = np.random.default_rng(0)
    keys = [Key("f", site, "s", index) for site in ("z", "a", "m") for index in (-1, *range(2))][1:]
    rows = [
        (step, key, float(dice.normal())) for step in range(0, 40, 3) for key in keys if dice.random() < 0.7
    ]
    rows = [(step, key, value if dice.random() < 0.9 else float("nan")) for step, key, value in rows]
    if twice:
        rows += [(step, key, value + 1) for step, key, value in rows[10:20]]
    sink = ParquetSink(tmp_path / "telemetry", rows_per_file=25)
    for first in range(0, len(rows), 11):
        sink.write(Samples.of(rows[first : first + 11]), [])
        sink.flush()
    sink.close()
    frame = pd.DataFrame(
        [(s, k.site, k.index, v) for s, k, v in rows], columns=["step", "site", "index", "value"]
    )
    frame = frame.drop_duplicates(["step", "site", "index"], keep="last")
    scalar, order = frame[frame["index"] == -1], frame["site"].unique()
    run = load_run(tmp_path)
    expected = scalar.pivot(index="site", columns="step", values="value")
    pd.testing.assert_frame_equal(
        run.matrix("f", "s").sort_index(),
        expected.sort_index(),
        check_index_type=False,
        check_column_type=False,
    )
    largest = (
        frame.groupby(["site", "step"])["value"]
        .agg(lambda values: np.maximum.reduce(values.to_numpy()))
        .unstack()
    )
    found = run.matrix("f", "s", index="max")
    assert set(found.index) == set(order)
    np.testing.assert_array_equal(found.sort_index().to_numpy(), largest.sort_index().to_numpy())
    recorded = pd.crosstab(frame["site"], frame["step"]).astype(bool)
    np.testing.assert_array_equal(
        run.recorded("f", "s").sort_index().to_numpy(), recorded.sort_index().to_numpy()
    )
    sizes = dict(zip(run.metrics["site"], run.metrics["size"], strict=True))
    assert sizes == (frame.groupby("site")["index"].max() + 1).to_dict()
