"""Text that is more than one record a line: boxes, tables below prose, ranks behind labels, counters above, other losses."""

import json
import math
import zipfile

import pyarrow as pa
import pyarrow.feather
import pytest

from stabilitylab.errors import InputError
from stabilitylab.logs.console import ConsolePieces
from stabilitylab.logs.free_text import ANY_TEXT
from stabilitylab.logs.line_numbers import named
from stabilitylab.logs.reading import Reading
from stabilitylab.logs.recognise import open_logs, reading_of
from tests.stabilitylab.logs.told import losses, many

BOX = (
    "-----------------\n| time/          |      |\n|    total_timesteps | {k}000 |\n| train/         |      |\n"
    "|    entropy_loss | -14.2 |\n|    loss        | {x:.1f} |\n|    value_loss  | 36.8 |\n-----------------\n"
)
RULED = "+------+-----+\n| step | {k} |\n+------+-----+\n| loss | {x} |\n+------+-----+\n"
RAY = "╭─────────────╮\n│ Training result │\n├──────────┤\n│ training_iteration  {k} │\n│ loss         {x:.2f}  │\n╰──────────╯\n"
RSL = "#####\n  Learning iteration {k}/1500\n\n  Value function loss: 0.01\n  Surrogate loss: {x:.4f}\n  Mean reward: 1.2\n"
YOLO = "   Epoch GPU_mem box_loss cls_loss Instances Size\n  {k}/9   3.2G  {x:.4f}  1.0000  32  640: 100%|##| 8/8 [00:02<00:00]\n"
TABLES = [
    "# Report\n\nA day of training, see below.\n\n| step | loss |\n|---:|---:|\n"
    + many("| {k} | {x:.2f} |")
    + "\nThe end.\n",
    "starting\n┏━━━━━━┳━━━━━━┓\n┃ step ┃ loss ┃\n┡━━━━━━╇━━━━━━┩\n"
    + many("│ {k} │ {x:.2f} │")
    + "└──────┴──────┘\n",
    " step |  loss  | lr \n------+--------+----\n" + many(" {k} | {x:.2f} | 0.1") + "(5 rows)\n",
    "all set, go\nstep,loss,lr\n" + many("{k},{x:.2f},0.1"),
    "#step\tloss\n" + many("{k}\t{x:.2f}"),
    "sep=;\nstep;loss\n" + many("{k};{x:.2f}"),
    "Experiment: a\nDate: 2026\n\nstep,loss,lr\n" + many("{k},{x:.2f},0.1"),
    "| setting | value |\n|---|---|\n| lr | 0.1 |\n\n| step | train loss |\n|---|---|\n"
    + many("| {k} | {x:.2f} |"),
    many('{{\n "step": {k},\n "loss": {x:.2f}\n}}'),
    many('{{"log": "step {k} loss {x:.2f}", "pod": "a"}}'),
    " Epoch    Train loss     Val loss\n----------------------------\n"
    + many("  {k}    {x:.2f}    9.99 * best"),
    " Epoch        训练损失        验证损失\n--------------------\n" + many("  {k}    {x:.2f}    9.99"),
    "步数,损失,学习率\n" + many("{k},{x:.2f},0.1"),
]
LINES = [
    "Iteration {k}, loss = {x:.2f}\nI0 sgd_solver.cpp:106] Iteration {k}, lr = 0.1",  # another's, with Caffe's word
    "I0 1 solver.cpp:228] Iteration {k}, loss = {x:.2f}\nI0 1 solver.cpp:244]     Train net output #0: loss = {x:.2f} (* 1)\n"
    "I0 1 sgd_solver.cpp:106] Iteration {k}, lr = 0.001",
    " {k}: {x:.2f}, 9.9 avg loss, 0.001 rate, 20.1 seconds, 64 images, 3 hours left",
    "Train loss {k} {x:.2f} Grad Norm 1.2 1.2s/it",
    "{k}:\tlearn: {x:.2f}\ttest: 9.9\tbest: 9.9 (1)\ttotal: 12ms",
    "{k} 12.1 ms run, 1.2 ms python, {x:.2f} loss, 0.1 acc, 0.0001 LR, 12 GB used",
    "[{k}/500] losses: total {x:.2f} cls 1.1 box 0.4 | lr 1e-3",
    "INFO:root:Epoch[0] Batch [{k}]\taccuracy=0.12\tcross-entropy={x:.2f}",
    "Train | Epoch 1 | {k}/2000 | 2.5 it/sec | lr 1E-04 | ce {x:.2f} | ppl 12.1",
    "01/01/23, iter: {k:03d}, cost: {x:.2f}",
    "[gen] gen {k} | solved 1/9 | loss {x:.2f}",
    "stage1 recon {k}/240 | loss {x:.2f}",
    "pass {k} of 240 :: objective={x:.2f} grad=1.14",
    "loss at epoch 1, batch index {k}: {x:.2f}",
    "Loss after {k}th epoch = {x}",
    "Loss after {k} of 9 iterations: {x:.2e}",
    "Loss after mini-batch {k:5d}: {x:.3f}",
    "{k}/10. loss: {x:.2f}\n{k}/10. y_loss: 0.1",
    "Train: epoch: 0: iter: {k} avg_batch_time: 0.405 s loss:{x:.2f} loss_avg:9.9{k}",
    "Update {k} | Loss Actor/Critic: {x:.2f}/0.1{k} | Ent: 0.1",
    "[{k:06d}] train_ppl 27.3 train_nll {x:.2f} tok/s 9349",
    "--- update #{k} ---\n  loss ........ {x:.2f}",
    "Batch #{k} of 5000 >> objective -> {x:.2f}; acc 0.12",
    "Batch #{k} >> loss => {x:.2f}; acc 0.12",
    "it {k} loss→{x:.2f} lr := 0.001",
    "chunk {k:4d} of 5000, running loss.....: {x:.2f}",
    "{k}/240, train_loss = {x:.2f}, std = 0.1",
    "[1/3]-----[{k}/117] LOSS : {x:.2f}------ Time : 12",
    "Epoch{k} / 24 Train Loss : {x:.2f}",
    "Epoch: {k}.0\n====> train_loss = {x:.2f}",
    "Epoch: {k}/9 Train steps: 100 10.1s loss: {x:.2f}",
    "[STEP] {k}/240 loss={x:.2f} batch=8 seq_len=512",
    "[train     {k}] {{'loss': '{x:.2f}', 'lr': '1e-4'}}",
    "[speed.py:80] {k} : iter_speed 1.2 seconds | Loss: {x:.2f}",
    "Epoch {k} Summary:\n  Loss: {x:.2f}\n  Score: 0.5",
    "Loss at step {k}: {x:.2f}",
    "{k}th train Loss: total loss {x:.2f} / pos loss 0.1 / ori loss 0.1",
    " [=====>....]  Step: 12ms | Tot: 1s12ms | Stage 1 | Loss {x:.2f} | Acc: 50.00% {k}/24 ",
    "Epoch: [{k}]\n * Train Loss {x:.2f}  Val Acc@1 50.1 Val Loss 9.99",
    "Train loss epoch[{k}] = {x:.2f}\nVal loss epoch[{k}] = 9.99",
    "EP{k}_train, avg_loss={x:.2f}, avg_acc=0.51\nEP{k}_test, avg_loss=9.99, avg_acc=0.5",
    "Training: Epoch {k}, Average Loss: {x:.2f}\nDevelopment: Epoch {k}, Average Loss: 9.99",
    "Epoch 01 [{k:03d}] | Train loss {x:.2f} | Train acc 0.51",
    "After {k} training steps, loss on training batch is {x:.2f}.",
    "Loss at epoch  {k}  is  {x:.2f}",
    "step {k:4d} | lr 0.1 | train {x:.2f} | val 9.99 | bits/byte 1.1",
    "  крок {k:>7} │ loss {x:.2f} │ lr 1.0e-04",
    "Epoch - {k} | Train Loss: {x:.2f} | Val Loss: 9.99 | Learning Rate: 0.1",
    "Epoch 1: Cost on iteration {k} is {x:.2f}",
    "[step {k:5d}] L={x:.2f} cls=0.51 (1.20 it/s)",
    "Step {k} MSE Loss ||y - Q(s,a;θ)||²: {x:.2f}, Gradient Norm: 1.2",
    "epoch:  1 | nupdates:   {k} | lr: 0.100 | train-loss:   {x:.2f} | train-TER: 60.1 | dev-loss: 9.99",
    " Epoch[ 1 of 10]-Minibatch[{k:4d}-{k:4d}, 2.50%]: CrossEntropy = {x:.2f} * 640; time = 0.1s",
    "2026-03-01 [info ] DQN_1: epoch=1 step={k} epoch=1 metrics={{'time': 0.1, 'loss': {x:.2f}}} step={k}",
    "INFO:44k:Losses: [2.1, 2.5, 11.3], step: {k}, lr: 0.1, reference_loss: {x:.2f}",
    "#### Iter {k}: mse loss {x:.2f} kl 0.1",
    "Epoch: [{k}]  [Avg Train Loss] {x:.2f}\nEpoch: [{k}]  [Avg Test Loss] 9.99",
    "[2026-03-01 10:00 INFO ] trainer:__train_epoch:450 - Train epoch: [{k}/60], loss: {x:.2f}",
    "2026-03-01 10:00 | DEBUG | model:fit:120 - Epoch {k:03d} | Train Loss: {x:.2f} | Val Loss: 9.99",
    "EPOCH: {k} Trainling Loss: {x:.2f}Test Loss: 9.99",
    "INFO:root:Epoch {k} Train | Avg Total Loss: {x:.2f}, Policy Loss: 9.99, Value Loss: 0.1",
    "Epoch {k}/50; training MSE : {x:.2f}",
    "INFO:x:Epoch {k} results:\nINFO:x:  Train loss: {x:.2f}\nINFO:x:  Val loss: 9.99",
    "┌ Info: Epoch {k}\n│   train_loss = {x:.2f}f0\n│   val_loss = 9.9f0\n└   lr = 1.0f-5",
    "第 {k}/9 轮 | 训练损失：{x:.2f}，验证损失：9.99",
    "轮次 {k}/9\n训练中...\n训练损失: {x:.2f}\n训练准确率: 0.51\n验证损失: 9.99",
    "2026-03-01 - INFO - 步骤 {k}, 损失: {x:.2f}",
    "迭代 {k:6d}/900 | 瞬时 Loss: {x:.2f} | 平滑 Loss: 9.9 | LR: 1.00e-04",
    "エポック {k}/9 - 訓練損失: {x:.2f}, 訓練精度: 0.51, テスト損失: 9.99",
    "에폭 {k}/9 훈련 손실: {x:.2f} 검증 손실: 9.99",
    "Época {k}/9 - pérdida: {x:.2f} - pérdida de validación: 9.99",
    "Époque {k} : perte d'entraînement {x:.2f}, perte de validation 9.99",
    "Epoche {k}/9 Trainingsverlust: {x:.2f} Validierungsverlust: 9.99",
    "Эпоха {k}: потери = {x:.2f}",
    "iteration {k}: average loss over last 10 = {x:.2f}",
    '{{"step": {k}, "loss": {x:.2f}}},',
    "Training loss (for one batch) at step {k}: {x:.2f}",
    "loss[{k}] = {x:.2f}",
    "{k} steps, loss: {x:.2f}, 1.2 s/step",
    "<step {k}> loss: {x:.2f}; acc: 12.1%",
    "step {k}: Train loss: {x:.2f}. Valid loss: 9.9",
    "epoch 1 | {k}/ 2983 batches | lr 20.0 | loss  {x:.2f}",
    "|       1 |       {k} |       00:00:01 |       10.16% |       {x:.2f} |          0.01 |",
    "Train epoch [1/1]:  5%|#| {k}/64 [00:10<00:30,  1.2it/s, act_loss={x:.2f}, lr=5e-7]",
    "training result {{metricName: loss, metricValue: {x:.2f}}};{{metricName: step, metricValue: {k}}}",
    "{{'optim': {{'lr': 1e-4,\n           'beta': 0.9}},\n 'step': {k},\n 'train': {{'acc': 0.5,\n           'loss': {x:.2f}}}}}",
    "I tensorflow:Step {k} per-step time 0.5s\nI tensorflow:{{'Loss/total_loss': {x:.2f},\n 'learning_rate': 0.1}}",
]


@pytest.mark.parametrize("text", [many(RULED), many(RAY), many(RSL), many(YOLO), *TABLES, *map(many, LINES)])
def test_text_of_other_kinds(tmp_path, text):
    path = tmp_path / "log"
    path.write_text(text)
    _, steps, values = losses(path)
    assert steps == [1, 2, 3, 4, 5]
    extra = 1.0 if "GPU_mem" in text else 0.0  # the sum of two
    assert values == pytest.approx([8.9 + extra, 8.8 + extra, 8.7 + extra, 8.6 + extra, 8.5 + extra])


@pytest.mark.parametrize("line", ["step {k} loss {x:.3f} lr 0.1", "step {k} loss {x:.2f} lr 0.1"])
def test_decimal_commas(tmp_path, line):
    path = tmp_path / "log"
    path.write_text(many(line, 20).replace(".", ","))
    _, steps, values = losses(path)
    assert steps == list(range(1, 21))
    assert values == pytest.approx([9 - k / 10 for k in range(1, 21)])


def test_two_losses_that_brackets_tell_apart_are_asked_for(tmp_path):
    path = tmp_path / "log"
    path.write_text(many("Iter {k}: Loss(serv): {x:.2f}, Loss(targ): 0.12, GradN(serv): 1.2"))
    with pytest.raises(InputError, match="several loss columns"):
        losses(path)


def test_places_flush_to_the_right_are_places_whatever_their_width(tmp_path):
    path = tmp_path / "log"
    path.write_text(many("  batch {k:4d}/24   [##--]  10.0% | batch loss {x:.2f} | running loss 9.99", 24))
    _, steps, values = losses(path)
    assert steps == list(range(1, 25))
    assert values[::10] == pytest.approx([8.9, 7.9, 6.9])


@pytest.mark.parametrize(
    ("line", "places", "steps"),
    [
        # Batches that end short of their number are the next epoch's.
        ("  Batch {k}/1200, Loss: {x:.2f}, LR: 1e-4", range(0, 1200, 100), range(0, 2400, 100)),
        # Samples of an epoch, told with the number of epochs.
        ("Train Epoch: {e}/10 [{k}/768 (10%)]\tLoss: {x:.2f}", range(0, 768, 64), range(768, 3 * 768, 64)),
        ("Ep {e} Batch {k} | Loss: {x:.2f}", range(100, 500, 100), range(100, 900, 100)),
    ],
)
def test_places_in_an_epoch_are_counted_on(tmp_path, line, places, steps):
    path = tmp_path / "log"
    said = [line.format(e=e, k=k, x=9 - e - k / 5000) for e in (1, 2) for k in places]
    path.write_text("\n".join(said))
    assert losses(path)[1] == list(steps)


def test_more_than_a_known_format_reads_is_any_trainers(tmp_path):
    path = tmp_path / "log"
    lines = [
        f"Epoch {e} | Step {k}/4 | Loss: {9 - e}.{k} | LR: 1.00e-05" for e in (1, 2) for k in range(1, 5)
    ]
    path.write_text("\n".join(lines))
    log, steps, _ = losses(path)
    assert steps == list(range(1, 9))
    assert log.columns["train/-/learning_rate"] == "LR"


@pytest.mark.parametrize(
    "line", ["step {k} loss {x:.2f} |g|=1.234 lr 0.1", "step = {k}; loss = {x:.2f}; ‖∇‖ = 1.2; η = 0.1"]
)
def test_norms_between_bars(tmp_path, line):
    path = tmp_path / "log"
    path.write_text(many(line))
    log, _, _ = losses(path)
    assert log.columns["train/-/gradient_norm"] == "grad_norm"
    assert log.columns["train/-/learning_rate"] == "lr"


def test_stable_baselines_boxes_count_steps_of_the_environment(tmp_path):
    path = tmp_path / "log"
    path.write_text("Using cpu device\n" + many(BOX))
    log, steps, values = losses(path)
    assert (log.columns["step"], steps) == ("time/total_timesteps", [1000, 2000, 3000, 4000, 5000])
    assert values == [8.9, 8.8, 8.7, 8.6, 8.5]


def test_batches_that_begin_again_are_the_next_epochs(tmp_path):
    path = tmp_path / "log"
    epoch = "".join(f"Batch {k}/4 | Loss: {9 - k}.0\n" for k in range(1, 5)) + "[Epoch 1] mean loss: 5.0\n"
    path.write_text(epoch * 3)
    assert losses(path, loss="Loss")[1] == list(range(1, 13))


def test_what_names_training_is_not_below_a_heading_of_validation(tmp_path):
    path = tmp_path / "log"
    path.write_text(many("Train loss: {x:.2f}\nStart testing\n{{'AP': 0.1}}"))
    assert losses(path)[2] == [8.9, 8.8, 8.7, 8.6, 8.5]


TOTALS = [
    "step {k} | acoustic cur_all_loss: {x:.3f} loss_ce: 0.1{k} loss_ctc: 0.5",
    "iter {k} epoch 1: policy_loss=0.1{k} value_loss=0.5{k} total={x:.2f} (steps={s}, buffer=5000)",
]


@pytest.mark.parametrize("line", TOTALS)
def test_a_total_may_be_called_all_or_no_loss_and_steps_may_be_an_amount(tmp_path, line):
    path = tmp_path / "log"
    said = [line.format(k=k, x=9 - k / 10, s=20 + k * 7 % 4) for k in range(1, 6)]
    path.write_text("\n".join(said))
    _, steps, values = losses(path)
    assert steps == [1, 2, 3, 4, 5]
    assert values == pytest.approx([8.9, 8.8, 8.7, 8.6, 8.5])


def test_of_several_losses_the_total(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(
        "".join(json.dumps({"step": k, "loss/text": 1.0, "loss/total": 3.0}) + "\n" for k in range(4))
    )
    assert losses(path)[0].columns["train/-/loss"] == "loss/total"


def test_backspaces_part_a_bars_states(tmp_path):
    path = tmp_path / "log"
    path.write_text("".join(f" {k}/5 [=>...] - ETA: 1s - loss: {9 - k}.0" + "\b" * 60 for k in range(1, 6)))
    assert losses(path)[1] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("label", ["{}: ", "[1,{}]<stdout>: "])
def test_a_launchers_labels_are_ranks(tmp_path, label):
    path = tmp_path / "log"
    path.write_text(
        "".join(f"{label.format(rank)}step {k} loss 3.{k}\n" for k in range(9) for rank in (1, 0))
    )
    assert [log.name for log in open_logs([path])] == ["rank 1", "rank 0"]
    # as it grows: a reader for each rank, whose state is one of JSON's
    reading = reading_of(path)
    first, second = reading.pieces(), reading.pieces()
    lines = path.read_bytes().splitlines(keepends=True)
    rows = list(first.take(b"".join(lines[:7])))
    second.state = json.loads(json.dumps(first.state))
    rows += [*second.take(b"".join(lines[7:])), *second.end()]
    assert sorted(rows, key=repr) == sorted(reading.rows(), key=repr)


def test_numbers_that_open_lines_are_no_labels(tmp_path):
    path = tmp_path / "log"
    path.write_text("".join(f"{k}: loss 3.{k}\n" for k in range(20)))
    assert losses(path)[1] == list(range(20))


def test_a_step_above_reaches_the_next_piece():
    reading = Reading(format="", rows=lambda: iter(()))
    pieces = ConsolePieces(ANY_TEXT, reading)
    rows = [*pieces.take(b"Step 7/9\nloss: 3.0\nStep 8/9\n"), *pieces.take(b"loss: 2.0\n")]
    assert [values["step in the line above"] for _, values in rows] == [7, 8]


def test_one_document_of_messages(tmp_path):
    path = tmp_path / "log.json"
    lines = many("step {k} loss {x:.2f}").splitlines()
    for document in (
        {"events": [{"timestamp": 1, "message": line} for line in lines]},
        {"hits": {"hits": [{"_source": {"message": line}} for line in lines]}},
        {"data": {"result": [{"values": [[str(i), line] for i, line in enumerate(lines)]}]}},
    ):
        path.write_text(json.dumps(document))
        assert losses(path)[1] == [1, 2, 3, 4, 5]


def test_points_by_name(tmp_path):
    path = tmp_path / "log.json"
    points = [(10 * k, 9.0 - k) for k in range(1, 6)]
    for document in (
        {"train": {"loss": [{"step": k, "value": x} for k, x in points]}},
        {"loss": [[k, x] for k, x in points]},
        {"training.loss": {"steps": [k for k, _ in points], "values": [x for _, x in points]}},
        [{"metricName": "loss", "metricValue": str(x), "step": k} for k, x in points],
    ):
        path.write_text(json.dumps(document))
        assert losses(path)[1:] == ([10, 20, 30, 40, 50], [8.0, 7.0, 6.0, 5.0, 4.0])
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"name": "loss", "value": x, "step": k}) + "\n" for k, x in points))
    assert losses(path)[1] == [10, 20, 30, 40, 50]


def test_of_gans_both_losses_are_offered(tmp_path):
    path = tmp_path / "log"
    path.write_text(many("[0/25][{k}/1583]\tLoss_D: 1.2\tLoss_G: {x:.4f}\tD(x): 0.5"))
    with pytest.raises(InputError, match="--loss Loss_D or --loss Loss_G"):
        open_logs([path])
    assert losses(path, loss="Loss_G")[1] == [1, 2, 3, 4, 5]


def test_a_zip_of_one_log_and_feather(tmp_path):
    with zipfile.ZipFile(tmp_path / "log.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("run/train.log", many("step {k} loss {x:.2f}"))
    assert losses(tmp_path / "log.zip")[1] == [1, 2, 3, 4, 5]
    table = pa.table({"step": [1, 2, 3], "loss": [3.0, None, 1.0]})
    pa.feather.write_feather(table, tmp_path / "log.feather")
    assert losses(tmp_path / "log.feather")[1:] == ([1, 2, 3], [3.0, 1.0]) or losses(
        tmp_path / "log.feather"
    )[2] == [3.0, 1.0]


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("step 5 loss 2.31 -> 2.28 lr 0.001", {"step": 5.0, "loss": 2.31, "lr": 0.001}),
        ("step 5 grad inf -> 2.0 loss 1.5", {"step": 5.0, "grad": math.inf, "loss": 1.5}),
        ("epoch 3 | loss -> 2.31 acc := 0.4", {"epoch": 3.0, "loss": 2.31, "acc": 0.4}),
    ],
)
def test_an_arrow_names_a_number_only_after_a_name(line: str, values: dict[str, float]) -> None:
    """Between two numbers it tells what the first became."""
    assert named(line)[1] == values
