"""CSV, tables in text, compressed files, and refusals of what is neither."""

import gzip
import lzma

import pytest
import zstandard

from stabilitylab.errors import InputError
from stabilitylab.logs.log import RowBlock
from stabilitylab.logs.recognise import open_logs
from stabilitylab.telemetry import LOSS
from tests.stabilitylab.logs.told import losses, many


def test_a_csv_of_several_runs(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text(
        "run_id,key,value,step\n" + "".join(f"{r},loss,3.0,{k}\n" for r in "ab" for k in range(4))
    )
    assert [log.name for log in open_logs([path])] == ["a", "b"]
    path.write_text("step,rank,loss\n" + "".join(f"{k},{r},3.0\n" for k in range(4) for r in range(2)))
    assert [log.name for log in open_logs([path])] == ["rank 0", "rank 1"]


@pytest.mark.parametrize(
    "text",
    [
        "| step | loss | lr |\n|---|:--|---|\n" + many("| {k} | {x:.2f} | 1e-4 |"),
        "# step loss lr\n" + many("{k:5d}  {x:.6f}   1e-4"),
        "step   loss    lr\n" + many("{k:5d}  {x:.6f}   1e-4"),
        "metric,step,value\n" + many("loss,{k},{x}\nlr,{k},0.0001"),
        "["
        + many('{{"step": {k}, "train": {{"loss": {x}, "lr": 1e-4}}, "val": {{"loss": 9.0}}}},').rstrip(",\n")
        + "]",
    ],
)
def test_other_tables(tmp_path, text):
    path = tmp_path / "log.txt"
    path.write_text(text)
    log, steps, values = losses(path)
    assert steps == [1, 2, 3, 4, 5]
    assert values == pytest.approx([8.9, 8.8, 8.7, 8.6, 8.5])
    assert len(log.columns) == 3


CSVS = [
    ("epoch,loss\n0,3\n1,2\nepoch,loss\n2,1\n", [0, 1, 2], 1),  # appended
    ("step,loss\n0,3\nstep,val_loss,loss\n1,,2\n2,,1\n", [0, 1, 2], 1),  # a column more
    ("# started\nstep,loss\n0,3\n1,2\n2,1\n", [0, 1, 2], 1),
    ("step;loss\n0;3,5\n1;2,5\n2;1,5\n", [0, 1, 2], 0),
    ("  step , train/loss \n 0, 3\n 1, 2\n 2, 1\n", [0, 1, 2], 0),
    ("step,loss\n0,3\n1,2,9\n1,2\n2,1\n", [0, 1, 2], 1),
]


@pytest.mark.parametrize(("text", "steps", "left_out"), CSVS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_odd_csv(tmp_path, text, steps, left_out, encoding):
    path = tmp_path / "log.csv"
    path.write_bytes(text.encode(encoding))
    log, found, _ = losses(path)
    assert found == steps
    assert sum(log.left_out.values()) == left_out


def test_csv_without_a_header_says_so(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("0,3\n1,2\n")
    with pytest.raises(InputError, match="has no header"):
        open_logs([path])


def test_wandb_panels_lightning_and_yolo(tmp_path):
    path = tmp_path / "panel.csv"
    path.write_text('"Step","a - train/loss","a - train/loss__MIN","b - train/loss"\n0,3,2,4\n1,2,1,3\n')
    assert [log.name for log in open_logs([path])] == ["a", "b"]
    assert [log.name for log in open_logs([path], run="b")] == ["b"]
    path.write_text("epoch,step,train_loss_epoch,train_loss_step\n0,0,,3\n0,1,,2\n0,1,2.5,\n")
    assert losses(path)[0].columns[LOSS] == "train_loss_step"
    path.write_text(" epoch, train/box_loss, train/cls_loss, val/box_loss\n 0, 1, 2, 9\n 1, 1, 1, 9\n")
    assert losses(path)[1:] == ([0, 1], [3.0, 2.0])


@pytest.mark.parametrize(
    ("header", "chosen"),
    [
        ("step,loss,aux_loss,total_loss", "total_loss"),
        ("step,loss,load_balance_loss,loss_total", "loss_total"),
        (
            "step,loss,avg_loss,total_loss",
            "loss",
        ),  # the sum since the epoch began, whose mean stands beside it
    ],
)
def test_a_total_beside_its_parts(tmp_path, header, chosen):
    path = tmp_path / "log.csv"
    path.write_text(f"{header}\n" + "".join(f"{k},{3 - k / 10},0.1,{3.1 - k / 10}\n" for k in range(9)))
    assert losses(path)[0].columns[LOSS] == chosen


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress, zstandard.compress])
def test_compressed_and_several_files(tmp_path, pack):
    (tmp_path / "log.1").write_bytes(pack(many("iter {k}: loss {x}").encode()))
    (tmp_path / "log.2").write_text("iter 6: loss 2.0\niter 7: loss 2.0\niter 8: loss 1.9\n")
    (log,) = open_logs([tmp_path / "log.1", tmp_path / "log.2"])
    assert RowBlock.concatenate(list(log.blocks())).steps.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


def test_what_the_refusal_suggests_works(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("step,val loss,val_loss_b\n0,3,3\n1,2,2\n")
    with pytest.raises(InputError, match="validation losses only") as refusal:
        open_logs([path])
    assert "--loss 'val loss'" in str(refusal.value)
    assert losses(path, loss="val loss")[2] == [3, 2]
    (tmp_path / "x.bin").write_bytes(bytes(range(256)) * 40)
    with pytest.raises(InputError, match="is a binary file"):
        open_logs([tmp_path / "x.bin"])
