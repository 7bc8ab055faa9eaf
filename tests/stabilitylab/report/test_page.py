"""Pages tell what happened, execute nothing from a run, and look right in a real browser."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from stabilitylab.charts import curves as charts
from stabilitylab.charts.look import Chart, library
from stabilitylab.charts.maps import heat_map as chart_map
from stabilitylab.errors import InputError
from stabilitylab.figures import curves as figures
from stabilitylab.figures.lines import Mark
from stabilitylab.report import (
    Page,
    Picture,
    Said,
    Section,
    Statements,
    Table,
    TableCell,
    comparison,
    run_report,
)
from stabilitylab.report import layers_section as layers
from stabilitylab.report.episodes_section import counted, episode_section, outcome
from stabilitylab.report.run_labels import labelled
from stabilitylab.report.terminal import show_run
from stabilitylab.runs import load_run
from stabilitylab.runs.folder import RunFolder
from stabilitylab.sinks import ParquetSink
from stabilitylab.spikes import Episode
from stabilitylab.telemetry import LOSS, Event, Key, Samples
from tests.patience import wait_until
from tests.stabilitylab import story
from tests.stabilitylab.browser import CHROMEDRIVER, CHROMIUM, Browser, browser
from tests.stabilitylab.runs.test_run import write

EVIL = "<script>document.title='broken'</script>\"'&"


@pytest.fixture(scope="module")
def run_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return story.make_run(tmp_path_factory.mktemp("runs") / "läuft")


def test_a_page_escapes_what_comes_from_runs() -> None:
    table = Table(columns=[EVIL], rows=[[EVIL, TableCell(text=EVIL, detail=EVIL, best=True)]], note=EVIL)
    lines = {EVIL: [pd.Series([1.0, 2.0])], "b": [pd.Series([1.0, math.nan])]}
    picture = Picture(figure=figures.curves(lines, title=EVIL), caption=EVIL)
    chart = charts.curves(lines, title=EVIL, unit=EVIL, caption=EVIL, marks={EVIL: [Mark(0, 1, EVIL)]})
    one_layer = charts.layer_curves(pd.DataFrame([[1.0, 2.0]], index=[EVIL]), title=EVIL)
    said = Statements(said=[Said(word=EVIL, text=EVIL, detail=EVIL)], note=EVIL)
    parts = [
        table,
        picture,
        chart,
        one_layer,
        chart_map(pd.DataFrame([[1.0, 2.0]], index=[EVIL]), title=EVIL),
        said,
    ]
    sections = [Section(title=EVIL, text=[EVIL], parts=parts)] * 3
    html = Page(title=EVIL, lead=EVIL, facts={EVIL: EVIL}, sections=sections).html()
    assert "<script>document" not in html
    assert "&lt;script&gt;" in html
    assert 'class="best"' in html


@pytest.fixture(scope="module")
def report(run_path: Path) -> tuple[Page, str]:
    page = run_report(load_run(run_path))
    page.facts = {**page.facts, EVIL: EVIL}
    return page, page.html()


def test_a_page_is_one_file(report: tuple[Page, str]) -> None:
    _, html = report
    for outside in ('src="', 'href="http', "@import ", "url(http", "<link"):
        assert outside not in html.replace(library(), "")
    # The library and the page's script are inside, once.
    assert html.count("Copyright (c) Anaconda") == 1
    assert len(html) < 2_000_000


def test_a_report_tells_the_story(report: tuple[Page, str]) -> None:
    page, html = report
    titles = [section.title for section in page.sections]
    assert titles[:4] == ["What happened", "Loss and gradient norm", "Episodes", "Causes"]
    assert {
        "Gradients",
        "Residual stream",
        "Attention scores",
        "Ranges",
        "Updates",
        "Activation outliers",
    } <= set(titles)
    assert "120 steps recorded, 0 to 119" in html
    assert f"<td>{story.SPIKE}</td>" in html
    assert "A value on the residual stream that is not finite" not in html
    # Layer 3 at the last measured step: 4 x (2 + 110 / 20), 11.1 bits below 65,504.
    assert "The largest value on the residual stream was 30, 11.1 bits below" in html
    assert all(section.text for section in page.sections[1:])


def test_reports_of_several_runs_lie_over_each_other(run_path: Path, tmp_path: Path) -> None:
    other = story.make_run(tmp_path / "zwei", seed=1)
    page = comparison([load_run(run_path), load_run(other)])
    assert page.title == "Comparison of läuft, zwei"
    assert "Largest |value|, layer by step: zwei" in page.html()


@pytest.mark.parametrize(
    "rows",
    [
        [(0, Key("train", "-", "seconds"), 1.0)],
        [(3, key, 1.0) for key in story.KEYS],
        [(step, key, math.nan) for step in range(4) for key in story.KEYS],
        [(step, key, -math.inf) for step in range(4) for key in story.KEYS],
        [(0, Key("activation", f"層.{i}.<b>", "absmax"), 1.0) for i in range(3000)],
    ],
    ids=["no loss", "a single step", "all nan", "all -inf", "thousands of sites"],
)
def test_odd_runs_have_a_report(tmp_path: Path, rows: list[tuple[int, Key, float]]) -> None:
    html = run_report(load_run(write(tmp_path / "run", (rows, [])))).html()
    assert "<h1>Run run</h1>" in html
    assert "<b>" not in html.replace(library(), "")


@pytest.mark.parametrize(("weight", "alarms"), [(0.0, False), (1.0, True)])
def test_an_update_of_weights_that_are_all_zero_is_no_alarm(
    tmp_path: Path, weight: float, alarms: bool
) -> None:
    """A bias's first step is infinitely large beside the bias: nothing is broken. With other weights something is."""
    rows = [
        (step, Key("update", f"layers.{i}.bias", name), value)
        for i in range(2)
        for step in range(3)
        for name, value in (
            ("ratio", 0.1 if step else math.inf),
            ("weight_rms", 1.0 if step else weight),
        )
    ]
    section = layers.updates({"": [load_run(write(tmp_path / "run", (rows, [])))]})
    shown = "|".join(part.caption + part.json() for part in section.parts if isinstance(part, Chart))
    assert ("not finite" in shown) is alarms


def test_pages_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Page(title="t")
    target = tmp_path / "report.html"
    target.write_text("before")
    monkeypatch.setattr(
        Path, "replace", lambda self, other: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OSError, match="No space left") as raised:
        page.write(target)
    assert raised.value.filename == str(target)
    assert target.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    monkeypatch.undo()
    with pytest.raises(InputError, match="No such file or directory"):
        page.write(tmp_path / "none" / "report.html")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="Is a directory"):
        page.write(tmp_path / "folder")


@pytest.mark.skipif(not (CHROMIUM and CHROMEDRIVER), reason="no chromium with chromedriver is installed")
def test_a_person_reads_the_report(report: tuple[Page, str], tmp_path: Path) -> None:
    """Wide and on a phone, in light and in dark: the page fits, draws its figures and logs nothing."""
    page, html = report
    file = tmp_path / "report.html"
    file.write_text(html, encoding="utf-8")
    pictures = Path(os.environ.get("STABILITYLAB_PICTURES", tmp_path))
    with browser(tmp_path / "profile") as window:
        for name, width, dark in (("wide", 1200, False), ("dark", 1200, True), ("phone", 390, False)):
            window.size(width, 900, dark=dark, phone=name == "phone")
            window.open(file.as_uri())
            # The page itself does not move sideways; wide tables and figures do so inside it.
            assert window.run("return document.documentElement.scrollWidth") == width
            places = "[...document.querySelectorAll('[data-chart]')]"
            assert window.run(f"return {places}.length") == sum(
                isinstance(part, Chart) for section in page.sections for part in section.parts
            )
            window.run(f"{places}.forEach(draw)")
            assert window.wait(f"return {places}.every(p => p.classList.contains('drawn'))")
            assert (
                window.run(f"return Math.min(...{places}.map(p => p.getBoundingClientRect().height))") > 100
            )
            paper = window.run("return getComputedStyle(document.body).backgroundColor")
            assert paper == ("rgb(22, 22, 24)" if dark else "rgb(255, 255, 255)")
            window.picture(pictures / f"report-{name}.png")
        hover_and_zoom(window, file.as_uri())
        assert ticks(window, [0.002, 0.0025, 0.003]) == ["0.002", "0.0025", "0.003"]  # the second was 0.003
        assert ticks(window, [1234.5, 5e-4, 2e6]) == ["1,234.5", "5e-4", "2e6"]
        assert window.run("return document.title") == "Run läuft"
        assert window.run("return document.querySelectorAll('nav a').length") == len(page.sections)
        assert window.messages() == []


def hover_and_zoom(window: Browser, address: str) -> None:
    """With a mouse the loss's chart tells its values, and a drag looks closer."""
    window.size(1200, 900)
    window.open(address)
    place = "document.querySelector('[data-chart]')"
    window.run(f"{place}.scrollIntoView({{block: 'center'}})")
    assert window.wait(f"return {place}.classList.contains('drawn')")
    plot = "Bokeh.documents.flatMap(d => d.roots()).find(r => r.name === 'Loss')"
    before = window.run(f"return {plot}.x_range.end - {plot}.x_range.start")
    box = window.run(f"const b = {place}.getBoundingClientRect(); return [b.left, b.top, b.width, b.height]")
    left, top, width, height = box

    # Text inside Bokeh's own shadow roots.
    told = (
        "const told = n => (n.shadowRoot ? told(n.shadowRoot) : '') + [...n.childNodes].map(c => c.nodeType === 3 ? c.data "
        ": ['STYLE', 'SCRIPT'].includes(c.tagName) ? '' : told(c)).join(' ');"
    )

    def is_told() -> bool:  # a chart that has just been drawn may not listen yet
        window.mouse("mouseMoved", left + width * 0.45, top + height * 0.5)
        window.mouse("mouseMoved", left + width * 0.5, top + height * 0.5)
        return bool(window.run(f"{told} return /step:\\s*\\d/.test(told(document.body))"))

    wait_until(is_told, 0.1)
    window.mouse("mouseMoved", left + width * 0.4, top + height * 0.3)
    window.mouse("mousePressed", left + width * 0.4, top + height * 0.3, pressed=True)
    for share in (0.45, 0.5, 0.6):
        window.mouse("mouseMoved", left + width * share, top + height * (share + 0.1), pressed=True)
    window.mouse("mouseReleased", left + width * 0.6, top + height * 0.7)
    assert window.wait(f"return {plot}.x_range.end - {plot}.x_range.start < {before} / 2")


def ticks(window: Browser, numbers: list[float]) -> list[str]:
    """What an axis writes beside its ticks."""
    (axis,) = charts.curves({"a": [pd.Series([1.0, 2.0])]}, title="t").figure.yaxis
    told = window.run(f"const ticks = {numbers}; return ticks.map(tick => {{{axis.formatter.code}}})")
    return list(told)


def long_run(folder: Path) -> Path:
    """10,000 steps that fall from 4 to 3, a peak of 21.8 at step 5,003, a NaN at 8,000."""
    sink, loss = ParquetSink(folder / "telemetry"), Key("train", "-", "loss")
    values = np.linspace(4, 3, 10_000)
    values[5003], values[8000] = 21.8, math.nan
    sink.write(Samples.of((step, loss, value) for step, value in enumerate(values.tolist())), [])
    sink.close()
    kinds = (("spike", 5000, 5010), ("spike", 5050, 5060), ("non-finite", 8000, 8000))
    RunFolder(folder).append_events(
        [
            Event(
                step=end,
                kind=kind,
                data={
                    "episode": number,
                    "phase": "end",
                    "signal": "train/-/loss",
                    "onset": onset,
                    "peak": onset,
                    "end": end,
                    "height": None if kind == "non-finite" else 3.0,
                },
            )
            for number, (kind, onset, end) in enumerate(kinds)
        ]
    )
    return folder


def test_episodes_are_shown_from_near(tmp_path: Path) -> None:
    page = run_report(load_run(long_run(tmp_path)))
    near = page.sections[1]
    assert near.title == "Episodes from near"
    titles = [part.title for part in near.parts if isinstance(part, Chart)]
    assert titles == [
        "Spike at step 5,000: loss, steps 4,900 to 5,110",
        "Non finite at step 8,000: loss, steps 7,900 to 8,100",
    ]
    (told,) = page.sections[0].parts
    assert isinstance(told, Statements)
    assert [(one.word, one.text.partition(",")[0]) for one in told.said] == [
        ("spike", "Step 5000"),
        ("spike", "Step 5050"),
        ("non finite", "Step 8000. First suspect: not visible in what was measured."),
    ]
    assert page.lead == (
        "1 stretch that is not finite, 2 spikes. 10,000 steps recorded, 0 to 9999; "
        "the loss went from 4 to 3, its highest 21.8 at step "
        "5,003; 1 value is not finite."
    )


def test_a_loss_has_nats_only_where_the_configuration_says_tokens(tmp_path: Path) -> None:
    """A Monitor's loss may be a squared error, with or without a config.json of one's own beside it."""
    folder = long_run(tmp_path)
    for config, unit in ((None, ""), ({"rate": 0.1}, ""), ({"objective": {"kind": "glm"}}, " nats")):
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))
        page = run_report(load_run(folder))
        assert f"went from 4 to 3{unit}, its highest" in page.lead
        drawn = [
            p.figure for s in page.sections for p in s.parts if isinstance(p, Chart) and "oss" in p.title
        ]
        assert len(drawn) == 3  # the whole and two from near
        assert {figure.yaxis[0].axis_label or "" for figure in drawn} == {unit.strip()}


def test_runs_of_one_name_are_told_apart_in_every_table(tmp_path: Path) -> None:
    runs = []
    for parent in ("a", "b"):
        (tmp_path / parent).mkdir()
        sink = ParquetSink(long_run(tmp_path / parent / "mine") / "telemetry")
        sink.write(Samples.of([(0, Key("activation", "layers.0", "absmax"), 8.0)]), [])
        sink.close()
        runs.append(load_run(tmp_path / parent / "mine"))
    page = comparison(runs)
    tables = [part for section in page.sections for part in section.parts if isinstance(part, Table)]
    named = [{row[0] for row in table.rows} for table in tables if table.columns[0] == "run"]
    assert len(named) == 3  # episodes, causes, ranges
    assert named == [{str(run.path) for run in runs}] * 3
    third = load_run(long_run(tmp_path / "third"))
    assert [name for name, _ in labelled({"a": [runs[0], third], "b": runs[1:]})] == ["a: mine", "third", "b"]


def test_a_run_of_one_step_went_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sink = ParquetSink(tmp_path / "telemetry")
    sink.write(Samples.of([(7, Key("train", "-", "loss"), 8.0)]), [])
    sink.close()
    assert run_report(load_run(tmp_path)).lead == "1 step recorded; the loss was 8 at its only step."
    show_run(load_run(tmp_path))
    assert ": The loss was 8 at its only step.\n" in capsys.readouterr().out


def test_an_episode_at_the_end_of_a_run_is_open(tmp_path: Path) -> None:
    run = load_run(long_run(tmp_path))
    *_, last = (event for event in run.events if "onset" in event.data)
    last.data["to_the_end"] = True
    (table,) = (part for part in episode_section({"run": [run]}).parts if isinstance(part, Table))
    ends = [row[table.columns.index("end")] for row in table.rows]
    assert ends[-1] == "open"
    assert ends.count("open") == 1


def test_what_became_of_the_loss_is_said() -> None:
    loss = pd.Series(np.r_[np.full(100, 2.0), np.full(20, 6.0), np.full(80, 2.1)])
    spike = Episode(kind="spike", onset=100, peak=110, end=119, height=4.0, signal=LOSS, level=2.0)
    assert outcome(spike, loss) == "From 2 up to 6; over at step 119, then 2.1."
    divergence = replace(spike, kind="divergence", end=109)
    assert outcome(divergence, loss.iloc[:116]) == "From 2 up to 6; it stayed there, at 6 from step 109 on."
    assert (
        outcome(replace(divergence, to_the_end=True), loss)
        == "From 2 up to 6, and not over when the run ended."
    )
    assert outcome(replace(divergence, end=None), loss) == "From 2 up to 6, and going on."
    assert outcome(replace(spike, kind="hard-batch"), loss) == ""
    assert counted([spike, divergence, spike]) == "1 divergence, 2 spikes"


def test_a_mark_stands_on_its_curve_though_the_onset_is_no_extreme(tmp_path: Path) -> None:
    """Of 10,000 values the chart draws the extremes; the mark of an onset that is no extreme once stood at the upper edge."""
    values = pd.Series(3 + 0.01 * np.random.default_rng(0).standard_normal(10_000), name="loss")
    values.iloc[5_000:5_020] = np.linspace(3.2, 9, 20)
    chart = charts.curves({"run": [values]}, title="Loss", marks={"run": [Mark(5_000, 5_019, "spike")]})
    heights = [
        r.data_source.data["y"]
        for r in chart.figure.renderers
        if getattr(r.glyph, "marker", "") == "inverted_triangle"
    ]
    assert heights == [[pytest.approx(3.2)]]


def test_a_comparison_says_which_settings_differ(tmp_path: Path) -> None:
    for name, rate in (("a", 0.1), ("b", 0.2)):
        folder = long_run(tmp_path / name)
        config = {
            "seed": 0,
            "optimizer": {"rate": rate, "beta": 0.9},
            **({"extra": True} if name == "b" else {}),
        }
        (folder / "config.json").write_text(json.dumps(config))
    happened, differ, *_ = comparison([load_run(tmp_path / name) for name in "ab"]).sections
    (told,), (table,) = happened.parts, differ.parts
    assert isinstance(told, Statements)
    assert [(one.text, one.word) for one in told.said] == [("a", "3 episodes"), ("b", "3 episodes")]
    # Two spikes came before it; what ended the run is what is said.
    assert all(". Non-finite at step 8000. First suspect: " in one.detail for one in told.said)
    assert isinstance(table, Table)
    assert list(table.columns) == ["setting", "a", "b"]
    assert [list(row) for row in table.rows] == [["optimizer.rate", "0.1", "0.2"], ["extra", "–", "True"]]
