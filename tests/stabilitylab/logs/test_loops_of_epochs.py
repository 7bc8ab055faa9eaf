"""Loops of epochs as people write them: settings first, an evaluation after each epoch, a traceback at the end."""

import pytest

from tests.stabilitylab.logs.told import losses

SETTINGS = '{"lr": 0.001, "loss": "ce", "epochs": 3}\n'
INDENTED = '{\n  "lr": 0.001,\n  "loss": "ce"\n}\n'
WARNED = '/usr/lib/x.py:12: UserWarning: loss 1.0 is deprecated\n  warnings.warn("loss 1.0")\n'
CRASHED = (
    'Traceback (most recent call last):\n  File "a.py", line 2, in <module>\nRuntimeError: loss 3 is nan\n'
)
LINES = [
    "[{e}, {i:5d}] loss: {x}",
    "INFO:main:[{e}, {i:5d}] loss: {x}",
    "12:00:01 - epoch {e} batch {i} loss {x}",
    "Epoch: [{e}][{i}/20]\tTime 0.123 (0.125)\tLoss {x} (9.9999)\tAcc@1 12.50 (11.11)",
    "[2025-01-01 12:00:01] E{e} | B{i}/20 | loss {x}",
    "INFO:main:| epoch {e} | {i}/20 batches | loss {x} | ppl 99.99",
    "epoch {e}, minibatch {i}/20, training loss {x}",
]


def log_of(line, first="", evaluation="", last=""):
    """Three epochs of twenty batches, and what their losses are."""
    told = [round(9 - k / 10, 1) for k in range(60)]
    rows = first
    for e in range(3):
        rows += "".join(line.format(e=e + 1, i=i, x=told[20 * e + i]) + "\n" for i in range(20)) + evaluation
    return rows + last, told


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("first", ["", SETTINGS, INDENTED, WARNED])
def test_settings_and_warnings_above_a_log_are_not_its_records(tmp_path, line, first):
    text, told = log_of(line, first=first, last=CRASHED)
    (path := tmp_path / "a.log").write_text(text)
    _, steps, values = losses(path)
    assert values == told
    assert sorted({*steps}) == steps


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize(
    "evaluation",
    [
        "Evaluation\n  loss: 50.1\n  acc: 0.5\n",
        "INFO:main:---- eval ----\nINFO:main:loss 50.1 acc 0.5\nINFO:main:---- train ----\n",
        "[2025-01-01 12:00:01] Validation\n[2025-01-01 12:00:01] loss 50.1 acc 0.5\n",
    ],
)
def test_an_evaluation_after_each_epoch_hides_and_adds_nothing(tmp_path, line, evaluation):
    text, told = log_of(line, evaluation=evaluation)
    (path := tmp_path / "a.log").write_text(text)
    assert losses(path)[2] == told
