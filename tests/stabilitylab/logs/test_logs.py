"""``stabilitylab spikes LOG`` on every kind of log, and on every kind of bad one. Files are real files."""

import gzip
import json
import math

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tensorboard.compat.proto.event_pb2 import Event as ProtoEvent
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from stabilitylab.errors import InputError
from stabilitylab.logs.columns import choose_columns
from stabilitylab.logs.recognise import open_log
from stabilitylab.spikes import find_episodes
from stabilitylab.spikes.commands import spikes
from stabilitylab.spikes.log_scan import Outline, scan_log
from tests.stabilitylab.spikes.curves import bump, falling


@pytest.fixture(scope="module")
def curve():
    """A curve with a spike at 700 and two non-finite values, and the episodes in it."""
    values = falling(1200)
    bump(values, 700, 1.0)
    values[1000:1002] = math.nan
    episodes = find_episodes(None, values)
    assert [e.kind for e in episodes] == ["spike", "non-finite"]
    return values, episodes


def found(path, capsys, **options):
    spikes((path,), json=True, **options)
    return json.loads(capsys.readouterr().out)


def rows(values):
    return "".join(f"{i},{x!r}\n" for i, x in enumerate(values.tolist()))


def expected(episodes, signal="loss"):
    return [episode.to_json() | {"signal": signal} for episode in episodes]


# ------------------------------------------------------------------------------------------------ each format


@pytest.mark.parametrize("name", ["log.csv", "log.txt", "log"])
def test_csv(tmp_path, capsys, curve, name):
    path = tmp_path / name
    path.write_text("step,loss\n" + rows(curve[0]))
    assert found(path, capsys) == expected(curve[1])


def test_semicolons_compression_and_quotes(tmp_path, capsys, curve):
    path = tmp_path / "log.csv.gz"
    text = '"Step";"train/loss";"note"\n' + rows(curve[0]).replace(",", ";").replace("\n", ';"a; b"\n')
    path.write_bytes(gzip.compress(text.encode()))
    assert found(path, capsys) == expected(curve[1], "train/loss")


def test_jsonl_with_lines_of_other_kinds(tmp_path, capsys, curve):
    path = tmp_path / "log.jsonl"
    lines = []
    for i, x in enumerate(curve[0].tolist()):
        lines.append(json.dumps({"global_step": i, "loss": x, "text": "words"}))
        if i % 100 == 0:
            lines.append(json.dumps({"global_step": i, "eval_loss": 99.0}))
    path.write_text("\n".join(lines) + '\n{"global_step": 1200, "lo')  # cut short by a kill
    assert found(path, capsys) == expected(curve[1])


def test_parquet(tmp_path, capsys, curve):
    path = tmp_path / "log.parquet"
    table = {"iteration": pa.array(range(1200), pa.int32()), "lm loss": pa.array(curve[0], pa.float32())}
    pq.write_table(pa.table(table), path)
    (spike, broken) = found(path, capsys)
    assert (spike["kind"], spike["onset"], spike["signal"]) == ("spike", 700, "lm loss")
    assert (broken["kind"], broken["onset"], broken["end"]) == ("non-finite", 1000, 1001)


def write_events(folder, tags, values):
    writer = EventFileWriter(str(folder))
    for i, row in enumerate(values):
        for tag, value in zip(tags, row, strict=True):
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
            writer.add_event(ProtoEvent(step=i, wall_time=float(i), summary=summary))
    writer.close()


def test_tensorboard_file_and_folder(tmp_path, capsys, curve):
    tags = ("train/grad_norm", "train/loss")
    write_events(tmp_path / "a" / "b", tags, [(1.0, x) for x in curve[0].tolist()])
    from_folder = found(tmp_path / "a", capsys)
    assert [(e["kind"], e["onset"], e["end"]) for e in from_folder] == [
        (e.kind, e.onset, e.end) for e in curve[1]
    ]
    (file,) = (tmp_path / "a" / "b").iterdir()
    assert found(file, capsys) == from_folder


def test_run_folder(tmp_path, capsys, curve):
    from stabilitylab.sinks import ParquetSink
    from stabilitylab.telemetry import Key, Samples

    sink = ParquetSink(tmp_path / "run" / "telemetry")
    keys = [Key("train", "-", "loss"), Key("train", "-", "gradient_norm")]
    sink.write(
        Samples.of([(i, k, x if k is keys[0] else 1.0) for i, x in enumerate(curve[0]) for k in keys]), []
    )
    sink.close()
    assert found(tmp_path / "run", capsys) == expected(curve[1], "train/-/loss")


def test_companions_are_used(tmp_path, capsys):
    values = falling(1200)
    values[904] += 2.0
    norms = np.full(1200, 0.3)
    norms[900:905] = [2, 4, 8, 16, 32]
    path = tmp_path / "log.csv"
    pd.DataFrame({"iter": range(1200), "loss": values, "grad_norm": norms}).to_csv(path, index=False)
    (one,) = found(path, capsys)  # the norm's own excursion is the same event
    # One step wide, but the gradient was ahead of it: told when that had been out for three values.
    assert (one["kind"], one["onset"], one["signal"], one["told"]) == ("spike", 904, "loss", 902)
    assert one["precursors"] == {"grad_norm": 4}


# ------------------------------------------------------------------------------------- table, picture


def test_table_and_picture(tmp_path, capsys, curve):
    path, picture = tmp_path / "log.csv", tmp_path / "log.png"
    path.write_text("step,loss\n" + rows(curve[0]))
    spikes((path,), plot=picture)
    out = capsys.readouterr().out
    assert "1 spike, 1 non-finite in 1,200 loss values" in out
    assert "700" in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="must end in"):
        spikes((path,), plot=tmp_path / "log.bmp")
    with pytest.raises(InputError, match="No such file or directory; choose another place"):
        spikes((path,), plot=tmp_path / "nowhere" / "log.png")


def test_an_outline_keeps_every_extreme():
    steps, values = np.arange(100_001), np.random.default_rng(0).standard_normal(100_001)
    outline = Outline(most=256)
    for piece in np.array_split(np.arange(100_001), 37):
        outline.add(steps[piece], values[piece])
    at, low, high = outline.curve()
    assert len(at) <= 2 * 256 + 1024
    assert (low.min(), high.max()) == (values.min(), values.max())
    assert (np.diff(at) >= 0).all()


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("step,loss\n", "holds no values"),
        ("step,loss\n1,\n2,\n", "holds no values"),
        ("step,accuracy,lr\n1,0.5,1e-3\n", "no loss column: its columns are 'step', 'accuracy', 'lr'"),
        ("step,loss_a,loss_b\n1,1,1\n", "several loss columns: 'loss_a', 'loss_b'"),
        ("step,eval_loss\n1,1\n", "no loss column"),
        ("step,loss\n1,2.5\n2,abc\n", "row 2: 'abc' is not a number"),
        ("step,loss\none,2.5\n", "row 1: 'one' is not a number"),
        ("step,loss\n0.5,2.5\n", "holds 0.5: steps are whole numbers"),
    ],
)
def test_bad_csv(tmp_path, content, message):
    path = tmp_path / "log.csv"
    path.write_text(content)
    with pytest.raises(InputError) as refusal:
        spikes((path,))
    assert message in str(refusal.value)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]\n", "no JSON object"),
        ('{"step": 1}\nnonsense\n{"loss": 2}\n', "line 2 is not JSON"),
        ('{"step": 1, "loss": "high"}\n', "'high' is not a number"),
        ('{"step": 1, "loss": null}\n', "holds no values"),
        ("\n", "is empty"),
    ],
)
def test_bad_jsonl(tmp_path, content, message):
    path = tmp_path / "log.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        spikes((path,))


def test_bad_parquet_tensorboard_and_folders(tmp_path):
    bad = tmp_path / "log.parquet"
    bad.write_bytes(b"PAR1 and nothing more")
    with pytest.raises(InputError, match="not a whole Parquet file"):
        spikes((bad,))
    pq.write_table(pa.table({"loss": [["a"], ["b"]]}), bad)
    with pytest.raises(InputError, match="is not a number"):
        spikes((bad,))
    events = tmp_path / "events.out.tfevents.1"
    events.write_bytes(b"not a record")
    with pytest.raises(InputError, match=r"no scalars|not a TensorBoard"):
        spikes((events,))
    with pytest.raises(InputError, match="neither a run folder"):
        spikes((make(tmp_path / "empty"),))
    with pytest.raises(InputError, match="no such file"):
        spikes((tmp_path / "missing.csv",))


def make(folder):
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("values", "kinds"),
    [([2.0], []), ([2.0] * 500, []), ([math.nan] * 500, ["non-finite"]), ([math.inf], ["non-finite"])],
)
def test_short_constant_and_all_nan_logs_are_read(tmp_path, capsys, values, kinds):
    path = tmp_path / "log.csv"
    path.write_text("step,loss\n" + "".join(f"{i},{x}\n" for i, x in enumerate(values)))
    assert [e["kind"] for e in found(path, capsys)] == kinds


@pytest.mark.parametrize("order", ["shuffled", "newest first"])
def test_a_log_out_of_order_is_sorted(tmp_path, capsys, curve, order):
    lines = rows(curve[0]).splitlines(keepends=True)
    lines = lines[::-1] if order == "newest first" else np.random.default_rng(0).permutation(lines).tolist()
    path = tmp_path / "log.csv"
    path.write_text("step,loss\n" + "".join(lines))
    assert found(path, capsys) == expected(curve[1])
    spikes((path,))
    assert "has been sorted" in capsys.readouterr().out


def test_restarts_are_no_disorder_and_duplicates_do_no_harm(tmp_path, curve):
    lines = rows(curve[0]).splitlines(keepends=True)
    path = tmp_path / "log.csv"
    path.write_text("step,loss\n" + "".join(lines[:400] + lines[300:] + lines[-1:]))
    scan = scan_log(open_log(path))
    assert not scan.sorted
    assert [(e.kind, e.onset) for e in scan.episodes] == [("spike", 700), ("non-finite", 1000)]


def test_a_short_excerpt_of_several_restarts_is_not_sorted(tmp_path, capsys):
    path = tmp_path / "log.csv"
    losses = [3.1, 3.0, 3.05, 7.5, 3.2, 3.15, 3.1, 3.0, 7.9, 3.1, 3.1, 3.0]
    steps = [50, 51, 52, 53, 40, 41, 42, 43, 44, 30, 31, 32]
    path.write_text("step,loss\n" + "".join(f"{s},{x}\n" for s, x in zip(steps, losses, strict=True)))
    # Each time the run was taken back while its loss was up: found worth it by someone, so no hard batch.
    assert [(e["kind"], e["onset"]) for e in found(path, capsys)] == [("spike", 44), ("spike", 53)]


def test_a_log_without_steps_and_with_gaps(tmp_path, capsys, curve):
    path = tmp_path / "log.csv"
    path.write_text("loss,other\n" + "".join(f"{x},1\n" for x in curve[0].tolist()))
    assert found(path, capsys) == expected(curve[1])
    spikes((path,))
    assert "steps are row numbers" in capsys.readouterr().out
    path.write_text(
        "step,loss,eval_loss\n" + "".join(f"{i},{x},\n{i},,3\n" for i, x in enumerate(curve[0].tolist()))
    )
    assert found(path, capsys) == expected(curve[1])


def test_lines_cut_short_or_run_together_are_left_out(tmp_path, capsys, curve):
    path = tmp_path / "log.csv"
    path.write_text("step,loss\n" + rows(curve[0])[:-20] + "\n7,8,9\n12")
    assert found(path, capsys) == expected(curve[1])


def test_the_wanted_columns_can_be_named(tmp_path, capsys, curve):
    path = tmp_path / "log.csv"
    path.write_text(
        "when,loss_a,loss_b\n" + "".join(f"{i},1.0,{x}\n" for i, x in enumerate(curve[0].tolist()))
    )
    assert found(path, capsys, loss="loss_b", step="when") == expected(curve[1], "loss_b")
    with pytest.raises(InputError, match="no column 'loss_c'"):
        spikes((path,), loss="loss_c")


def test_long_logs_are_read_in_small_blocks(tmp_path):
    path = tmp_path / "log.csv"
    with path.open("w") as file:
        file.write("step,loss,text\n")
        file.writelines(f"{i},2.0,{'x' * 200}\n" for i in range(100_000))
    blocks = list(open_log(path).blocks())
    assert sum(map(len, blocks)) == 100_000
    assert max(map(len, blocks)) < 25_000  # of 21 MB, 4 MiB at a time


@pytest.mark.parametrize(
    ("names", "loss"),
    [
        (["Step", "Loss"], "Loss"),
        (["step", "train/loss", "eval/loss"], "train/loss"),
        (["iteration", "lm loss", "lm loss validation", "loss-scale"], "lm loss"),
        (["step", "my_loss", "loss_scale", "valid_loss"], "my_loss"),
        (["train/-/loss", "precision/-/loss_scale", "step"], "train/-/loss"),
    ],
)
def test_the_loss_column_is_recognised(tmp_path, names, loss):
    assert choose_columns(names, source=tmp_path)["train/-/loss"] == loss
