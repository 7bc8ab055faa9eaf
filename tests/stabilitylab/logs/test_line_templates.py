"""A plan of a line reads what the formats read, whatever the numbers are."""

import random

import pytest

from stabilitylab.logs import line_templates
from stabilitylab.logs.console import _reader
from stabilitylab.logs.console_formats import FORMATS
from stabilitylab.logs.free_text import ANY_TEXT

LINES = [
    "iter {i}: loss {f}, time {f}ms, mfu {f}%",
    "2026-11-29 10:{t}:{t},123 - INFO - [step {i}/100000] train loss: {f} | lr: {e} | grad_norm: {f} | tok/s: {i}",
    "[rank3]: step: {i}  loss: {f}  grad_norm: {f}  memory: {f}GiB(50.7%)  tps: 7,{t}3  mfu: {f}%",
    "Epoch: [1][{i}/3000]\tTime {f} ({f})\tLoss {f} ({f})\tlr {e}",
    "step {i:8d} | loss {f} | val_0_auc {f} | top1 {f} | {i} of 4000 done",
    "I1129 10:{t}:{t}.1234 77 solver.cpp:228] Iteration {i}, loss = {f}",
    "s:{i} trl:{f} lr:{e} norm:{f}",
    " iteration {i:8d}/  5000 | consumed samples: {i:12d} | learning rate: {e} | lm loss: {e} | loss scale: {f} | grad norm: {f} |",
    "{i} of 300 | loss {f} on gpu{t} | eta 1:{t}:{t}",
    "step {i:,} loss {f}",
    "[{t}, {i}] loss: -{f}",
    "Test: [{i}/40] Loss {f}",
    "loss nan at step {i}, lr {e}",
]


class Number:
    """Another number each time it is put into a line."""

    def __init__(self, draw, make):
        self.draw, self.make = draw, make

    def __format__(self, how):
        made = self.make(self.draw)
        return format(made, how) if how else str(made)


@pytest.mark.parametrize("line", LINES)
def test_plans_read_what_the_format_reads(line, monkeypatch):
    monkeypatch.setattr(line_templates, "_WARM", 2)
    draw = random.Random(0)
    numbers = {
        "i": Number(draw, lambda d: d.randint(0, 10 ** d.randint(1, 7))),
        "f": Number(draw, lambda d: f"{d.random() * 10 ** d.randint(-2, 3):.{d.randint(1, 6)}f}"),
        "e": Number(draw, lambda d: f"{d.random():.{d.randint(1, 6)}e}"),
        "t": Number(draw, lambda d: f"{d.randint(0, 59):02d}"),
    }
    for one in (ANY_TEXT, *(some for some in FORMATS if some.steady)):
        read = _reader(one)
        planned = line_templates.Plans(read)
        for _ in range(60):
            text = line.format(**numbers)
            assert repr(planned.read(text)) == repr(read(text)), (one.name, text)


def test_most_lines_are_read_by_plans():
    calls = 0
    direct = _reader(ANY_TEXT)

    def read(line):
        nonlocal calls
        calls += 1
        return direct(line)

    planned = line_templates.Plans(read)
    for k in range(5000):
        planned.read(f"2026-11-29 10:00:{k % 60:02d},1 step {k}/9999 | loss {k / 7:.4f} | lr 1.5e-05")
    assert calls < 150
