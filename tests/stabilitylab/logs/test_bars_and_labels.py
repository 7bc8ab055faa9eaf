"""Progress bars, which draw a step more than once, and labels that a cluster's tools put before lines."""

import pytest

from stabilitylab.errors import InputError
from stabilitylab.logs.recognise import open_logs, reading_of
from stabilitylab.telemetry import LOSS
from tests.stabilitylab.logs.told import losses, many

BAR = "\rEpoch {e}: {p:3d}%|##  | {n}/5 [00:0{n}<00:09,  1.20it/s, loss={x}]"


def drawn(epochs, loss):
    """tqdm's states where a loop calls set_postfix at every step (tqdm 4.67)."""
    out, told = "", None
    for e in range(epochs):
        out += f"\rEpoch {e}:   0%|    | 0/5 [00:00<?, ?it/s]"
        for n in range(5):
            if n:
                out += BAR.format(e=e, p=20 * n, n=n, x=told)
            told = loss(5 * e + n)
            out += BAR.format(e=e, p=20 * n, n=n, x=told)
        out += BAR.format(e=e, p=100, n=5, x=told) * 2 + "\n"
    return out


def test_of_a_bars_states_at_a_step_the_last_counts(tmp_path):
    (path := tmp_path / "a.log").write_text(drawn(3, lambda k: round(9 - k / 10, 1)))
    log, steps, values = losses(path)
    assert steps == list(range(15))
    assert values == pytest.approx([9 - k / 10 for k in range(15)])
    assert log.left_out == {"states of a redrawn bar": 18}


def test_a_bars_losses_that_stay_are_kept(tmp_path):
    (path := tmp_path / "a.log").write_text(drawn(2, lambda k: "nan" if k > 3 else 9 - k))
    assert len(losses(path)[2]) >= 10
    (path := tmp_path / "b.log").write_text(
        "".join(BAR.format(e=0, p=20 * n, n=n, x=3.0) for n in range(1, 6)) + "\n"
    )
    assert losses(path)[1:] == ([1, 2, 3, 4, 5], [3.0] * 5)


def test_a_growing_bars_last_state_is_held_back(tmp_path):
    text = drawn(2, lambda k: round(9 - k / 10, 1))
    (path := tmp_path / "a.log").write_text(text)
    reading = reading_of(path)
    assert reading is not None
    assert reading.pieces is not None
    pieces = reading.pieces()
    told = [
        values["loss"] for line in text.splitlines(keepends=True) for _, values in pieces.take(line.encode())
    ]
    told += [values["loss"] for _, values in pieces.end()]
    assert told == pytest.approx([9 - k / 10 for k in range(10)])


def test_a_table_that_bars_are_drawn_over(tmp_path):
    """fastai without a terminal: fastprogress 1.0."""
    bar = "\rEpoch {k}/8 : |{b}{d}| {p}.00% [{n}/2 00:00<00:00... 0.6851]"
    text = "█\repoch     train_loss  valid_loss  accuracy  time    \n"
    for k in range(8):
        bars = "".join(bar.format(k=k + 1, n=n, p=50 * n, b="█" * n, d="-" * (2 - n)) for n in range(3))
        text += (
            "\r\r"
            + bars
            + "\r"
            + " " * 60
            + f"\r{k}         {0.9 - k / 10:.6f}    0.673018    0.562500  00:00     \n"
        )
    (path := tmp_path / "a.log").write_text(text)
    log, steps, values = losses(path)
    assert log.columns[LOSS] == "train_loss"
    assert (steps, values) == (list(range(8)), pytest.approx([0.9 - k / 10 for k in range(8)]))


@pytest.mark.parametrize("label", ["[pod/trainer-{}/main] ", "trainer-{}  | ", "node0{}: "])
@pytest.mark.parametrize("line", ["step {k} loss {x:.2f}", '{{"step": {k}, "loss": {x}}}'])
def test_what_clusters_put_before_lines_names_the_process(tmp_path, label, line):
    rows = [label.format(r) + line.format(k=k, x=9 - k / 10 + r) + "\n" for k in range(1, 9) for r in (0, 1)]
    (path := tmp_path / "a.log").write_text("".join(rows))
    first, second = open_logs([path])
    assert ("0" in first.name, "1" in second.name) == (True, True)
    assert losses(path, run=second.name)[2] == pytest.approx([10 - k / 10 for k in range(1, 9)])


def test_an_epochs_label_is_no_process(tmp_path):
    (path := tmp_path / "a.log").write_text(
        "".join(f"epoch-{e} | step {5 * e + k} loss {9 - e - k / 10:.2f}\n" for e in (1, 2) for k in range(5))
    )
    assert losses(path)[1] == list(range(5, 15))


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("[{k}]\ttraining's l2: {x:.6g}\tvalid_1's l2: 9.1", "training_l2"),
        ("[{k}]\tvalid's binary_logloss: 9.9\ttrain's binary_logloss: {x}", "train_binary_logloss"),
        ("[{k}]\ttrain-logloss:{x}+0.00234\ttest-logloss:9.50750+0.00362", "train-logloss"),
        ("[12:00:01] [{k}]\ttrain-rmse:{x}\teval-rmse:9.9", "train-rmse"),
        ("Epoch {k}: val loss 9.5 train loss {x}", "train loss"),
        ("{k} loss={x} aux=0.01", "loss"),
        ("INFO | ep=0 it={k} {{'loss': {x}, 'lr': 0.01}}", "loss"),
    ],
)
def test_lines_of_boosting_and_of_loops(tmp_path, line, name):
    (path := tmp_path / "a.log").write_text(many(line))
    log, steps, values = losses(path)
    assert log.columns[LOSS] == name
    assert (steps, values) == ([1, 2, 3, 4, 5], [8.9, 8.8, 8.7, 8.6, 8.5])


@pytest.mark.parametrize("metric", ["valid_0's binary_logloss: {x}", "validation_0-logloss:{x}"])
def test_validation_alone_can_be_named(tmp_path, metric):
    (path := tmp_path / "a.log").write_text(many("[{k}]\t" + metric))
    with pytest.raises(InputError, match="validation losses only") as refusal:
        open_logs([path])
    name = str(refusal.value).partition("--loss ")[2].strip("'")
    assert losses(path, loss=name)[1:] == ([1, 2, 3, 4, 5], [8.9, 8.8, 8.7, 8.6, 8.5])


def test_a_notebooks_epochs_before_the_first_logged_loss(tmp_path):
    rows = "".join(f"{k}\t{9 - k if k > 5 else 'No log'}\t9.1\n" for k in range(1, 9))
    (path := tmp_path / "a.txt").write_text("Epoch\tTraining Loss\tValidation Loss\n" + rows)
    assert losses(path)[1:] == ([6, 7, 8], [3.0, 2.0, 1.0])


def test_the_loss_of_a_batch_beside_its_running_mean(tmp_path):
    line = "accuracy: 0.51, batch_loss: {x}, loss: 9.2 ||:  {k}%|#     | {k}/40 [00:01<00:10,  1.20it/s]"
    (path := tmp_path / "a.log").write_text(many(line))
    assert losses(path)[0].columns[LOSS] == "batch_loss"


def test_big_visions_norms(tmp_path):
    lines = "".join(
        f"[{{k}}] {name} = {x}\n" for name, x in (("training_loss", "{x}"), ("l2_grads", "1.{k}"))
    )
    (path := tmp_path / "a.log").write_text(many(lines))
    log, steps, _ = losses(path)
    assert steps == [1, 2, 3, 4, 5]
    assert log.columns["train/-/gradient_norm"] == "l2_grads"


@pytest.mark.parametrize(
    "line",
    ["step {k} loss {x:.2f}", "k={k} loss={x:.2f}", "#{k} loss: {x:.2f}", "iter {k}: objective {x:.2f}"],
)
@pytest.mark.parametrize("heading", ["Evaluating...", "INFO - Running validation\nValidation", "Testing..."])
def test_an_evaluation_announced_hides_no_training(tmp_path, line, heading):
    """The lines below are training's again, though no heading says so."""
    rows = many(line, 40).splitlines(keepends=True)
    for at in (10, 20, 30):
        rows[at - 1] += f"{heading}\neval: val_loss 9.99\n"
    (path := tmp_path / "a.log").write_text("".join(rows))
    _, steps, values = losses(path)
    expected = [9 - k / 10 for k in range(1, 41)]
    if heading.endswith("..."):
        assert (steps, values) == (list(range(1, 41)), pytest.approx(expected))
    else:
        assert len(values) >= 37
        assert {*steps} <= {*range(1, 41)}


@pytest.mark.parametrize(
    "line",
    [
        "#{k} | loss {x:.2f}",
        "12:00:01 | #{k} | loss {x:.2f}",
        "s={k} tokens=4{k} loss={x:.2f}",
        "E1 S{k} | loss {x:.2f}",
        "  t={k} - loss = {x:.2f}",
    ],
)
def test_a_letter_or_a_sign_counts(tmp_path, line):
    (path := tmp_path / "a.log").write_text(many(line, 40))
    assert losses(path)[1] == list(range(1, 41))


def test_seconds_under_a_letter_count_nothing(tmp_path):
    (path := tmp_path / "a.log").write_text(
        "".join(f"s={3 * k + k % 2} loss={9 - k / 10:.2f}\n" for k in range(1, 41))
    )
    assert losses(path)[1] == list(range(40))
