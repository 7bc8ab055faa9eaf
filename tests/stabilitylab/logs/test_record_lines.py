"""Losses under another name, and records over several lines."""

import json

import pytest

from stabilitylab.errors import InputError
from stabilitylab.logs.recognise import open_logs, reading_of
from stabilitylab.telemetry import GRADIENT_NORM, LEARNING_RATE
from tests.stabilitylab.logs.told import losses, many

LINES = [
    "step {k} | train {x:.2f} | val 9.99",
    "[{k:06d}]  train={x:.2f}  val=9.99",
    "Epoch {k}, Error: {x:.6f}, LR: 0.10",
    "Epoch {k} - Error sum: {x:.4f}",
    "Epoch {k} : err = {x:f} : Win count 3 ",
    "epoch : {k}  : reconstruction error :  {x:.2f} ",
    "Term {k:4d} - Training error: {x:8.4f}, Validation error:   9.99 ",
    "Epoch {k}\nTraining Error: {x:.3f}\nValidation Error: 9.990",
    "| Episode: {k}  | ELBO: {x:.4f} | ",
    "epoch: {k} ELBO: {x:.2f}, predictive ELBO: 9.99",
    "Epoche {k}: {x:.2f}",
    "Epoch #0.100 - iter #{k}:\n---------\n\tError:\t\t{x:.4f}\n\tDuration:\t1.0300s",
    "epoch {k:2d}  step 0.00{k}  train {x:.3f}  held 9.990  ({k}.1% under the baseline)",
    "[{k:03d}/024] train={x:.6f} (recon=0.12{k}, kl=0.01{k})  val=9.99  lr=2.99e-04",
    "Epoch {k:03d} | Train Main: {x:.4f} | Val Main: 9.9900 | LR(s): 3.00e-04, 2.00e-04",
    "Epoch {k}: train={x:.2f}, val=9.99  [11s]",
    "[{k}/24] mean total = {x:.6f}",
    "Epoch {k}/24.. Train loss: {x:.3f}.. validation loss: 9.990.. Train accuracy: 0.3.. ",
    "{k} {x:.2f}",
    "评估 {k}: 发现改进! 新损失: {x:.6f} (改进: 0.1)",
    "{k}, loss:{x:.4f}",
    "Epoch Loss: [{x:.2f}]\nEpoch {k}/24 completed",
    "\n--- Image : {k}/1536\n* loss = {x:.5f}\n* xy_coord training loss for this batch : 0.21\n",
    "{k} tensor({x:.4f})",
    "{k} tensor({x:.4f}, grad_fn=<MseLossBackward0>)",
    "Epoch: [0][{k}/80]\nLoss {x:.4f} ({x:.4f})\tLoss Side Branch 0.1 (0.1)\nTop-1 accuracy (0.1)",
    "seconds..Epoch {k}/24.. Epoch Training loss: {x:.3f}.. Epoch validation loss: 9.990.. validation accuracy: 0.1",
    "Epoch {k}\nTraining:\n  Loss: {x:.3f}\n  Acc: 0.10\nValidation:\n  Loss: 9.990\n  Acc: 0.10",
    "Step {k}/9 - loss_tr={x:.4e} loss_val=9.99 loss_te=9.99",
    "Epoch {k} Train Loss: {x:.3f}% | Train Error: 0.4{k} |Accuracy: 51.{k}%",
    "{k}# Epoch finished ! Loss: {x:.2f}, IOU: 0.3",
    "Epoch:  {k}  -----------\nMSE: train:  {x:.2f} , validation:  9.99 ",
    "Epoch {k}, mean bits_per_dim: {x:.4f}",
    "Iter: {k}/24, Bits/dim: {x:.3f}",
    "Epoch {k} | train_total: {x:.2f} | train_nll: 0.1{k} | val_total: 9.99 | val_nll: 9.9",
    "{x:.4f}\n[ CPUFloatType{{}} ]\nepoch {k}",
    "Epoch {k}\ntensor({x:.4f}, grad_fn=<MseLossBackward0>)",
]


@pytest.mark.parametrize("line", LINES)
def test_a_loss_by_another_name(tmp_path, line):
    path = tmp_path / "log"
    path.write_text(many(line))
    _, steps, values = losses(path)
    assert steps == [1, 2, 3, 4, 5]
    assert values == pytest.approx([8.9, 8.8, 8.7, 8.6, 8.5])


NO_LOSSES = [
    "Epoch {k}: train = 0.1{k} tune = 0.20 test = 0.30",  # what rises is an accuracy
    "epoch {k} temperature 0.{k}3 beta 1.2{k}",
    "Epoch {k}  : Validation Error = {x:f}",
    "Iter {k}/24: Iter best={x:.3f}, Overall={x:.2f}",
    "Loss Test {x:.4f} Min Loss {x:.3f}\nSaving Model",
    "Validation: Epoch [{k}/24]\nLoss {x:.4f}\nAccuracy 0.1\n",
    "[TRS] iter={k} batch_mean={x:.4f} batch_max=12.1{k} global_best=12.1{k}",
    "Test Error:\nacc: 51.{k}%, avg loss: {x:f}\n",
    " Validation : \n  [epoch {k}/24]--> Accuracy: 51.{k}%, --> Avg loss: {x:f}",
    "[val] mean_loss={x:.4f} mean_dice=0.3{k}",
    "Validation Epoch {k}, Average Loss: {x:.4f}",
    "fold {k}: rmse 0.3{k}",
    "step {k} l1 0.12, mse {x:.2f}, dur 0.3",
    "[{k}/160] KL: 0.1{k}, Recon: {x:.4f}",
    "it {k}/24, J_KL = 0.2{k}, J_pred = {x:.2f}",
    "Test epoch {k}: Average losses: Loss: {x:.3f} | PSNR: 20.{k}",
    "Iteration {k}/24, ELBO: -{x:.2f} (time: 0.4s)",  # it rises: its negative is the loss
    "in epoch {k} mean elbo is -{x}\nin epoch {k} mean kl is 0.1\nin epoch {k} mean nll is {x}",
    "iter {k} | nll {x:.2f} | elbo -9.9{k}",
    "[{k}/100] f: {x:e} | |g|: 1.{k}e+00 | alpha: 0.1",
    "step {k} loss D/G: 0.3{k}/{x:.2f}",
    "Validating Batch [{k}/24] Loss: {x:.4f} | loss_cls: 0.1",
    "step {k}: the loss after {k}00 games fell",
    "Epoch: {k}/24 - CE_Loss: {x:.4f} | KD_Loss: 0.1{k} | ACC: 0.2",
]


@pytest.mark.parametrize("line", NO_LOSSES)
def test_what_could_be_several_or_none(tmp_path, line):
    path = tmp_path / "log"
    path.write_text(many(line))
    with pytest.raises(
        InputError, match=r"--loss|is no log of a trainer known here|holds no values"
    ) as refusal:
        open_logs([path])
    assert "\n" not in str(refusal.value)


def test_an_error_that_is_what_the_accuracy_leaves_is_no_loss(tmp_path):
    path = tmp_path / "log"
    path.write_text("".join(f"it {k} err = {0.9 - k / 10:.2f}, acc = {0.1 + k / 10:.2f}\n" for k in range(5)))
    with pytest.raises(InputError, match="no log of a trainer"):
        open_logs([path])


def test_the_column_that_is_proposed_can_be_chosen(tmp_path):
    path = tmp_path / "log"
    path.write_text(many("step {k} l1 0.12, mse {x:.2f}, dur 0.3"))
    with pytest.raises(InputError, match="--loss l1 or --loss mse"):
        losses(path)
    assert losses(path, loss="mse")[1:] == ([1, 2, 3, 4, 5], [8.9, 8.8, 8.7, 8.6, 8.5])


BLOCK = "Epoch {k} - losses:\n  Total: {x:.2f}\n  NLL: 0.1{k}\n  GradNorm: avg=1.{k} max=3.1\n  LR: 1e-4\n"


def test_numbers_below_a_counter_are_one_record(tmp_path):
    path = tmp_path / "log"
    path.write_text(many(BLOCK))
    log, steps, values = losses(path)
    assert (steps, values) == ([1, 2, 3, 4, 5], [8.9, 8.8, 8.7, 8.6, 8.5])
    assert log.columns[GRADIENT_NORM] == "GradNorm avg"
    assert log.columns[LEARNING_RATE] == "LR"


def test_a_counter_may_stand_behind_its_numbers(tmp_path):
    path = tmp_path / "log"
    path.write_text(many("error 9.1{k}\ncost: {x:.2f}\ndone with epoch {k}"))
    assert losses(path)[1:] == ([1, 2, 3, 4, 5], [8.9, 8.8, 8.7, 8.6, 8.5])


def test_what_a_heading_of_validation_stands_above_is_left_out(tmp_path):
    path = tmp_path / "log"
    said = many("Epoch 1, Iter: {k}/5, Bits/dim: {x:.2f}")
    path.write_text("Training...\n" + said + "Testing...\n" + many("Iter: {k}/5, Bits/dim: 1.{k}"))
    assert losses(path)[1:] == ([1, 2, 3, 4, 5], [8.9, 8.8, 8.7, 8.6, 8.5])


def test_records_over_lines_as_they_grow(tmp_path):
    path = tmp_path / "log"
    path.write_text(many(BLOCK))
    reading = reading_of(path)
    rows = list(reading.rows())
    taken = []
    state = reading.pieces().state
    for line in path.read_bytes().splitlines(keepends=True):
        pieces = reading.pieces()
        pieces.state = json.loads(json.dumps(state))
        taken += pieces.take(line)
        state = pieces.state
    taken += pieces.end()
    assert taken == rows


def epochs(first, fall):
    """Three times eight steps; the second and third begin at ``first`` of the loss before."""
    lines = []
    for e in range(3):
        start = 9.0 if e == 0 or first else 9.0 - fall * e
        lines += [f"INFO Iter: {100 * k}/800, LR: 1e-4, Loss: {start - fall * k / 8:.3f}" for k in range(8)]
    return "\n".join(lines)


def test_epochs_of_rounds_count_on(tmp_path):
    path = tmp_path / "log"
    lines = [
        f"Client 3 - Round {r} - Epoch {e}/3 - Loss: {3 - r / 9:.2f}{e}" for r in range(3) for e in (1, 2, 3)
    ]
    path.write_text("\n".join(lines))
    assert losses(path)[1] == list(range(1, 10))


def test_a_counter_that_begins_again_while_the_loss_goes_on_counts_epochs(tmp_path):
    path = tmp_path / "log"
    path.write_text(epochs(False, 1.0))
    assert losses(path)[1] == list(range(0, 2400, 100))


def test_a_loss_that_begins_again_too_is_another_run(tmp_path):
    path = tmp_path / "log"
    path.write_text(epochs(True, 1.0))
    assert [log.name for log in open_logs([path])] == ["run 1", "run 2", "run 3"]


def test_places_that_begin_again_with_the_epoch_go_on(tmp_path):
    path = tmp_path / "log"
    line = "| epoch {e:3d} | {k:5d}/ 800 batches | ms/batch 11.78 | loss {x:5.2f}\n"
    path.write_text(
        "".join(line.format(e=e, k=200 * k, x=9 - e - k / 9) for e in (1, 2) for k in range(1, 4))
    )
    assert losses(path)[1] == [200, 400, 600, 800, 1000, 1200]
