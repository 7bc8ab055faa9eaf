"""A log in the place of a run folder: its page, its comparison, its lines on the terminal."""

import gzip
import math

import pytest

from stabilitylab.cli import main
from stabilitylab.report.log_page import run_at, runs_at
from stabilitylab.telemetry import GRADIENT_NORM, LOSS


def curve(count=400, spike=300):
    noise = [0.02 * math.sin(2.3 * k * k) for k in range(count)]
    return [2 + 5 * math.exp(-k / 60) + noise[k] + (2.0 * (spike <= k < spike + 20)) for k in range(count)]


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "train.log"
    path.write_text("".join(f"step {k} loss {x:.5f} | grad norm 1.{k % 7}\n" for k, x in enumerate(curve())))
    return path


def test_a_log_is_read_like_a_run(log):
    run = run_at(log)
    loss, norm = run.series(LOSS), run.series(GRADIENT_NORM)
    assert (loss.index[-1], len(norm)) == (399, 400)
    assert loss.tolist() == pytest.approx(curve(), abs=1e-5)
    assert [(event.kind, event.step) for event in run.events] == [("spike", 300)]
    assert run.near("train", "loss", 10, 12)["step"].tolist() == [10, 11, 12]
    assert set(run.metrics["statistic"]) == {"loss", "gradient_norm"}


def test_its_page_and_its_lines(log, capsys):
    assert main(["report", str(log)]) == 0
    page = (log.parent / "train-report.html").read_text(encoding="utf-8")
    assert "The loss, steps 300 to 319." in page
    assert "Attention" not in page
    capsys.readouterr()
    assert main(["show", str(log)]) == 0
    assert "spike that began at step 300" in capsys.readouterr().out


def test_an_episode_is_shown_up_to_the_last_step_that_there_is(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("step,loss\n" + "".join(f"{k + 7},{x}\n" for k, x in enumerate(curve(spike=360))))
    assert main(["report", str(path)]) == 0
    page = (tmp_path / "train-report.html").read_text(encoding="utf-8")
    assert "Spike at step 367: loss, steps 267 to 406" in page


def test_a_calm_log_has_one_blank_line_before_its_numbers(tmp_path, capsys):
    path = tmp_path / "train.csv"
    path.write_text("step,loss\n" + "".join(f"{k},{x}\n" for k, x in enumerate(curve(spike=400))))
    assert main(["show", str(path)]) == 0
    said = capsys.readouterr().out
    assert "calm: " in said
    assert "\n\n" in said
    assert "\n\n\n" not in said


def test_runs_of_one_log_are_compared(log, capsys):
    two = log.with_name("two.jsonl")
    two.write_text(
        "".join(f'{{"run": "{r}", "step": {k}, "loss": {5 - k / 50}}}\n' for r in "ab" for k in range(60))
    )
    assert [run.name for run in runs_at(two)] == ["two.jsonl a", "two.jsonl b"]
    assert main(["report", str(two)]) == 2
    assert f"stabilitylab compare {two} --out page.html" in capsys.readouterr().err
    assert main(["compare", str(two), str(log), "--out", str(log.parent / "page.html")]) == 0


def test_a_compressed_log_and_what_is_none(log, tmp_path, capsys):
    packed = tmp_path / "train.log.gz"
    packed.write_bytes(gzip.compress(log.read_bytes()))
    assert len(run_at(packed).series(LOSS)) == 400
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "missing", tmp_path / "empty"):
        assert main(["report", str(path)]) == 2
        assert "\n" not in capsys.readouterr().err.strip()
