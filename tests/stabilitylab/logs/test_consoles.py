"""What trainers print: format, values, first and last step, signals."""

import math

import pytest

from stabilitylab.errors import InputError
from stabilitylab.logs.log import RowBlock
from stabilitylab.logs.pattern import compiled, pairs
from stabilitylab.logs.recognise import open_logs
from stabilitylab.telemetry import GRADIENT_NORM, LOSS, LOSS_SCALES
from tests.stabilitylab.logs.told import losses, many, said

CONSOLES = [
    (
        "Megatron-LM",
        " iteration {k:8d}/     400 | consumed samples: 64 | learning rate: 6.680E-06 | lm loss: {x:.6E} |"
        " loss scale: 1.0 | grad norm: 0.750 | number of skipped iterations:   0 |",
        {"loss", "gradient_norm", "learning_rate", "loss_scale", "skipped"},
    ),
    (
        "Megatron-LM",
        "[default7]: iteration {k}/ 400 | lm loss: {x:.6E} | grad norm: 0.750 |",
        {"loss", "gradient_norm"},
    ),
    ("nanoGPT", "iter {k}: loss {x:.4f}, time 210.11ms, mfu 30.20%", {"loss"}),
    (
        "nanochat",
        "\x1b[32mstep 0000{k}/21400 (0.02%) | loss: {x:.6f} | grad norm: 0.3100 | lrm: 1.00 | dt: 10.00ms |",
        {"loss", "gradient_norm"},
    ),
    ("llm.c", "s:{k} trl:{x:.4f} lr:0.000100 norm:1.50", {"loss", "gradient_norm", "learning_rate"}),
    (
        "llm.c",
        "step    {k}/20000 | loss {x:.6f} (+nanz)| norm 15.3000 (+nanz)| lr 8.57e-07 | 210.00 ms",
        {"loss", "gradient_norm", "learning_rate"},
    ),
    ("build-nanogpt", "{k} train {x:.6f}", {"loss"}),
    ("modded-nanogpt", "step:{k}/5100 train_loss:{x:.4f} train_time:100ms step_avg:nanms", {"loss"}),
    (
        "minimind",
        "Epoch:[1/1]({k}/395), loss: {x:.4f}, aux_loss: 0.0100, lr: 0.00050000, epoch_time: 9.9min",
        {"loss", "learning_rate"},
    ),
    (
        "torchtitan",
        "[rank0]:[titan] 2026-01-11 20:00:00,524 - root - INFO - \x1b[31mstep: {k:2d}  \x1b[32mloss: {x:7.4f}  "
        "\x1b[38;2;180;60;0mgrad_norm:  1.5000  \x1b[34mmemory: 10.1GiB(20.0%)  tps: 51,301\x1b[39m",
        {"loss", "gradient_norm"},
    ),
    (
        "OLMo",
        "2026-08-08 12:00:00 INFO [olmo_core:68] [step={k}/3,000,epoch=1,eta=5h11m]\n"
        "    optim/total grad norm=1.0\n    train/CE loss={x:.4f}\n    train/Z loss=0.0001",
        {"loss", "gradient_norm"},
    ),
    (
        "fairseq",
        "2020-01-01 | INFO | train_inner | epoch 001:    {k} / 4000 loss={x:.3f}, ppl=9.1, num_updates={k}, lr=1e-05,"
        " gnorm=2.4, loss_scale=128, train_wall=30",
        {"loss", "gradient_norm", "learning_rate", "loss_scale"},
    ),
    (
        "fairseq",
        '[2022-01-01 10:00:00,000][train_inner][INFO] - {{"epoch": 1, "update": 0.001, "loss": "{x:.3f}",'
        ' "num_updates": "{k}", "lr": "1e-05", "gnorm": "2.4"}}',
        {"loss", "gradient_norm", "learning_rate"},
    ),
    (
        "MMEngine",
        "2023/01/01 10:00:00 - mmengine - INFO - Epoch(train)   [1][  {k}/1250]  lr: 2.0000e-02  eta: 1:00:00"
        "  time: 0.2  memory: 4000  loss: {x:.4f}  loss_cls: 0.3  grad_norm: 2.1",
        {"loss", "gradient_norm", "learning_rate"},
    ),
    (
        "MMCV",
        "2021-01-01 10:00:00,000 - mmdet - INFO - Epoch [1][{k}/7330]\tlr: 1.000e-03, eta: 1 day, 1:00:00,"
        " loss_cls: 0.3, loss: {x:.4f}, grad_norm: 2.1",
        {"loss", "gradient_norm", "learning_rate"},
    ),
    ("Composer", "[batch={k}/100]:\n\t Train loss/train/total: {x:.4f}", {"loss"}),
    ("llama2.c", "{k} | loss {x:.4f} | lr 5.000000e-04 | 100.00ms | mfu 10.00%", {"loss", "learning_rate"}),
    ("text", "Epoch 1, Step {k}, Loss: {x:.4f}", {"loss"}),
    (
        "text",
        "10:00:00,123 | INFO | m:train:88 | Step {k}/9 | train_loss: {x:.4f} | lr: 1e-4 | grad_norm: 0.9",
        {"loss", "gradient_norm", "learning_rate"},
    ),
    ("text", "step {k} - loss {x:.4f} - grad norm inf", {"loss", "gradient_norm"}),
    (
        "text",
        "step: {k}/9, lr: 1e-4, train loss: {x:.4f}, gnorm: 0.91",
        {"loss", "gradient_norm", "learning_rate"},
    ),
    ("text", "[{k} | 3.50] loss={x:.2f} avg=2.1", {"loss"}),
    ("text", "INFO:root:[{k}] loss={x:.4f} lr=1e-4 ({k}/500)", {"loss", "learning_rate"}),
    ("text", "[Epoch 0/3] loss: {x:.3f}, acc: 0.12:   3%|#   | {k}/200 [00:12<00:59, 16.68it/s]", {"loss"}),
    ("text", "steps:   3%|##  | {k}/300 [00:10<01:00,  1.1it/s, avr_loss={x:.3f}]", {"loss"}),
    (
        "text",
        "Epoch: [0][{k}/100]\tTime  0.3 ( 0.4)\tLoss {x:.4e} (7.0e+00)\tAcc@1   0.00 (  0.39)",
        {"loss"},
    ),
    (
        "text",
        "Epoch: [0]  [{k}/100]  eta: 0:01:00  lr: 0.0001  loss: {x:.4f} (2.0)  time: 0.1",
        {"loss", "learning_rate"},
    ),
    ("text", "Iter {k}: box_loss 1.2, loss {x:.4f}, val_loss 3.0", {"loss"}),
    (
        "text",
        "I0301 10:00:00.0 1399 train.py:200] Step {k}: {{'gradient_norm': 1.0, 'loss': {x:.4f}}}",
        {"loss", "gradient_norm"},
    ),
    (
        "text",
        "I0101 00:00:00.0 139 logging_writer.py:48] [{k}] grad_norm=1.0, loss={x:.4f}",
        {"loss", "gradient_norm"},
    ),
    (
        "text",
        "Train: 0 [  {k}/1250 (  4%)]  Loss: {x:.3f} (6.93)  600.0/s  LR: 1.0e-06",
        {"loss", "learning_rate"},
    ),
    ("text", "epoch: 0 step: {k} train_loss: {x:.4f} wer: 0.3", {"loss"}),
    (
        "text",
        "[rank 0] Step: {k} | Loss: {x:.4f} | Global batch size:   65.5K | MFU:  1.00%",
        {"loss", "batch_size"},
    ),
    ("text", "step {k} loss tensor({x:.4f}, device='cuda:0', grad_fn=<NllLossBackward0>)", {"loss"}),
    (
        "text",
        "[2026-01-01 00:00:00,000 INFO] Step {k}/9; acc: 30.1; ppl: 9.2; xent: {x:.2f}; lr: 0.001",
        {"loss", "learning_rate"},
    ),
    (
        "text",
        "Training Epoch: 1/3, step {k}/200 completed (loss: {x:.4f}):  3%|#| {k}/200 [00:10<00:10]",
        {"loss"},
    ),
    (
        "text",
        'ts=2026-01-01 level=info msg="train step" step={k} loss={x:.4f} grad_norm=1.0',
        {"loss", "gradient_norm"},
    ),
    (
        "Megatron-LM",
        " iteration {k}/ 100 | learning rate 1.5E-04 | lm loss {x:.6E} | loss scale 131072.0 |",
        {"loss", "learning_rate", "loss_scale"},
    ),
    (
        "torchtitan",
        "[titan] step: {k}  loss: {x:7.4f}  grad_norm: 1.5\n[titan] validate step: {k}  loss:  9.9  tps: 9,130",
        {"loss", "gradient_norm"},
    ),
    (
        "fairseq",
        "| epoch 001: {k} / 4000 loss={x:.3f}, nll_loss=8.1, num_updates={k}, lr=0.0005, gnorm=1.2, loss_scale=128.000\n"
        "| epoch 001 | valid on 'valid' subset | loss 8.1 | nll_loss 7.9",
        {"loss", "gradient_norm", "learning_rate", "loss_scale"},
    ),
    (
        "levanter",
        "INFO :: Progress on:train {k}.0it/10.0kit rate:1.3it/s elapsed:00:10 postfix:loss:{x:.4f}",
        {"loss"},
    ),
    (
        "ESPnet",
        "1epoch:train:{k}-{k}batch: loss_ctc=120.1, loss={x:.3f}, grad_norm=1.2, loss_scale=1.0, optim0_lr0=1e-4\n"
        "1epoch results: [train] loss=90.1, [valid] loss=70.1",
        {"loss", "gradient_norm", "learning_rate", "loss_scale"},
    ),
    (
        "WeNet",
        "DEBUG TRAIN Batch 0/{k} loss {x:.6f} loss_att 40.1 lr 0.0001 rank 0",
        {"loss", "learning_rate"},
    ),
    (
        "Marian",
        "Ep. 1 : Up. {k} : Sen. 50,000 : Cost {x:.8f} * 1,234 @ 12 after 9 : Time 30s : gNorm 1.2 : L.r. 1e-4",
        {"loss", "gradient_norm", "learning_rate"},
    ),
    (
        "Coqui TTS",
        "\x1b[1m   --> STEP: 25/100 -- GLOBAL_STEP: {k}\x1b[0m\n     | > loss: {x:.5f}  (9.1)\n     | > grad_norm: 1.2  (1.3)\n"
        "     | > current_lr: 1e-05 \n",
        {"loss", "gradient_norm", "learning_rate"},
    ),
    (
        "printed dictionaries",
        "{{'gradient_norm': 1.2,\n 'learning_rate': 1e-05,\n 'loss': {x:.4f},\n 'step': {k}}}\n",
        {"loss", "gradient_norm", "learning_rate"},
    ),
    ("text", "Test: [0/48]  Loss:   8.9\nTrain: 0 [  {k}/1251 (  4%)]  Loss: {x:.3f} (9.1)", {"loss"}),
    (
        "text",
        "completed step: {k}, seconds: 1.2, loss: {x:.3f}\neval metrics after step: {k}, loss=8.5",
        {"loss"},
    ),
    ("text", "[ 1, {k:5d}] loss: {x:.3f}", {"loss"}),
    (
        "text",
        "Train: [0/300][{k}/1251]\tlr 0.001\tloss {x:.4f} (9.1)\tgrad_norm 1.2",
        {"loss", "learning_rate", "gradient_norm"},
    ),
    (
        "text",
        "[Iter: {k}/1251]lr(PiecewiseDecay): 0.001, CELoss: 1.2, loss: {x:.5f}",
        {"loss", "learning_rate"},
    ),
    (
        "text",
        "step={k} loss={x:.4f} lr=1e-4 grad_norm={{'0_default': 1.2, '1_fp32': 0.0}}",
        {"loss", "learning_rate", "gradient_norm"},
    ),
    (
        "text",
        "(main_task pid=1) step:{k} - critic/vf_loss:24.4 - critic/grad_norm:554.0 - critic/lr:1e-5 - actor/entropy_loss:1.2 -"
        " actor/pg_loss:{x:.4f} - actor/grad_norm:1.2 - actor/lr:1e-6",
        {"loss", "learning_rate", "gradient_norm"},
    ),
    ("text", "Step {k}/100\nINFO - Training Loss: {x:.4f}", {"loss"}),
    (
        "text",
        "Epoch: {k:02d} | Time: 1m 20s\n\tTrain Loss: {x:.3f} | Train PPL:  25.2\n\t Val. Loss: 3.3",
        {"loss"},
    ),
    ("text", "I tensorflow:Step {k} loss={x:.3f}\nStep {k} loss={x:.3f}", {"loss"}),
]


@pytest.mark.parametrize(("name", "line", "signals"), CONSOLES)
def test_console(tmp_path, capsys, name, line, signals):
    path = tmp_path / "train.log"
    path.write_text("loading data, loss will follow\n" + many(line) + "saving checkpoint\n")
    found = said(capsys, path)
    (one,) = found["segments"]
    assert (found["format"], one["values"], one["first_step"], one["last_step"]) == (name, 5, 1, 5)
    assert set(one["signals"]) == signals


def test_a_loss_without_a_step_is_counted(tmp_path):
    path = tmp_path / "log"
    path.write_text(many("20/20 - 1s - accuracy: 0.9 - loss: {x:.4f} - val_loss: 3.0"))
    assert losses(path)[1:] == ([0, 1, 2, 3, 4], [8.9, 8.8, 8.7, 8.6, 8.5])


@pytest.mark.parametrize(
    "line",
    [
        "step {} loss {} grad_norm {}",
        "step {} | loss {} | grad norm {}",
        "Step {}: Loss = {}, GradNorm = {}",
        "step={} loss={} grad_norm={}",
        'step="{}" loss="{}" grad_norm="{}"',
        "[{}] train loss {}, grad_norm {}",
        "{{'step': {}, 'loss': {}, 'grad_norm': {}}}",
    ],
)
def test_nan_and_infinity_are_values_in_any_spelling(tmp_path, line):
    path = tmp_path / "log"
    rows = [(1, 2.5, 1.0), (2, "nan", "inf"), (3, "NaN", "Infinity"), (4, "inf", "nan"), (5, "-inf", "NAN")]
    path.write_text("".join(line.format(*row) + "\n" for row in rows))
    (log,) = open_logs([path])
    block = RowBlock.concatenate(list(log.blocks()))
    assert [str(x) for x in block.values[LOSS]] == ["2.5", "nan", "nan", "inf", "-inf"]
    assert [str(x) for x in block.values[GRADIENT_NORM]] == ["1.0", "inf", "inf", "nan", "nan"]


def test_nanotrons_thousands(tmp_path):
    path = tmp_path / "log"
    line = "01/01/2026 00:00:00 [INFO|DP=0|PP=0|TP=0]: iteration: {} / 9 | global_batch_size: 1.02K | lm_loss: {} | lr: 0.0003\n"
    path.write_text(line.format(1, "11.2") + line.format(2, "1.05K") + line.format(3, "2.5M"))
    log, _, values = losses(path)
    assert (log.format, values) == ("nanotron", [11.2, 1050.0, 2.5e6])


def test_validation_between_is_left_out_and_named(tmp_path, capsys):
    path = tmp_path / "log"
    path.write_text(many("Step {k} | train_loss: {x:.4f}\nStep {k} | val_loss: 9.0 | val_ppl: 3.0"))
    assert losses(path)[1:] == ([1, 2, 3, 4, 5], [8.9, 8.8, 8.7, 8.6, 8.5])
    assert said(capsys, path)["left_out"] == [
        {"reason": "lines of validation, of the start, or without a loss", "count": 5}
    ]


def test_a_bar_that_begins_again_is_the_next_epochs(tmp_path):
    path = tmp_path / "log"
    bar = "".join(f"\r{k}/4 [=>..] - loss: {5 - k / 10:.1f}" for k in range(1, 5))
    path.write_text(f"Epoch 1/2\n{bar}\nEpoch 2/2\n{bar}\n")
    assert losses(path)[1] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_prose_with_commas_is_no_table(tmp_path, capsys):
    path = tmp_path / "log"
    path.write_text(
        "10:00:00,000 fetched a batch in 0.1 s, queue 7\n" * 50 + many("iter {k}: loss {x:.4f}, time 1ms")
    )
    assert said(capsys, path)["format"] == "nanoGPT"


def test_megatron_leaves_nan_out_but_a_window_of_skips_is_none(tmp_path):
    line = " iteration {}/ 9 |{} grad norm: 1.0 | number of skipped iterations: {} |\n"
    path = tmp_path / "log"
    path.write_text(line.format(1, "", 1) + line.format(2, " lm loss: 8.0 |", 0) + line.format(3, "", 0))
    _, steps, values = losses(path)
    assert steps == [1, 2, 3]
    assert values[0] == 8.0
    assert math.isnan(values[1])
    assert len(values) == 2


@pytest.mark.parametrize("quote", ["", "'"])
def test_the_trainers_console_takes_steps_from_the_bar(tmp_path, quote):
    path = tmp_path / "log"
    record = (
        "\r 3%|#  | {k}0/300 [00:01<10:00]\n{{'loss': {q}{x}{q}, 'grad_norm': {q}nan{q}, 'epoch': {q}0.1{q}}}"
    )
    path.write_text(many(record, q=quote) + "{'train_runtime': 9.0, 'train_loss': 5.0}\n")
    log, steps, _ = losses(path)
    assert steps == [10, 20, 30, 40, 50]
    assert log.left_out == {"the closing summary": 1}


def test_deepspeeds_scale_belongs_to_the_record_before(tmp_path):
    path = tmp_path / "log"
    path.write_text(
        "{'loss': 4.0, 'epoch': 0.1}\n[deepspeed] OVERFLOW! Rank 0 Skipping step. Attempted loss scale: 65536, "
        "reducing to 32768\n{'loss': 3.9, 'epoch': 0.2}\n"
    )
    (log,) = open_logs([path])
    (block,) = log.blocks()
    assert block.values[LOSS_SCALES[0]][0] == 32768
    assert len(block) == 2


def test_own_patterns(tmp_path):
    path = tmp_path / "log"
    path.write_text("t=1,000 obj 3.5 |g| 2e-1\nnoise\nt=2,000 obj nan\n")
    given = "t={step} obj {loss}{? |g| {grad_norm}?}"
    log, steps, values = losses(path, pattern=given)
    assert steps == [1000, 2000]
    assert values[0] == 3.5
    own = tmp_path / "own.toml"
    own.write_text(f"[mine]\nline = ['{given}']\n")
    log, steps, _ = losses(path, pattern=str(own))
    assert (log.format, steps) == ("mine", [1000, 2000])
    for wrong in ("no numbers", "{step", "{? {step}", "{a} {a}"):
        with pytest.raises(InputError, match="pattern"):
            compiled(wrong)
    with pytest.raises(InputError, match="no line"):
        open_logs([path], pattern="epoch {step} cost {loss}")


def test_pairs_are_read_by_any_sign():
    assert pairs("lm loss: 2.0E+00 | lr=1e-3, 'norm': '1,234.5'") == {
        "lm loss": 2.0,
        "lr": 1e-3,
        "norm": 1234.5,
    }
