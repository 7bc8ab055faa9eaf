"""ParquetSink and reading it back, against the naive rule: replay every write in order, drop what a rewind takes back."""

from __future__ import annotations

import random
import resource
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from stabilitylab.errors import InputError
from stabilitylab.runs import load_run
from stabilitylab.runs.parts import list_parts, read_rows
from stabilitylab.sinks import MemorySink, ParquetSink, Sink
from stabilitylab.sinks import parquet as parquet_module
from stabilitylab.telemetry import Event, Key, Samples
from tests.patience import PATIENCE, wait_until

KEYS = (
    Key("train", "-", "loss"),
    Key("activation", "layers.10.feed_forward", "absmax"),
    Key("activation", "layers.2.feed_forward", "absmax"),
    Key("attention", "層.0/ütt", "score_max", 0),
    Key("attention", "層.0/ütt", "score_max", 1),
)


def flush_of(step: int, tag: float = 0.0) -> Samples:
    return Samples.of((step, key, tag + step + i / 10) for i, key in enumerate(KEYS))


def as_dict(rows) -> dict:
    """(metric, index, step) -> value, the last one recorded counting."""
    return {
        (family, site, statistic, int(index), int(step)): value
        for step, family, site, statistic, index, value in rows.itertuples(index=False)
    }


def stored(run: Path) -> dict:
    return as_dict(load_run(run).telemetry)


def rewind(step: int) -> Event:
    return Event(step=step, kind="rewind")


def test_both_are_sinks(tmp_path: Path) -> None:
    sink = ParquetSink(tmp_path / "telemetry")
    assert isinstance(sink, Sink)
    assert isinstance(MemorySink(), Sink)
    sink.close()
    sink.close()
    with pytest.raises(ValueError, match="after close"):
        sink.write(flush_of(0), [])


@pytest.mark.parametrize("seed", range(6))
def test_random_histories_equal_the_replay(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writes, rewinds, checkpoints and reopenings in random order, with merges forced often."""
    monkeypatch.setattr(parquet_module, "_MERGE_AT", 3)
    dice = random.Random(seed)
    memory = MemorySink()
    folder = tmp_path / "telemetry"
    sink = ParquetSink(folder, rows_per_file=dice.choice([1, 7, 1000]))
    step = 0
    for turn in range(60):
        events = []
        if dice.random() < 0.15:
            step = dice.randrange(step + 1)
            events.append(rewind(step))
            if dice.random() < 0.5:  # a resume: the folder is opened anew
                sink.close()
                sink = ParquetSink(folder, rows_per_file=dice.choice([1, 7, 1000]))
        if dice.random() < 0.2:
            events.append(Event(step=step, kind="checkpoint"))
        samples = flush_of(step, tag=turn * 1000.0) if dice.random() < 0.9 else Samples.of([])
        sink.write(samples, events)
        memory.write(samples, events)
        step += dice.choice([1, 1, 5])
    sink.close()
    assert stored(tmp_path) == as_dict(memory.frame)


def test_what_is_written_is_what_was_seen(tmp_path: Path) -> None:
    """NaN, infinities, the smallest double, and a site beyond ASCII come back bit for bit."""
    values = [np.nan, np.inf, -np.inf, 5e-324, -0.0, 1.7976931348623157e308]
    sink = ParquetSink(tmp_path / "telemetry")
    sink.write(Samples.of((i, KEYS[3], v) for i, v in enumerate(values)), [])
    sink.close()
    series = load_run(tmp_path).series("attention/層.0/ütt/score_max", 0)
    assert series.to_numpy().tobytes() == np.array(values).tobytes()


def test_callers_may_reuse_their_arrays(tmp_path: Path) -> None:
    sink = ParquetSink(tmp_path / "telemetry")
    samples = flush_of(3)
    sink.write(samples, [])
    samples.value[:] = -1
    sink.close()
    assert load_run(tmp_path).series("train/-/loss").loc[3] == 3.0


def test_reopening_without_an_event_supersedes_from_its_first_step(tmp_path: Path) -> None:
    for start, stop, tag in ((0, 10, 0.0), (6, 8, 100.0)):
        sink = ParquetSink(tmp_path / "telemetry")
        for step in range(start, stop):
            sink.write(flush_of(step, tag), [])
        sink.close()
    series = load_run(tmp_path).series("train/-/loss")
    assert series.to_dict() == {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 106, 7: 107}


def test_a_rewind_alone_is_remembered_after_a_kill(tmp_path: Path) -> None:
    """Rewound to 5, killed before anything new was written: steps >= 5 stay dropped."""
    run_killed(
        tmp_path,
        """
        for step in range(10):
            sink.write(flush_of(step), [])
        sink.write(Samples.of([]), [Event(step=5, kind="rewind")])
        wait_until(lambda: len(list_parts(folder)) == 2)
        """,
    )
    assert load_run(tmp_path).series("train/-/loss").index.tolist() == [0, 1, 2, 3, 4]


def test_killed_while_writing_and_resumed(tmp_path: Path) -> None:
    """SIGKILL in full writing, three times over; each resume rewinds. Every step ends with its last history's value."""
    starts = [0, 150, 90]
    for number, start in enumerate(starts):
        process = start_writer(
            tmp_path,
            f"""
            sink.write(Samples.of([]), [Event(step={start}, kind="rewind")] if {number} else [])
            for step in range({start}, 10**9):
                sink.write(flush_of(step, {number} * 1e6), [])
                time.sleep(0.0005)
            """,
            options="rows_per_file=23",
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the writer's own temporary files
            wait_until(partial(newer_than, process, tmp_path, number, start + 100))
        process.send_signal(signal.SIGKILL)
        process.wait()
    # A temporary file that the kill left must not disturb; make sure there is one.
    (tmp_path / "telemetry" / "part-999999.parquet.tmp").write_bytes(b"PAR1 half")
    with pytest.warns(UserWarning, match="half written"):
        series = load_run(tmp_path).series("train/-/loss")
    assert series.index.is_unique
    history = (series.to_numpy() // 1e6).astype(int)
    expected = [max(h for h in history.tolist()) if s >= 90 else 0 for s in series.index]
    assert history.tolist() == expected
    assert series.loc[:89].index.tolist() == list(range(90))
    sink = ParquetSink(tmp_path / "telemetry")  # the next resume clears what the kill left
    sink.close()
    assert not list((tmp_path / "telemetry").glob("*.tmp"))


def newer_than(writer: subprocess.Popen[bytes], run: Path, segment: int, step: int) -> bool:
    """Whether a finished file of the segment holds a step at or after ``step``."""
    assert writer.poll() is None
    try:
        parts = [part for part in list_parts(run / "telemetry") if part.segment == segment]
        return any(max(read_rows(part, ["step"])["step"].to_pylist(), default=-1) >= step for part in parts)
    except FileNotFoundError:  # merged meanwhile
        return False


def test_a_kill_between_merging_and_deleting(tmp_path: Path) -> None:
    """Both the merged file and its sources are there: counted once, and cleared by the next sink."""
    folder = tmp_path / "telemetry"
    sink = ParquetSink(folder, rows_per_file=1)
    sink._remove_replaced = lambda: None  # the kill: nothing is deleted after the merge
    for step in range(5):
        sink.write(flush_of(step), [])
    sink.close()
    assert len(list(folder.glob("*.parquet"))) == 6
    assert [part.level for part in list_parts(folder)] == [1]
    assert len(stored(tmp_path)) == len(load_run(tmp_path).telemetry) == 25
    ParquetSink(folder).close()
    assert len(list(folder.glob("*.parquet"))) == 1


def test_many_flushes_leave_few_files(tmp_path: Path) -> None:
    sink = ParquetSink(tmp_path / "telemetry", rows_per_file=1)
    for step in range(300):
        sink.write(flush_of(step), [])
    sink._queue.put(((Samples.of([])), ()))
    while sink._taken < 300 * len(KEYS) or sink._row_count:
        time.sleep(0.01)
    running = len(list_parts(tmp_path / "telemetry"))
    sink.close()
    assert running <= 2 * 64
    assert len(list_parts(tmp_path / "telemetry")) == 1


def test_size_per_million_values(tmp_path: Path) -> None:
    """The figure in the module's docstring, on a fifth of the values."""
    keys = tuple(
        Key("activation", f"layers.{layer}.{module}", f"statistic_{s}")
        for layer in range(24)
        for module in ("attention", "feed_forward", "norm")
        for s in range(15)
    )
    rng = np.random.default_rng(0)
    walk = np.zeros(len(keys))
    sink = ParquetSink(tmp_path / "telemetry")
    steps = 185
    for step in range(steps):
        walk = 0.95 * walk + 0.3 * rng.normal(size=len(keys))
        value = np.exp(walk).astype(np.float32).astype(np.float64)
        sink.write(Samples(keys, np.full(len(keys), step), np.arange(len(keys), dtype=np.int32), value), [])
    sink.close()
    size = sum(file.stat().st_size for file in (tmp_path / "telemetry").glob("*.parquet"))
    assert size / (steps * len(keys)) < 4.5


# --- what can be wrong outside


def test_two_sinks_in_one_folder(tmp_path: Path) -> None:
    sink = ParquetSink(tmp_path / "telemetry")
    with pytest.raises(InputError, match="being written by another run"):
        ParquetSink(tmp_path / "telemetry")
    sink.close()
    ParquetSink(tmp_path / "telemetry").close()


def test_a_file_stands_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "telemetry").write_text("x")
    with pytest.raises(InputError, match="a file is in the way"):
        ParquetSink(tmp_path / "telemetry")


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "foreign"])
def test_damaged_files_are_named(tmp_path: Path, damage: str) -> None:
    sink = ParquetSink(tmp_path / "telemetry")
    sink.write(flush_of(0), [])
    sink.close()
    (file,) = (tmp_path / "telemetry").glob("*.parquet")
    content = bytearray(file.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "empty":
        content = bytearray()
    elif damage == "flipped":  # one bit of the last column's page: its checksum no longer fits
        column = pq.read_metadata(file).row_group(0).column(5)
        content[column.data_page_offset + column.total_compressed_size - 1] ^= 1
    else:
        pq.write_table(pq.read_table(file).select(["step", "value"]), file)
        content = bytearray(file.read_bytes())
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"part-000000\.parquet is not a complete telemetry file"):
        load_run(tmp_path).telemetry  # noqa: B018


def test_a_full_disk_delays_rows_and_the_error_says_which(tmp_path: Path) -> None:
    """A file size limit stands in for the full disk: the error names the steps, and once there is room all are written."""

    def full() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))

    script = writer_script(
        tmp_path,
        """
        sink.write(flush_of(1), [])
        wait_until(lambda: not sink._errors.empty())
        try:
            sink.write(flush_of(2), [])
        except OSError as error:
            print(error)
        wait_until(lambda: not sink._errors.empty())
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        try:
            sink.write(flush_of(3), [])
        except OSError as error:
            print(error)
        sink.close()
        """,
        options="rows_per_file=1",
    )
    out = subprocess.run(
        [sys.executable, "-c", script],
        preexec_fn=full,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert out.returncode == 0, out.stderr
    first, second = out.stdout.splitlines()
    assert "5 rows of telemetry (steps 1 to 1) are held until they can be written: File too large" in first
    assert "10 rows of telemetry (steps 1 to 2) are held" in second
    assert load_run(tmp_path).series("train/-/loss").to_dict() == {1: 1.0, 2: 2.0, 3: 3.0}
    assert not list((tmp_path / "telemetry").glob("*.tmp"))


def test_forgotten_close_still_writes(tmp_path: Path) -> None:
    script = writer_script(tmp_path, "sink.write(flush_of(1), [])\nraise SystemExit(0)")
    subprocess.run([sys.executable, "-c", script], check=True, timeout=PATIENCE)
    assert load_run(tmp_path).series("train/-/loss").to_dict() == {1: 1.0}


# --- writing from another process


def writer_script(run: Path, body: str, options: str = "") -> str:
    head = f"""
    import sys, time
    sys.path[:0] = {[str(Path(__file__).parents[3])]!r}
    from pathlib import Path
    from stabilitylab.sinks import ParquetSink
    from stabilitylab.runs.parts import list_parts
    from stabilitylab.telemetry import Event, Samples
    from tests.patience import wait_until
    from tests.stabilitylab.sinks.test_parquet import flush_of
    folder = Path({str(run / "telemetry")!r})
    sink = ParquetSink(folder, {options})
    """
    return textwrap.dedent(head) + textwrap.dedent(body)


def start_writer(run: Path, body: str, options: str = "") -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", writer_script(run, body, options)])


def run_killed(run: Path, body: str, options: str = "") -> None:
    """Run to the end of the body, then die without a word."""
    script = writer_script(run, body, options) + "\nimport os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n"
    assert (
        subprocess.run([sys.executable, "-c", script], timeout=PATIENCE, check=False).returncode
        == -signal.SIGKILL
    )
