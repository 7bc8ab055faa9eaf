"""TensorBoardSink, read back with TensorBoard's own reader, and looked at in a real browser."""

from __future__ import annotations

import html
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams.backend_context import Context

from stabilitylab.sinks import Sink, TensorBoardSink
from stabilitylab.sinks.dashboard import (
    BRANCH,
    CHARTS,
    LOSS,
    MAPS,
    NORM,
    SCALE,
    SCORE,
    SHARE,
    SPIKES,
    STORY,
    Overview,
    StepMap,
)
from stabilitylab.sinks.event_file import EventFile
from stabilitylab.telemetry import Event, Key, Samples
from tests.patience import PATIENCE
from tests.ports import free_port
from tests.stabilitylab import story
from tests.stabilitylab.browser import CHROMEDRIVER, CHROMIUM, browser, wait_for_server
from tests.stabilitylab.sinks.event_files import loss_of, newest_text, read, scalars

OVERVIEW = [LOSS, NORM, SCALE, "Overview/4 learning rate", SCORE, BRANCH, SHARE]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return story.make_run(tmp_path_factory.mktemp("tensorboard") / "läuft <b>", tensorboard=True)


def test_it_is_a_sink(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    assert isinstance(sink, Sink)
    sink.close()
    assert read(tmp_path).Tags()["scalars"] == ["summary/episodes"]


def test_curves_hold_what_was_seen(run: Path) -> None:
    dice = np.random.default_rng(0)
    expected = [story.values_at(step, dice) for step in range(120)]
    loss = scalars(run / "tensorboard", LOSS)
    assert list(loss) == list(range(120))
    key = Key("train", "-", "loss")
    assert list(loss.values()) == pytest.approx([v[key] for v in expected], rel=2**-24)  # stored in float32
    norm = scalars(run / "tensorboard", NORM)
    assert norm[story.BROKEN] == math.inf
    scores = scalars(run / "tensorboard", SCORE)
    largest = {
        step: max(value for k, value in values.items() if k.family == "attention")
        for step, values in enumerate(expected)
        if step % 10 == 0
    }
    assert scores == pytest.approx(largest, rel=2**-23)


def test_everything_of_the_overview_is_there(run: Path) -> None:
    tags = read(run / "tensorboard").Tags()
    assert set(OVERVIEW) <= set(tags["scalars"])
    assert {STORY, SPIKES, *MAPS.values()} <= set(tags["images"])
    assert {"attention/largest score over heads", "gradient/log10 l2 over parameters"} <= set(
        tags["histograms"]
    )
    # The first page of the group shows a dozen cards, in the order of their names.
    assert len(OVERVIEW) + 2 + len(MAPS) == 12


def test_spikes_are_text_and_points_on_the_loss(run: Path) -> None:
    folder = run / "tensorboard"
    assert f"| {story.SPIKE} | " in newest_text(folder, "spikes")
    assert "run-end" in newest_text(folder, "events")
    points = [tag for tag in read(folder).Tags()["scalars"] if tag.startswith("episodes/")]
    assert f"episodes/step {story.SPIKE}" in points
    loss = scalars(folder, LOSS)
    assert scalars(folder, f"episodes/step {story.SPIKE}") == {story.SPIKE: loss[story.SPIKE]}


def test_the_arm_is_named_by_its_configuration(run: Path) -> None:
    metadata = read(run / "tensorboard").SummaryMetadata("_hparams_/session_start_info")
    assert b"model.norm" in metadata.plugin_data.content
    assert b"glm-tiny" in metadata.plugin_data.content
    assert "_hparams_/session_end_info" in read(run / "tensorboard").summary_metadata


def test_columns_of_hyperparameters_begin_with_what_differs(tmp_path: Path) -> None:
    for rate in (0.1, 0.2):
        config = {"aim": "a", "depth": 4, "rate": rate, "width": 8}
        sink = TensorBoardSink(tmp_path / str(rate), config=config)
        sink.write(loss_of(0, 2.0), [])
        sink.close()
    runs = EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
    runs.Reload()
    provider = MultiplexerDataProvider(runs, str(tmp_path))
    page = Context(TBContext(data_provider=provider))
    asked = RequestContext()
    shown = page.experiment_from_metadata(asked, "", True, page.hparams_metadata(asked, ""), [])
    assert [one.name for one in shown.hparam_infos] == ["rate", "aim", "depth", "width"]
    assert [one.name.tag for one in shown.metric_infos] == [LOSS, "summary/episodes"]


def test_a_rewind_drops_what_it_supersedes(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    for step in range(10):
        sink.write(loss_of(step, step), [])
    event = {
        "episode": 1,
        "phase": "onset",
        "signal": "train/-/loss",
        "onset": 8,
        "peak": 8,
        "end": None,
        "height": 1.0,
    }
    sink.write(Samples.of([]), [Event(step=8, kind="spike", data=event)])
    sink.write(loss_of(5, 50), [Event(step=5, kind="rewind")])
    sink.write(loss_of(6, 60), [])
    sink.close()
    assert scalars(tmp_path, LOSS) == {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 50, 6: 60}
    assert "episodes/step 8" not in {
        tag for tag in read(tmp_path).Tags()["scalars"] if read(tmp_path).Scalars(tag)
    }
    assert scalars(tmp_path, "summary/episodes") == {6: 0}


def test_a_resumed_run_shows_its_beginning(tmp_path: Path) -> None:
    """A second process goes on from step 100: its maps begin at 0, its list of spikes holds the old one."""
    run = story.make_run(tmp_path / "run", tensorboard=True)
    sink = TensorBoardSink(run / "tensorboard")
    samples = Samples.of(
        [(100, Key("activation", "layers.0", "absmax"), 1.0), (100, Key("train", "-", "loss"), 3.0)]
    )
    sink.write(samples, [Event(step=100, kind="rewind")])
    frame, known = sink._overview.maps["branch"].grid().frames()
    assert frame.columns.tolist() == [*range(0, 100, 10), 100]
    assert known.loc["layers.3"].tolist() == [True] * 10 + [False]
    sink._tell(sink._open(), [])
    assert any(event.data.get("onset") == story.SPIKE for event in sink._events)
    sink.close()
    loss = scalars(run / "tensorboard", LOSS)
    assert max(loss) == 100
    assert loss[100] == 3.0


def test_names_cannot_break_out(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    sink.write(
        loss_of(0, 1.0), [Event(step=0, kind="res|ponse", data={"why": "<script>alert(1)</script>\n| x |"})]
    )
    sink.close()
    text = newest_text(tmp_path, "events")
    assert "<script>" not in text
    assert text.count("\n") == 2


@pytest.mark.filterwarnings("error")
def test_nothing_but_nan(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    keys = [key for key in story.KEYS if key.family != "update"]
    for step in range(3):
        sink.write(Samples.of((step, key, math.nan) for key in keys), [])
    sink.close()
    assert all(math.isnan(value) for value in scalars(tmp_path, LOSS).values())


def test_thousands_of_sites_stay_a_dozen_curves(tmp_path: Path) -> None:
    keys = tuple(
        Key("gradient", f"layers.{layer}.{module}.weight", "l2")
        for layer in range(100)
        for module in range(40)
    )
    sink = TensorBoardSink(tmp_path)
    number = np.arange(len(keys), dtype=np.int32)
    for step in range(5):
        sink.write(Samples(keys, np.full(len(keys), step), number, np.full(len(keys), 0.5)), [])
    sink.close()
    assert len(read(tmp_path).Tags()["scalars"]) < 5
    frame, _ = sink._overview.maps["gradient"].grid().frames()
    assert frame.shape == (100, 5)
    assert frame.to_numpy() == pytest.approx(0.5 * math.sqrt(40))


def test_a_full_disk_is_said_and_survived(tmp_path: Path) -> None:
    """A file size limit stands in for the full disk; records before and after it can be read."""
    script = f"""
import resource, sys
sys.path[:0] = [{str(Path(__file__).parents[3])!r}]
from tests.stabilitylab.sinks.test_tensorboard import loss_of
from stabilitylab.sinks import TensorBoardSink
sink = TensorBoardSink({str(tmp_path)!r})
sink.write(loss_of(0, 1.0), [])
hard = resource.RLIM_INFINITY
resource.setrlimit(resource.RLIMIT_FSIZE, (sink._file.path.stat().st_size + 10, hard))
try:
    sink.write(loss_of(1, 1.0), [])
except OSError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
sink.write(loss_of(2, 1.0), [])
sink.close()
"""
    out = subprocess.run(
        [sys.executable, "-c", script],
        preexec_fn=lambda: signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    assert "File too large" in out.stdout
    assert "events.out.tfevents" in out.stdout
    assert list(scalars(tmp_path, LOSS)) == [0, 2]


@pytest.mark.parametrize("seed", range(3))
def test_a_step_map_is_the_largest_of_each_stretch(seed: int) -> None:
    """Against the naive maximum over the recorded steps of every stretch; memory stays within its bound."""
    dice = np.random.default_rng(seed)
    steps = np.sort(dice.choice(1000, size=300, replace=False))
    values = dice.normal(size=300)
    values[dice.integers(300, size=5)] = np.nan
    map_ = StepMap(columns=16)
    for step, value in zip(steps.tolist(), values.tolist(), strict=True):
        map_.add(step, "layers.0", value)
    frame, known = map_.grid().frames()
    assert frame.shape[1] <= 16
    assert known.all().all()
    starts = frame.columns.tolist()
    for start, end in zip(starts, [*starts[1:], 1000], strict=True):
        expected = values[(steps >= start) & (steps < end)].max()
        np.testing.assert_equal(frame.loc["layers.0", start], expected)


# The older tabs hide what they show in shadow roots.
ALL_TEXT = """
const all = [];
const walk = node => {
  if (node.shadowRoot) walk(node.shadowRoot);
  for (const child of node.childNodes) { if (child.nodeType == 3) all.push(child.data); else walk(child); }
};
walk(document.body);
return all.join('|')"""


@pytest.mark.skipif(not (CHROMIUM and CHROMEDRIVER), reason="no chromium with chromedriver is installed")
def test_a_person_sees_the_dashboard(run: Path, tmp_path: Path) -> None:
    """The real server and a real browser: what the first page and the tabs show, without a click."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(run),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    base = f"http://127.0.0.1:{port}"
    pictures = Path(os.environ.get("STABILITYLAB_PICTURES", tmp_path))
    try:
        wait_for_server(base, server)
        with browser(tmp_path / "profile") as window:
            window.size(1500, 3600)
            window.open(base)
            # Cards are drawn when they are in view: all twelve titles, then all five pictures with pixels in them.
            count = "return document.querySelectorAll('card-view').length"
            assert window.wait(f"{count} >= 12"), window.run(count)
            loaded = (
                "[...document.querySelectorAll('image-card img')].filter(i => i.naturalWidth > 100).length"
            )
            assert window.wait(f"return {loaded} >= 5")
            shown = window.run(
                "return document.body.innerText + [...document.querySelectorAll('[title]')].map(e => e.title)"
            )
            for tag in [*OVERVIEW, STORY, SPIKES, *MAPS.values()]:
                assert tag in shown, tag
            assert window.wait("return document.querySelectorAll('scalar-card line-chart').length >= 7")
            window.picture(pictures / "tensorboard-first-page.png")

            window.open(f"{base}/#custom_scalars")
            last = json.dumps(list(CHARTS)[-1])
            assert window.wait(f"{ALL_TEXT}.includes({last})")
            text = window.run(ALL_TEXT)
            assert all(title in text for title in CHARTS), text[-2000:]
            window.picture(pictures / "tensorboard-custom-scalars.png")

            window.open(f"{base}/#text")
            assert window.wait(f"{ALL_TEXT}.includes('spikes/text_summary')")
            window.picture(pictures / "tensorboard-text.png")
    finally:
        server.terminate()
        server.wait(timeout=PATIENCE)


def test_the_residual_stream_is_what_blocks_put_out() -> None:
    """A block's own parts may be numbered too, in a Sequential."""
    overview = Overview()
    sites = ("layers.0", "layers.0.feed_forward.2", "layers.0.feed_forward.2:input", "layers.1")
    overview.steps(Samples.of((0, Key("activation", site, "absmax"), 1.0) for site in sites))
    assert list(overview.maps["branch"].grid().frames()[0].index) == ["layers.0", "layers.1"]


@pytest.mark.parametrize("norm_at", [[0, 1, 2, 3], [1]])
def test_a_gradient_norm_without_a_loss(tmp_path: Path, norm_at: list[int]) -> None:
    """None at all, or at other steps."""
    norm, other = Key("train", "-", "gradient_norm"), Key("train", "-", "accuracy")
    sink = TensorBoardSink(tmp_path)
    rows = [(step, norm if step in norm_at else other, 1.0 + step) for step in range(4)]
    if len(norm_at) == 1:
        rows += [(step, Key("train", "-", "loss"), 2.0) for step in (0, 3)]
    sink.write(Samples.of(sorted(rows, key=lambda row: row[0])), [])
    sink.close()
    assert list(scalars(tmp_path, "Overview/2 gradient norm")) == norm_at


def test_signs_of_markdown_are_shown_as_they_are(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    event = Event(step=3, kind="run-start", data={"model": "__class__ *a* `b` [c](d)"})
    sink.write(Samples.of([(3, Key("train", "-", "loss"), 1.0)]), [event])
    sink.close()
    text = newest_text(tmp_path, "events")
    assert html.unescape(text).count("__class__ *a* `b` [c](d)") == 1
    assert not set("_*`[]") & set(text.splitlines()[-1])


def test_files_of_one_second_are_named_in_their_order(tmp_path, monkeypatch) -> None:
    moments = iter([1_700_000_000_090_000_000, 1_700_000_000_800_000_000])
    monkeypatch.setattr("stabilitylab.sinks.event_file.time.time_ns", lambda: next(moments))
    made = []
    for _ in range(2):
        file = EventFile(tmp_path)
        file.close()
        made.append(file.path)
    assert sorted(made) == made
