"""Lines and files of trainers that docs/logs.md names, in versions and settings that print differently."""

import json
import math
import sqlite3

import pytest

from stabilitylab.errors import InputError
from tests.stabilitylab.logs.told import losses, many, said

MEGATRON = (
    " iteration {k:8d}/ 100 | learning rate: 1.0E-04 |{loss} mtp_1 loss: 5.4E+00 | loss scale: 1.0 | grad norm: 1.2 |"
    " number of skipped iterations: {skipped:3d} | number of nan iterations:   0 |"
)
YOLO_TEXT = (
    "      {k}/299     4.91G    {x:.4f}    1.0000    0.5000   {total:.4f}        13       640"
    "       0.1       0.2     .3  .4  .05  .04  .03"
)
FAIRSEQ = (
    "| epoch 00{k}    100 / 1000 loss={x:.2f} (9.99), wps=12345, wpb= 4000, lr=0.25, clip= 10%, gnorm=1.2345"
)


def test_a_loss_that_megatron_leaves_out_is_nan_beside_one_of_further_tokens(tmp_path):
    """``mtp_1 loss`` goes on where ``lm loss`` is NaN; a skipped window has no loss."""
    lines = [
        MEGATRON.format(k=k, loss="" if k in (4, 6) else f" lm loss: {9 - k}.0E+00 |", skipped=k == 6)
        for k in range(1, 8)
    ]
    (path := tmp_path / "a.log").write_text("\n".join(lines))
    log, steps, values = losses(path)
    assert log.columns["train/-/loss"] == "lm loss"
    assert math.isnan(values[3])
    assert steps == list(range(1, 8))
    assert values[:3] + values[4:] == [8, 7, 6, 4, 2]


def test_deepspeeds_console_holds_the_rate_and_the_scale(tmp_path, capsys):
    overflow = (
        "[deepspeed] OVERFLOW! Rank 0 Skipping step. Attempted loss scale: 65536, reducing to 32768.0\n"
    )
    line = (
        "[INFO] [logging.py:60:log_dist] [Rank 0] step={k}, skipped=0, lr=[0.001, 0.002], mom=[(0.9, 0.9)]\n"
    )
    line += "steps: {k} loss: {x:.4f} iter time (s): 1.234 samples/sec: 25.931"
    (path := tmp_path / "a.log").write_text(many(line, 3) + overflow + many(line, 9)[len(many(line, 3)) :])
    (segment,) = said(capsys, path)["segments"]
    assert (segment["values"], segment["first_step"], segment["last_step"]) == (9, 1, 9)
    assert {"learning_rate", "loss_scale", "skipped"} < {*segment["signals"]}


@pytest.mark.parametrize("line", [FAIRSEQ, FAIRSEQ.replace("    100", ":    100").replace(" (9.99)", "")])
def test_fairseq_before_it_counted_updates(tmp_path, line):
    (path := tmp_path / "a.log").write_text(
        many(line) + "| epoch 005 | train loss 9.99 | train ppl 1010.12\n"
    )
    log, steps, values = losses(path)
    assert log.format == "fairseq"
    assert steps == [100, 1100, 2100, 3100, 4100]
    assert values == [8.9, 8.8, 8.7, 8.6, 8.5]
    assert "train/-/gradient_norm" in log.columns


def test_yolos_results_txt_has_no_header(tmp_path):
    rows = [YOLO_TEXT.format(k=k, x=3 - k / 10, total=4.5 - k / 10) for k in range(6)]
    (path := tmp_path / "results.txt").write_text("\n".join(rows))
    _, steps, values = losses(path)
    assert steps == list(range(6))
    assert values == pytest.approx([4.5, 4.4, 4.3, 4.2, 4.1, 4.0])


def test_rt_detrs_parts_are_summed_too(tmp_path):
    head = "epoch,time,train/giou_loss,train/cls_loss,train/l1_loss,val/giou_loss,lr/pg0\n"
    (path := tmp_path / "results.csv").write_text(head + many("{k},1.2,{x:.1f},1,2,9,0.1"))
    assert losses(path)[2] == pytest.approx([11.9, 11.8, 11.7, 11.6, 11.5])


def test_xtuners_loss_is_the_one_of_all_ranks(tmp_path):
    line = "[XTuner][RANK 0][INFO] Epoch 1 Step {k}/240 data_time: 0.01 lr: 1.0e-05 time: 1.2 "
    line += "reduced_llm_loss: {x:.4f}, local_loss: 9.99 grad_norm: 1.2"
    (path := tmp_path / "a.log").write_text(many(line))
    assert losses(path)[1:] == ([1, 2, 3, 4, 5], [8.9, 8.8, 8.7, 8.6, 8.5])


def test_several_runs_in_a_folder_are_told_apart(tmp_path, capsys):
    """YOLO's exp, exp2, exp10; MMEngine's one folder for each start. The command names an empty one."""
    for name, x in (("exp", 3), ("exp2", 2), ("exp10", 1)):
        (file := tmp_path / "train" / name / "results.csv").parent.mkdir(parents=True)
        file.write_text(
            "epoch,train/box_loss,train/cls_loss,lr/pg0\n" + "".join(f"{k},{x},{x},.1\n" for k in range(3))
        )
    (empty := tmp_path / "train" / "exp3" / "results.csv").parent.mkdir()
    empty.write_text("\n")
    told = said(capsys, tmp_path / "train")
    assert [segment["name"] for segment in told["segments"]] == ["exp", "exp2", "exp10"]
    assert told["left_out"] == [{"reason": "runs that cannot be read: exp3", "count": 1}]
    for stamp in ("20260102_030405", "20260103_030405"):
        (file := tmp_path / "work" / stamp / "vis_data" / "scalars.json").parent.mkdir(parents=True)
        file.write_text(many('{{"lr": 0.1, "loss": {x}, "step": {k}}}'))
    told = said(capsys, tmp_path / "work")
    assert [(s["name"], s["values"]) for s in told["segments"]] == [
        ("20260102_030405", 5),
        ("20260103_030405", 5),
    ]


def test_a_store_of_before_there_were_steps(tmp_path):
    """MLflow before 1.0 wrote ``timestamp value``."""
    (folder := tmp_path / "mlruns" / "0" / "run" / "metrics").mkdir(parents=True)
    (folder / "loss").write_text("1 3.0\n2 2.5\n3 2.0\n")
    assert losses(tmp_path / "mlruns")[1:] == ([0, 1, 2], [3.0, 2.5, 2.0])


def test_lightnings_norm_of_all_gradients(tmp_path):
    head = "epoch,grad_2.0_norm/layer.0,grad_2.0_norm/layer.1,grad_2.0_norm_total,step,train_loss\n"
    (path := tmp_path / "metrics.csv").write_text(head + many("0,1,1,1.4,{k},{x:.1f}"))
    assert losses(path)[0].columns["train/-/gradient_norm"] == "grad_2.0_norm_total"


BAR = "  4%|4         | {}/48 [00:00<00:02, 18.02it/s]\n"


@pytest.mark.parametrize("interval", [2, 4])
def test_the_bar_below_a_printed_record_tells_its_step(tmp_path, interval):
    """tqdm draws anew below what it writes; above, it was last drawn up to a tenth of a second ago (transformers 5.23)."""
    steps = range(interval, 49, interval)
    record = "                       \n{{'loss': '{}', 'grad_norm': '1.2', 'epoch': '0.1'}}\n\n"
    text = BAR.format(0) + "".join(
        (BAR.format(step - 1) if step % 8 else "") + record.format(9 - step / 10) + BAR.format(step)
        for step in steps
    )
    (path := tmp_path / "a.log").write_text(text)
    assert losses(path)[1:] == (list(steps), pytest.approx([9 - step / 10 for step in steps]))


def test_bars_that_the_next_step_draws_stand_above_their_record(tmp_path):
    (path := tmp_path / "a.log").write_text(
        "".join(BAR.format(k) + f"{{'loss': {9 - k / 10}, 'epoch': 0.1}}\n" for k in range(1, 6))
    )
    assert losses(path)[1] == [1, 2, 3, 4, 5]


def test_of_keras_bars_the_last_of_each_epoch_counts(tmp_path):
    bar = "\x1b[1m{}/8\x1b[0m \x1b[32m━━\x1b[0m\x1b[37m━━\x1b[0m \x1b[1m0s\x1b[0m 50ms/step - loss: {} - mae: 1.2"
    text = "".join(
        f"Epoch {k}/4\n\n{bar.format(1, 9.9)}"
        + "\b" * 60
        + f"\n{bar.format(8, 5 - k)} - val_loss: 1.5 - learning_rate: 0.1\n"
        for k in range(1, 5)
    )
    (path := tmp_path / "a.log").write_text(text)
    log, steps, values = losses(path)
    assert log.format == "Keras"
    assert (steps, values) == ([1, 2, 3, 4], [4, 3, 2, 1])


def test_swanlab_kept_json_in_its_file(tmp_path):
    """0.6: LevelDB's blocks around JSON; a NaN is a word."""

    def record(key, step, value):
        data = {"metric": {"index": step, "data": value}, "key": key, "step": step, "epoch": 1}
        body = json.dumps({"model_type": "Scalar", "data": data}).encode()
        return bytes(4) + len(body).to_bytes(2, "little") + b"\x01" + body

    (path := tmp_path / "run-1" / "backup.swanlab").parent.mkdir()
    rows = [(0, 3.0), (5, "NaN"), (10, 2.0)]
    path.write_bytes(
        b":SWL"
        + bytes(3)
        + b"".join(record("train/loss", *row) + record("train/lr", row[0], 0.1) for row in rows)
    )
    log, steps, values = losses(tmp_path)
    assert (steps, values[0], values[2]) == ([0, 5, 10], 3.0, 2.0)
    assert math.isnan(values[1])
    assert "train/-/learning_rate" in log.columns


def test_yolov5s_padded_header_names_a_range(tmp_path):
    names = ["epoch", "train/box_loss", "train/obj_loss", "metrics/mAP_0.5:0.95", "val/box_loss", "x/lr0"]
    lines = [names, *([str(k), str(3 - k / 10), "1", ".1", "9", ".1"] for k in range(6))]
    (path := tmp_path / "results.csv").write_text(
        "\n".join(",".join(f"{c:>20}" for c in line) for line in lines)
    )
    assert losses(path)[2] == pytest.approx([4 - k / 10 for k in range(6)])


@pytest.mark.parametrize("norm", ["np.float64(1.2)", "tensor(1.2, device='cuda:0')", "'1.2'"])
def test_printed_norms_that_are_no_plain_numbers(tmp_path, norm):
    stamp = "2026-01-02 03:04:05 "
    record = "{{'loss': {}, 'grad_norm': {}, 'learning_rate': 0.1, 'epoch': 0.1}}\n"
    text = "".join(stamp + record.format(9 - k, norm) + stamp + BAR.format(k * 5) for k in range(1, 7))
    (path := tmp_path / "a.log").write_text(text)
    log, steps, values = losses(path)
    assert (steps, values) == ([5, 10, 15, 20, 25, 30], [8, 7, 6, 5, 4, 3])
    assert "train/-/gradient_norm" in log.columns
    assert "train/-/learning_rate" in log.columns


def test_richs_bar_is_a_place_in_the_epoch(tmp_path):
    line = "Epoch {e}/2 ━━━━━━ {k}/80 0:00:04 • 0:00:00 9.91it/s v_num: 0.000 train_loss: {x}\n"
    (path := tmp_path / "a.log").write_text(
        "".join(line.format(e=e, k=k, x=9 - e - k / 80) for e in range(3) for k in (40, 80))
    )
    assert losses(path)[1] == [40, 80, 120, 160, 200, 240]


def test_a_resumed_trainers_bars_fall_back(tmp_path):
    steps = [*range(10, 210, 10), *range(160, 260, 10)]
    text = "".join(f"{{'loss': {9 - s / 100}, 'epoch': 0.1}}\n" + BAR.format(s) for s in steps)
    (path := tmp_path / "a.log").write_text(text)
    assert losses(path)[1] == steps


def test_trackios_own_step_counts_calls(tmp_path):
    """Beside it a Trainer logs its updates."""
    database = sqlite3.connect(path := tmp_path / "lab.db")
    database.execute(
        "create table metrics (id integer, timestamp text, run_name text, step integer, metrics text)"
    )
    for k in range(6):
        metrics = {"train/loss": 3 - k / 10, "train/global_step": 5 * (k + 1), "train/epoch": 0.1}
        database.execute("insert into metrics values (?, '', 'a', ?, ?)", (k, k, json.dumps(metrics)))
    database.commit()
    database.close()
    assert losses(path)[1] == [5, 10, 15, 20, 25, 30]


def test_a_counter_comes_before_the_calls_that_wandb_counts(tmp_path):
    """nanoGPT and nanochat log ``iter`` and ``step`` beside it."""
    for name in ("iter", "step", "train/step"):
        line = '{{"_step": {k}, "_runtime": 1, "{name}": {k}00, "loss": {x}}}'
        (path := tmp_path / "h.jsonl").write_text(many(line, name=name))
        assert losses(path)[1] == [100, 200, 300, 400, 500]


def test_yolov10_sums_both_heads(tmp_path):
    head = "epoch,train/box_om,train/cls_om,train/dfl_om,train/box_oo,train/cls_oo,train/dfl_oo,val/box_om,lr/pg0\n"
    (path := tmp_path / "results.csv").write_text(head + many("{k},{x},1,1,2,2,2,9,0.1"))
    assert losses(path)[2] == pytest.approx([16.9, 16.8, 16.7, 16.6, 16.5])


def test_a_trainers_results_are_no_log(tmp_path):
    (path := tmp_path / "all_results.json").write_text('{\n    "epoch": 3.0,\n    "train_loss": 2.2\n}\n')
    with pytest.raises(
        InputError, match=r"all_results.json is one JSON document .* it is no log; give .*trainer_state"
    ):
        losses(path)


def test_a_configuration_printed_in_a_log_is_no_document(tmp_path):
    """LLaMA-Factory's running_log.txt opens with a bracket and holds the model's configuration as JSON."""
    line = "[INFO|2026-01-02 03:04:05] logging.py:157 >> {{'loss': {x:.4f}, 'learning_rate': 2.5e-06, 'epoch': 0.{k}}}\n"
    config = '[INFO|2026-01-02 03:04:04] parser.py:1 >> Model config {\n  "layers": [{"a": 1}, {"a": 2}],\n  "bos": 1\n}\n\n'
    (path := tmp_path / "running_log.txt").write_text(config + many(line))
    assert losses(path)[2] == [8.9, 8.8, 8.7, 8.6, 8.5]
