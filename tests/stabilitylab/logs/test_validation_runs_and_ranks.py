"""Rows and lines of validation, of several runs or of several ranks, that only a word or a number beside them tells apart."""

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from stabilitylab.logs.recognise import open_logs
from tests.stabilitylab.logs.told import losses


@pytest.mark.parametrize("column", ["phase", "Split", "mode"])
def test_a_column_of_words_tells_a_tables_validation(tmp_path, column):
    rows = [(k, word, 9 - k / 10 + 5 * (word != "train")) for k in range(1, 6) for word in ("train", "val")]
    table = f"step,{column},loss\n" + "".join(f"{k},{word},{x}\n" for k, word, x in rows)
    (tmp_path / "a.csv").write_text(table)
    arrow = pa.table({name: [row[i] for row in rows] for i, name in enumerate(("step", column, "loss"))})
    pyarrow.parquet.write_table(arrow, tmp_path / "a.parquet")
    pyarrow.feather.write_feather(arrow, str(tmp_path / "a.feather"))
    for name in ("a.csv", "a.parquet", "a.feather"):
        log, steps, values = losses(tmp_path / name)
        assert (steps, values) == ([1, 2, 3, 4, 5], pytest.approx([8.9, 8.8, 8.7, 8.6, 8.5]))
        assert log.left_out == {"rows of validation": 5}


def test_parquet_of_runs_and_of_one_value_a_row(tmp_path):
    rows = [(run, name, k, 3.0 - k / 10) for k in range(4) for run in "ab" for name in ("train/loss", "lr")]
    arrow = pa.table(
        {name: [row[i] for row in rows] for i, name in enumerate(("run", "metric", "step", "value"))}
    )
    pyarrow.parquet.write_table(arrow, tmp_path / "a.parquet")
    logs = open_logs([tmp_path / "a.parquet"])
    assert [log.name for log in logs] == ["a", "b"]
    assert logs[0].columns["train/-/loss"] == "train/loss"
    assert losses(tmp_path / "a.parquet", run="b")[1:] == ([0, 1, 2, 3], [3.0, 2.9, 2.8, 2.7])


@pytest.mark.parametrize(
    "line",
    [
        "[rank {r}/4] step {k} loss {x:.4f}",
        "12:00:00 | rank {r} | step {k} loss {x:.4f}",
        "[GPU{r}] step {k} loss {x:.4f}",
        "12:00:00 (worker {r}/4) step {k} loss {x:.4f}",
        "local_rank: {r}, step {k} loss {x:.4f}",
        "rank_{r}: step {k} loss {x:.4f}",
        "[R{r}] step {k} loss {x:.4f}",
        "<rank {r}> step {k} loss {x:.4f}",
        "process {r}: step {k} loss {x:.4f}",
        "2025-01-01 12:00:00 - rank {r} - step {k} loss {x:.4f}",
        "step {k} loss {x:.4f} rank={r}",
        "[GPU{r}] {{'loss': {x:.4f}, 'step': {k}}}",
        '[R{r}] {{"step": {k}, "loss": {x:.4f}}}',
        '2025-01-01 12:00:00 rank {r} | {{"step": {k}, "loss": {x:.4f}}}',
        "2023-01-01 12:00:00,123 INFO [train.py:912] ({r}/4) Epoch 1, batch {k}, loss[loss={x:.4g}, over 12.00 frames. ], "
        "tot_loss[loss=9.9, over 123.00 frames. ], batch size: 50, lr: 2.25e-02",
    ],
)
def test_how_lines_name_their_rank(tmp_path, line):
    (path := tmp_path / "a.log").write_text(
        "".join(line.format(r=r, k=k, x=9 - k / 10 + r) + "\n" for k in range(1, 9) for r in range(4))
    )
    assert [log.name for log in open_logs([path])] == ["rank 0", "rank 1", "rank 2", "rank 3"]
    assert losses(path, run="rank 2")[1:] == (
        list(range(1, 9)),
        pytest.approx([11 - k / 10 for k in range(1, 9)]),
    )


def test_a_place_in_brackets_is_no_rank(tmp_path):
    (path := tmp_path / "a.log").write_text(
        "".join(f"[train.py:12] ({k}/40) loss {9 - k / 10:.4f}\n" for k in range(1, 9))
    )
    assert losses(path)[1] == list(range(1, 9))
