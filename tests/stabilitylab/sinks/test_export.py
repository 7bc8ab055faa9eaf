"""Exports hold what the run recorded, as independent readers read them back."""

import math

import pandas as pd
import pytest

from stabilitylab import load_run
from stabilitylab.cli import main
from stabilitylab.telemetry import GRADIENT_NORM, LOSS
from tests.stabilitylab import story
from tests.stabilitylab.sinks.event_files import scalars

KEYS = ["step", "family", "site", "statistic", "index"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return story.make_run(tmp_path_factory.mktemp("runs") / "mine")


def tidy(frame):
    words = frame.astype(dict.fromkeys(("family", "site", "statistic"), str))
    return words.drop_duplicates(KEYS, keep="last").sort_values(KEYS).reset_index(drop=True)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_tidy_table_holds_everything(run, tmp_path, kind, capsys):
    out = tmp_path / f"x.{kind}"
    assert main(["export", str(run), f"--{kind}", "--out", str(out)]) == 0
    written = pd.read_csv(out) if kind == "csv" else pd.read_parquet(out)
    pd.testing.assert_frame_equal(tidy(written), tidy(load_run(run).telemetry), check_dtype=False)
    assert f"{len(written):,} rows" in capsys.readouterr().out


def test_a_wide_table_has_a_row_a_step(run, tmp_path):
    out = tmp_path / "x.csv"
    assert main(["export", str(run), "--csv", "--wide", "--only", "train/*", "--out", str(out)]) == 0
    written = pd.read_csv(out).set_index("step")
    loaded = load_run(run)
    for metric in (LOSS, GRADIENT_NORM):
        series = loaded.series(metric)
        if len(series):
            pd.testing.assert_series_equal(written[metric].dropna(), series.dropna(), check_dtype=False)
    assert all(name.startswith("train/") for name in written.columns)


def test_tensorboard_reads_it(run, tmp_path):
    folder = tmp_path / "tb"
    assert main(["export", str(run), "--tensorboard", "--only", LOSS, "--out", str(folder)]) == 0
    found, series = scalars(folder, LOSS), load_run(run).series(LOSS)
    assert list(found) == series.index.tolist()
    for step, value in series.items():
        assert found[step] == pytest.approx(value, rel=1e-6) or (
            math.isnan(value) and math.isnan(found[step])
        )


def test_the_default_place_and_what_is_refused(run, capsys, tmp_path):
    assert main(["export", str(run), "--csv"]) == 0
    assert (run / "export.csv").is_file()
    capsys.readouterr()
    for words, said in (
        ([], "give --csv, --parquet or --tensorboard"),
        (["--csv", "--parquet"], "one kind at a time"),
        (["--tensorboard", "--wide"], "--wide is a shape of tables"),
        (["--csv", "--only", "nothing/*"], "nothing that --only"),
        (["--csv", "--out", str(tmp_path / "no" / "x.csv")], "there is no folder"),
    ):
        assert main(["export", str(run), *words]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_another_trainers_log_becomes_a_clean_table(tmp_path):
    log = tmp_path / "train.log"
    log.write_text("".join(f"iter {k}: loss {5 - k / 10}, time 2ms\n" for k in range(30)))
    assert main(["export", str(log), "--csv", "--wide"]) == 0
    written = pd.read_csv(tmp_path / "export.csv")
    assert written["step"].tolist() == list(range(30))
    assert written[LOSS].tolist() == pytest.approx([5 - k / 10 for k in range(30)])
