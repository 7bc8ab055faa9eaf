"""The dashboard's pictures: a process that may fail draws them beside the run."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from pathlib import Path

import pytest

from stabilitylab.sinks import TensorBoardSink
from stabilitylab.sinks import tensorboard as sink_module
from stabilitylab.sinks.dashboard import (
    LOSS,
    STORY,
)
from stabilitylab.sinks.pictures import Artist, Sketch
from stabilitylab.telemetry import Event, Key, Samples
from tests.patience import wait_until
from tests.stabilitylab.sinks.event_files import loss_of, read, scalars


def test_pictures_take_a_hundredth_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(sink_module.time, "monotonic", lambda: clock[0])
    sink = TensorBoardSink(tmp_path)
    begun: list[float] = []

    class SlowArtist(Artist):
        busy = False

        def begin(self, sketch: Sketch) -> None:
            begun.append(clock[0])
            self.busy = True

        def finished(self) -> tuple[dict[str, bytes], float] | None:
            took = clock[0] - begun[-1]
            self.busy = took < 2.0
            return None if self.busy else ({}, took)

    monkeypatch.setattr(sink, "_artist", SlowArtist())
    for step in range(1000):
        sink.write(loss_of(step, 1.0), [])
        clock[0] += 1.0
    assert len(begun) * 2.0 <= 0.01 * clock[0] + 2.0
    sink.close()


def until_drawn(sink: TensorBoardSink) -> None:
    """Write until the artist's process has nothing more to hand over."""

    def drawn() -> bool:
        sink.write(loss_of(8, 1.0), [])
        return not sink._artist.busy

    wait_until(drawn, 0.05)


@pytest.mark.parametrize("killed", [False, True])
def test_a_process_draws_while_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    """Pictures of step 7 are there before the run ends, unless the process that draws dies: the last ones are there then too."""
    monkeypatch.setattr(sink_module, "FIRST_PICTURES", 0.0)
    sink = TensorBoardSink(tmp_path)
    sink.write(loss_of(6, 1.0), [])
    assert not sink._artist.busy  # a curve of one point
    sink.write(loss_of(7, 1.0), [])
    assert sink._artist.busy
    if killed:
        process = sink._artist._process
        assert process is not None
        process.kill()
    until_drawn(sink)
    pictures = read(tmp_path).Images(STORY) if not killed else []
    assert [picture.step for picture in pictures] == ([] if killed else [7])
    assert all(picture.encoded_image_string.startswith(b"\x89PNG") for picture in pictures)
    sink.close()
    assert read(tmp_path).Images(STORY)[-1].step == 8


@pytest.mark.parametrize(
    "spoken", ["print('hello from the cluster')", "import os; os.write(1, b'hello')", "0 / 0"]
)
def test_what_the_artist_says_besides_is_no_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoken: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(spoken)
    monkeypatch.syspath_prepend(str(tmp_path))
    artist = Artist()
    artist.begin(Sketch(loss=("loss", {0: 1.0, 1: 2.0})))
    done = wait_until(artist.finished)
    assert done[0]["loss"].startswith(b"\x89PNG")
    assert not artist.busy


@pytest.mark.parametrize("written", ["", "nothing of ours", "_MARKER", "_MARKER + b'no pickle'"])
def test_an_artist_that_fails_is_free_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n_MARKER = b'\\0stabilitylab pictures\\0'\n"
        f"os.write(1, {written if written.startswith('_') else repr(written.encode())})\nos._exit(0)"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    artist = Artist()
    artist.begin(Sketch())
    done = wait_until(artist.finished)
    assert done[0] == {}
    assert not artist.busy


def test_the_last_pictures_leave_no_file_open_and_take_names_in_any_script(tmp_path: Path) -> None:
    """Drawn in the thread that ends with the run, as by a monitor. Warnings are errors here."""
    failures: list[BaseException] = []

    def one_run(folder: Path) -> None:
        try:
            sink = TensorBoardSink(folder)
            site = "blocks.0.层"
            sink.write(Samples.of([(i, Key("activation", site, "absmax"), 1.0 + i) for i in range(4)]), [])
            sink.write(Samples.of([(i, Key("train", "-", "loss"), 1.0) for i in range(4)]), [spike(site)])
            sink.close()
        except BaseException as error:
            failures.append(error)

    open_files: list[Counter[str]] = []
    for i in range(3):
        thread = threading.Thread(target=one_run, args=(tmp_path / str(i),))
        thread.start()
        thread.join()
        open_files.append(files_open())
    assert not failures
    assert not open_files[2] - open_files[0]


def files_open() -> Counter[str]:
    """By path. What other tests have left to the garbage collector may be closed at any moment, and is none of ours."""
    found: Counter[str] = Counter()
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found[str(descriptor.readlink())] += 1
    return Counter({path: n for path, n in found.items() if path.startswith("/") and "/proc/" not in path})


def spike(signal: str) -> Event:
    data = {
        "episode": 1,
        "phase": "onset",
        "signal": signal,
        "onset": 2,
        "peak": 2,
        "end": None,
        "height": 1.0,
    }
    return Event(step=2, kind="spike", data=data)


def test_no_process_to_draw_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers are written all the same, and the pictures at the end."""
    monkeypatch.setattr(sink_module, "FIRST_PICTURES", 0.0)
    monkeypatch.setattr("sys.executable", str(tmp_path / "nowhere"))
    sink = TensorBoardSink(tmp_path / "out")
    for step in range(3):
        sink.write(loss_of(step, 1.0), [])
    sink.close()
    assert list(scalars(tmp_path / "out", LOSS)) == [0, 1, 2]
    assert len(read(tmp_path / "out").Images(STORY)) == 1
