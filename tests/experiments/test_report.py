"""A question's report: frontier and verdicts first, from suites and studies alike; it names what broke, and loads nothing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from experiments.arm import Arm, Suite
from experiments.cli import main
from experiments.execution.runner import jobs_of
from experiments.report import charts
from experiments.report.headline import cause_sentence, lead, telling_sentence
from experiments.report.page import how_sure, verdict_detail, write_report
from experiments.results import FRONTIER, FRONTIER_OUTCOME, results_of
from experiments.study import Outcome, Study, shares_of
from experiments.verdicts import Claim, effect_words, evidence_words, judge, seeds_words
from stabilitylab.charts.look import library
from stabilitylab.errors import InputError
from stabilitylab.runs.folder import RunFolder
from stabilitylab.sinks import ParquetSink
from stabilitylab.telemetry import Event, Key, Samples

SUITE = Suite(
    name="tiny",
    question="Who lives? All share their batches.",
    preset="glm-proxy",
    steps=60,
    seeds=tuple(range(8)),
    rates=(-6, -2, -1),
    arms=(Arm(name="plain", summary="fp16"), Arm(name="cure", summary="bf16")),
    claims=(
        Claim(text="The cure survives more", metric=FRONTIER, arm="cure", baseline="plain", direction="more"),
        Claim(
            text="The cure costs loss", metric="final_loss", arm="cure", baseline="plain", direction="more"
        ),
    ),
    data=lambda folder: folder,
)
STUDY = Study(
    name="s",
    question="Which rate?",
    arms=SUITE.arms,
    claims=(SUITE.claims[0],),
    predictions=("2026-11-29: more",),
    outcomes={FRONTIER: Outcome(title="Largest rate", margin=0.5, unit="octaves", scale="rank")},
    measure=lambda cell: {},
    seeds=8,
    data=lambda folder: folder,
)


def run_at(folder: Path, *, breaks: bool, seed: int) -> None:
    """60 steps that fall, or 40 of which the last fifteen are not finite, with a diagnosis of the cause."""
    dice = np.random.default_rng(seed)
    loss = (
        4 + 2 * np.exp(-np.arange(40 if breaks else 60) / 20) + dice.normal(size=40 if breaks else 60) * 0.01
    )
    if breaks:
        loss[25:] = np.nan
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"steps": 60, "seed": seed}))
    sink = ParquetSink(folder / "telemetry")
    sink.write(Samples.of((i, Key("train", "-", "loss"), float(x)) for i, x in enumerate(loss)), [])
    sink.close()
    said = {
        "cause": "overflow",
        "site": "layers.3",
        "sentences": ["non-finite at step 25.", "First suspect: an overflow, layers.3.", "Then."],
    }
    events = [Event(step=25, kind="diagnosis", data=said)] if breaks else []
    RunFolder(folder).append_events(
        [*events, Event(step=60, kind="run-end", data={"lost": True} if breaks else {})]
    )


@pytest.fixture(scope="module")
def suite_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("suite")
    for job in jobs_of(SUITE, out):
        breaks = job.rate == -1 or (job.rate == -2 and job.arm.name == "plain")
        run_at(job.out, breaks=breaks, seed=job.seed)
    return out


def test_a_suite_with_rates_has_a_frontier(suite_folder: Path) -> None:
    results = results_of(SUITE, suite_folder)
    assert results.alive == {
        "plain": {-6: (8, 8), -2: (0, 8), -1: (0, 8)},
        "cure": {-6: (8, 8), -2: (8, 8), -1: (0, 8)},
    }
    assert set(results.values[FRONTIER]["plain"].values()) == {-6.0}
    assert set(results.values[FRONTIER]["cure"].values()) == {-2.0}
    assert next(verdict.judgement for verdict in results.verdicts) == "supported"
    assert len(results.broken) == 24
    assert all(made.broke == 25 for made in results.broken)
    assert charts.telling_rate(results) == -2
    assert telling_sentence(results) == (
        "At a learning rate of 0.25 cure survives in 8 of 8 seeds, plain in 0 of 8."
    )
    assert (
        cause_sentence(results) == "All 24 runs that broke began with an overflow, all of them in layers.3."
    )
    assert lead(results).endswith("Of 2 claims 2 are decided.")


def test_the_first_screen_is_the_frontier_and_the_verdicts(suite_folder: Path) -> None:
    html = write_report(SUITE, suite_folder).read_text()
    body = html.replace(library(), "")
    assert (
        body.index("survived each peak learning rate")
        < body.index("supported</b>")
        < body.index("<h2>How sure")
    )
    assert "an overflow, layers.3" in body
    for outside in ('src="', 'href="http', "@import ", "url(http", "<link"):
        assert outside not in body
    assert len(html) < 2_500_000
    # Rates as rates, arms in words, and of eight seeds no list of eight numbers.
    assert "cure 0.25 against plain 0.0156" in body
    assert "Metrics at the lowest rate, 0.0156" in body
    assert body.index("supported</b>") < body.index("what it is") < body.index("<h2>How sure")


def test_numbers_are_written_for_a_reader() -> None:
    assert [evidence_words(x) for x in (0.5, 1, 282.3, 3140, 3.14e6, 1.2e73)] == [
        "0.5",
        "1",
        "280",
        "3,100",
        "3e6",
        "1e73",
    ]
    values = {seed: float(seed) for seed in range(10)}
    same = judge(SUITE.claims[0], {"cure": values, "plain": values}, scale="rank", margin=0.5)
    assert seeds_words(same) == f"{same.decision.n} of 10"
    assert effect_words(same, FRONTIER_OUTCOME) == "0 octaves [0, 0]"


def test_a_study_of_yes_and_no_is_told_in_counts(tmp_path: Path) -> None:
    claim = Claim(text="The cure averts it", metric="broke", arm="cure", baseline="plain")
    study = dataclasses.replace(
        STUDY, claims=(claim,), outcomes={"broke": Outcome(title="It broke", margin=0.2, unit="share")}
    )
    rows = [
        {"arm": arm, "seed": seed, "seconds": 1.0, "values": {"broke": broke}}
        for seed in range(1, 13)
        for arm, broke in (("plain", 1.0), ("cure", 1.0 * (seed == 3)))
    ]
    (tmp_path / "values.jsonl").write_text("\n".join(map(json.dumps, rows)))
    results = results_of(study, tmp_path)
    assert telling_sentence(results).startswith("The most evidence (e = ")
    assert "is for: The cure averts it, -0." in telling_sentence(results)
    body = write_report(study, tmp_path, results=results).read_text().replace(library(), "")
    assert "It broke: cure 1 of 12 against plain 12 of 12" in body
    assert [row[1:4] for row in shares_of(study, tmp_path)] == [("plain", 12, 12), ("cure", 1, 12)]
    # A share of something else is none of yes and no, though it be 0 in one arm.
    rows[1]["values"]["broke"] = 0.25
    (tmp_path / "values.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert not shares_of(study, tmp_path)
    assert "12 of 12" not in write_report(study, tmp_path).read_text().replace(library(), "")
    assert "12 (8 planned)" in body


def test_a_study_has_a_page_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"arm": arm, "seed": seed, "seconds": 1.0, "values": {FRONTIER: rate}}
        for seed in range(1, 9)
        for arm, rate in (("plain", -3.0), ("cure", -1.0 - seed % 2))
    ]
    (tmp_path / "values.jsonl").write_text("\n".join(map(json.dumps, rows)))
    results = results_of(STUDY, tmp_path)
    assert results.alive["plain"] == {-3.0: (8, 8), -2.0: (0, 8), -1.0: (0, 8)}
    assert results.alive["cure"] == {-3.0: (8, 8), -2.0: (8, 8), -1.0: (4, 8)}
    body = write_report(STUDY, tmp_path).read_text().replace(library(), "")
    assert body.index("survived each peak learning rate") < body.index("supported</b>")
    assert "2026-11-29: more" in body
    with pytest.raises(InputError, match="holds no values of s"):
        results_of(STUDY, tmp_path / "none")


def test_evidence_grows_with_seeds(suite_folder: Path) -> None:
    results = results_of(SUITE, suite_folder)
    seeds, evidence = charts.evidence_of(results.verdicts[0], results.outcomes[FRONTIER])
    assert seeds == [4, 5, 6, 7, 8]
    assert evidence == sorted(evidence)
    assert evidence[-1] == pytest.approx(results.verdicts[0].decision.e_value)


def test_the_command_prints_the_verdicts_and_where_the_report_is(
    suite_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.commands.suites.load", lambda name: SUITE)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["report", "tiny", "--out", str(suite_folder)]) == 0
    said = capsys.readouterr().out
    assert "supported" in said
    assert "At a learning rate of 0.25 cure survives in 8 of 8 seeds, plain in 0 of 8." in said
    assert str(suite_folder / "report.html") in said
    # Of 48 runs TensorBoard shows none by itself.
    assert "filter its runs by rate0.25-seed0" in said


def test_one_claim_after_one_seed_is_told_in_the_singular(suite_folder: Path) -> None:
    suite = dataclasses.replace(SUITE, seeds=(0,), claims=SUITE.claims[:1])
    results = results_of(suite, suite_folder)
    assert lead(results).endswith(" The claim is undecided.")
    section = how_sure(results)
    assert section.text == (
        "A claim without any effect would get a false verdict with a probability of 5 % at most.",
    )
    *charts_of, table = section.parts
    assert len(charts_of) == 1  # of effects: the evidence begins with four seeds
    assert table.rows[0][-1] == "–"
    assert "; 1 seed" in verdict_detail(results.verdicts[0], results.outcomes[FRONTIER])


def test_a_run_tells_of_all_seeds_that_are_there(
    suite_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = dataclasses.replace(SUITE, seeds=(0, 1, 2, 3))
    monkeypatch.setattr("experiments.commands.suites.load", lambda name: few)
    monkeypatch.setattr("experiments.execution.runner.run_suite", lambda *_, **__: None)
    monkeypatch.setenv("COLUMNS", "120")
    words = ["run", "tiny", "--out", str(suite_folder), "--data", str(suite_folder)]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "6 of 8" in said
    assert f"runs: {suite_folder}" in said
    assert main([*words, "--report"]) == 0
    assert f"report:      {suite_folder / 'report.html'}" in capsys.readouterr().out
