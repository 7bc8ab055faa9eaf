"""What a watch says about logs that grow, rotate and are rewritten: each finding once, at its value."""

import json
import time
from pathlib import Path

import numpy as np
import pytest

from stabilitylab.errors import InputError
from stabilitylab.logs.locate import locate
from stabilitylab.spikes.detector import SpikeDetector
from stabilitylab.telemetry import LOSS
from stabilitylab.watching.rules import RULES
from tests.stabilitylab.watching.growing import Watched, append, losses, megatron

DOCS = Path(__file__).parents[3] / "docs" / "watch.md"


def test_a_spike_is_told_at_the_line_at_which_the_detector_tells_it(log, tmp_path):
    curve = losses(700, spike=600)
    detector = SpikeDetector()
    told = next(
        step
        for step, loss in enumerate(curve)
        for event in detector.update(step, {LOSS: loss})
        if event.kind == "spike"
    )
    watched = Watched(log, tmp_path / "state")
    assert watched.look() == []
    assert "not there yet" in watched.watch.problem
    for step, loss in enumerate(curve):
        append(log, megatron(step, loss))
        if step % 50 == 0 or step >= 600:
            new = [one for one in watched.look() if one[0] == "spike"]
            assert new == ([("spike", told)] if step == told else [])
    assert [alert.rule for alert in watched.said] == ["spike", "over"]
    assert watched.said[0].text.startswith(f"step {told}: spike: lm loss has risen by")


def test_a_short_file_is_read_at_the_next_look_however_long_one_took(log, tmp_path, monkeypatch):
    def stands_still(path):
        time.sleep(0.2)
        return locate(path)

    watched = Watched(log, tmp_path / "state")
    monkeypatch.setattr("stabilitylab.watching.watch.locate", stands_still)
    watched.look()
    assert "not there yet" in watched.watch.problem
    append(log, "".join(megatron(k, x) for k, x in enumerate(losses(100))))
    watched.look()
    assert watched.watch.judges[""].curves[LOSS].step == 99


def test_a_vanishing_loss_is_nan_and_one_line_ends_it(log, tmp_path):
    watched = Watched(log, tmp_path / "state")
    append(log, "".join(megatron(k, x) for k, x in enumerate(losses(200))))
    assert watched.look() == []
    append(log, megatron(200, None))
    assert watched.look() == [("non-finite", 200)]
    append(log, megatron(201, None))
    assert watched.look() == []


def test_half_a_line_is_left_for_later(log, tmp_path):
    watched = Watched(log, tmp_path / "state")
    text = "".join(megatron(k, x) for k, x in enumerate(losses(100)))
    append(log, text[:-40])
    watched.look()
    assert watched.watch.judges[""].curves[LOSS].step == 98
    append(log, text[-40:])
    watched.look()
    assert watched.watch.judges[""].curves[LOSS].step == 99


@pytest.mark.parametrize("how", ["renamed", "copied", "shorter"])
def test_rotation_and_truncation_lose_nothing_that_is_there(log, tmp_path, how):
    curve = losses(700, spike=600)
    lines = [megatron(k, x) for k, x in enumerate(curve)]
    watched = Watched(log, tmp_path / "state")
    log.write_text("".join(lines[:500]))
    watched.look()
    append(log, "".join(lines[500:520]))
    if how == "renamed":  # its last lines are read after it has lost its name
        log.rename(log.with_suffix(".log.1"))
        log.write_text("".join(lines[520:610]))
    else:
        watched.look()
        log.write_text("".join(lines[520:610]) * (1 if how == "shorter" else 8))
    watched.look()
    said = watched.rules()
    assert said[0] == ("rotated" if how == "renamed" else "truncated")
    assert "spike" in said
    assert watched.watch.judges[""].curves[LOSS].step == 609
    assert "restarted" not in said or how == "copied"


def test_a_table_written_anew_with_another_column_repeats_nothing(log, tmp_path):
    curve = losses(700, spike=600)
    watched = Watched(log.with_suffix(".csv"), tmp_path / "state")
    file = watched.path
    file.write_text("step,loss\n" + "".join(f"{k},{x}\n" for k, x in enumerate(curve[:650])))
    watched.look()
    # Lightning's CSVLogger rewrites its file when a metric comes in.
    file.write_text("step,acc,loss\n" + "".join(f"{k},1.0,{x}\n" for k, x in enumerate(curve)))
    watched.look()
    assert watched.rules() == ["spike", "over", "truncated"]
    assert watched.watch.judges[""].curves[LOSS].step == 699


def test_a_checkpoint_taken_up_again_is_a_restart_and_a_count_from_zero_another_run(log, tmp_path):
    curve = losses(300)
    watched = Watched(log, tmp_path / "state")
    append(log, "".join(megatron(k, x) for k, x in enumerate(curve, start=1)))
    watched.look()
    append(log, "".join(megatron(k, curve[k]) for k in range(200, 260)))
    assert watched.look() == [("restarted", 200)]
    assert watched.watch.judges[""].piece == 0
    append(log, "".join(megatron(k, x) for k, x in enumerate(losses(300, spike=250, seed=1), start=1)))
    found = watched.look()
    assert watched.watch.judges[""].piece == 1
    assert [rule for rule, _ in found] == ["restarted", "spike", "over"] or [rule for rule, _ in found] == [
        "spike",
        "over",
    ]


def test_nothing_is_said_twice_over_ends_and_begins(log, tmp_path):
    lines = [megatron(k, x) for k, x in enumerate(losses(900, spike=600))]
    watched = Watched(log, tmp_path / "state")
    for end in (300, 605, 620, 700, 900):
        log.write_text("".join(lines[:end]))
        watched.look()
        watched.end()
        watched.begin()
    assert watched.rules() == ["spike", "over"]
    assert watched.watch.judges[""].curves[LOSS].step == 899
    # From the state before the spike on, as after a kill: the journal knows.
    state = json.loads((tmp_path / "state" / "state.json").read_text())
    watched.end()
    (tmp_path / "state" / "state.json").unlink()
    watched.begin()
    watched.look()
    assert watched.rules() == ["spike", "over"]
    assert state["values"] == watched.watch.values == 900


def test_a_silent_run_is_told_once_and_so_is_its_voice(log, tmp_path):
    lines = [megatron(k, x) for k, x in enumerate(losses(100))]
    watched = Watched(log, tmp_path / "state", silent_after=60.0)
    append(log, "".join(lines[:50]))
    watched.look()
    watched.watch.last_value -= 61
    assert watched.look() == [("silent", 49)]
    assert watched.look() == []
    watched.end()
    watched.begin()
    assert watched.look() == []
    append(log, "".join(lines[50:]))
    assert watched.look() == [("speaking-again", None)]


def test_what_cannot_be_chosen_is_said_as_spikes_says_it(log, tmp_path):
    log.write_text(
        "".join(json.dumps({"step": k, "gen_loss": 1.0, "disc_loss": 2.0}) + "\n" for k in range(40))
    )
    watched = Watched(log, tmp_path / "state")
    watched.look()
    assert "--loss gen_loss or --loss disc_loss" in watched.watch.problem
    with pytest.raises(InputError, match="several loss columns"):
        watched.look(last=True)
    watched.end()
    again = Watched(log, tmp_path / "other", loss="gen_loss")
    again.look()
    assert again.watch.judges[""].curves[LOSS].step == 39


def test_a_long_preface_is_said_once_and_the_log_is_read_when_it_begins(log, tmp_path):
    watched = Watched(log, tmp_path / "state")
    append(log, "compiling kernels, please wait\n" * 40_000)
    assert watched.look() == [("unreadable", None)]
    watched.watch._retry_at = 0.0
    assert watched.look() == []
    append(log, "".join(megatron(k, x) for k, x in enumerate(losses(640, spike=600))))
    watched.watch._retry_at = 0.0
    assert [rule for rule, _ in watched.look()] == ["spike", "over"]


def test_records_over_several_lines_wait_for_the_rest(log, tmp_path):
    watched = Watched(log, tmp_path / "state")
    for k, x in enumerate(losses(30), start=1):
        append(log, f"2026-08-08 INFO [x:68] [step={k}/3,000,epoch=1]\n    optim/total grad norm=1.0\n")
        watched.look()
        # A beginning without a loss is no log yet, and is looked at again after a while.
        watched.watch._retry_at = 0.0
        append(log, f"    train/CE loss={x:.4f}\n    train/PPL=9.0\n")
        watched.look()
    judge = watched.watch.judges[""]
    assert judge.curves[LOSS].step == 29
    assert len(judge.curves[LOSS].values) == 29


def test_whole_and_grown_logs_are_judged_alike(log, tmp_path):
    curve = losses(1500, spike=800)
    rng = np.random.default_rng(1)
    text = "".join(megatron(k, x) for k, x in enumerate(curve, start=1))
    whole = Watched(log, tmp_path / "whole")
    log.write_text(text)
    whole.look()
    grown = Watched(tmp_path / "grown.log", tmp_path / "grown")
    at = 0
    while at < len(text):
        size = int(rng.integers(1, 4000))
        append(grown.path, text[at : at + size])
        at += size
        grown.look()
    assert [a.id for a in grown.said] == [a.id for a in whole.said]
    assert [a.text for a in grown.said] == [a.text for a in whole.said]


def test_the_rules_are_those_of_the_page():
    rows = [
        line.split("|") for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith("| `")
    ]
    told = {row[1].strip().strip("`"): (row[2].strip(), row[3].strip()) for row in rows}
    assert told == {rule.id: (rule.severity, rule.meaning) for rule in RULES.values()}


def test_a_folder_that_may_not_be_entered_is_waited_for(log, tmp_path, monkeypatch):
    """``is_dir`` raises where a network file system does not answer, or without the rights to enter."""
    watched = Watched(log, tmp_path / "state")
    append(log, "".join(megatron(k, x) for k, x in enumerate(losses(100))))
    watched.look()
    assert watched.watch.values == 100
    is_dir = Path.is_dir

    def stale(self):
        if self == log:
            raise OSError(116, "Stale file handle", str(self))
        return is_dir(self)

    monkeypatch.setattr(Path, "is_dir", stale)
    watched.watch._located_at = -1e9
    append(log, megatron(100, 2.0))
    assert watched.look() == []
    assert watched.watch.values == 101  # an open file is read all the same


def test_settings_that_stand_alone_at_first_do_not_settle_the_format(log, tmp_path):
    """A trainer that prints its arguments as JSON was watched as a log of JSON lines, and no spike was ever told."""
    watched = Watched(log, tmp_path / "state")
    log.write_text('{"lr": 0.1, "loss": "ce"}\n')
    watched.look()
    append(log, "".join(f"step {k} loss {x:.4f}\n" for k, x in enumerate(losses(700, spike=600))))
    watched.look()
    assert watched.rules() == ["spike", "over"]


def test_a_bars_states_are_one_value_a_step(log, tmp_path):
    watched = Watched(log, tmp_path / "state")
    told = [f"{x:.4f}" for x in losses(700, spike=600)]
    states = [
        f"\r  1%|#   | {k}/700 [00:01<09:00, 1.20it/s, loss={x}]"
        for k in range(700)
        for x in (told[max(k - 1, 0)], told[k])
    ]
    for begin in range(0, len(states), 333):
        append(log, "".join(states[begin : begin + 333]))
        watched.look()
    assert watched.rules() == ["spike", "over"]
    assert watched.watch.judges[""].curves[LOSS].step in (698, 699)
