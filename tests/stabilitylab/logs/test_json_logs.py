"""JSON lines, JSON documents, and lines that a log service has wrapped in JSON."""

import json
import math

import pytest

from stabilitylab.logs.recognise import open_logs
from stabilitylab.spikes.commands import spikes
from stabilitylab.telemetry import GRADIENT_NORM, LEARNING_RATE, LOSS
from tests.stabilitylab.logs.told import losses, many, said

WRAPPED = [
    lambda text: json.dumps({"log": text + "\n", "stream": "stdout", "time": "2026-01-01T10:00:00Z"}),
    lambda text: json.dumps({"textPayload": text, "severity": "INFO"}),
    lambda text: json.dumps({"asctime": "10:00:00", "levelname": "INFO", "message": text}),
]


@pytest.mark.parametrize("wrap", WRAPPED)
def test_what_a_container_put_into_json_is_taken_out(tmp_path, capsys, wrap):
    path = tmp_path / "log.jsonl"
    lines = many(" iteration {k}/ 9 | lm loss: {x:.4E} | grad norm: 0.75 |").splitlines()
    path.write_text("".join(wrap(line) + "\n" for line in ["building", *lines, "saving"]))
    found = said(capsys, path)
    assert (found["format"], found["segments"][0]["values"]) == ("Megatron-LM", 5)


def test_curves_events_and_records_of_one_value(tmp_path):
    path = tmp_path / "log.json"
    steps, values = [10, 20, 30], [3.0, 2.0, 1.0]
    rows = list(zip(steps, values, strict=True))
    documents = [
        [[1.7e9, step, value] for step, value in rows],
        {"metrics": [{"key": "train_loss", "value": value, "step": step} for step, value in rows]},
        {"loss": {"train": {"x": steps, "y": values}}},
        {"lm loss": {"start_step": 10, "step_interval": 10, "values": values}, "iteration_timing_avg": 0.1},
    ]
    for document in documents:
        path.write_text(json.dumps(document))
        assert losses(path)[1:] == (steps, values)
    event = {"event_type": "POINT_IN_TIME", "key": "train_loss"}
    lines = [
        f"0: :::MLLOG {json.dumps({**event, 'value': x, 'metadata': {'samples_count': k}})}" for k, x in rows
    ]
    path.write_text("\n".join(["starting", *lines, ""]))
    assert losses(path)[1:] == (steps, values)


@pytest.mark.parametrize(
    ("names", "loss", "norm", "rate"),
    [
        (["optim/total grad norm", "optim/LR (group 0)", "train/CE loss"], 2, 0, 1),
        (["Train lr-DecoupledAdamW/group0", "Train l2_norm/grad/global", "Train loss/train/total"], 2, 1, 0),
        (["current_batch_loss", "epoch_avg_loss", "optim0_lr0"], 0, None, 2),
        (["critic_loss", "critic_lr", "policy_loss", "policy_lr", "actor_grad_norm"], 2, 4, 3),
        (["config/lr", "loss", *(f"grad_norm/layer{i}" for i in range(9))], 1, None, None),
    ],
)
def test_rates_and_norms_by_a_part_of_their_name(tmp_path, names, loss, norm, rate):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(dict.fromkeys(names, 0.1 * k)) + "\n" for k in range(1, 5)))
    (log,) = open_logs([path])
    found = [log.columns.get(signal) for signal in (LOSS, GRADIENT_NORM, LEARNING_RATE)]
    assert found == [None if i is None else names[i] for i in (loss, norm, rate)]


def test_trainer_state_whole_cut_and_in_checkpoints(tmp_path, capsys):
    rows = [
        {"step": k, "loss": 3.0, "grad_norm": math.nan if k == 9 else 1.0, "epoch": k / 9}
        for k in range(1, 10)
    ]
    state = {"log_history": [*rows, {"step": 9, "eval_loss": 2.0}, {"step": 9, "train_loss": 2.9}]}
    for number in (5, 10):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps(state, indent=2))
    log, steps, values = losses(tmp_path)
    assert (steps, values) == (list(range(1, 10)), [3.0] * 9)
    assert any("filter" in note for note in log.notes)
    assert sum(log.left_out.values()) == 2
    text = json.dumps(state, indent=2)
    (tmp_path / "cut.json").write_text(text[: text.index('"step": 6')])
    log, steps, _ = losses(tmp_path / "cut.json")
    assert steps == [1, 2, 3, 4, 5]
    assert any("cut short" in note for note in log.notes)


@pytest.mark.parametrize(
    ("rows", "segments"),
    [
        ([{"step": k, "rank": r, "loss": 3.0} for k in range(9) for r in (1, 0)], {"rank 1": 9, "rank 0": 9}),
        ([{"step": k % 5, "loss": 3.0} for k in range(10)], {"run 1": 5, "run 2": 5}),
        ([{"step": k, "loss": 3.0} for k in (0, 1, 2, 3, 4, 3, 4, 5)], {"": 8}),  # a restart
        ([{"epoch": k // 5, "iter": k % 5, "loss": 3.0} for k in range(10)], {"": 10}),
        (
            [{"mode": m, "epoch": 1, "iter": k, "loss": 3.0} for k in range(1, 9) for m in ("train", "val")],
            {"": 8},
        ),
        ([{"global_step/max_steps": f"{k}/9", "loss": "NaN"} for k in range(9)], {"": 9}),
        ([{"msg": "train", "step": k, "metrics": {"loss": 3.0}} for k in range(9)], {"": 9}),
    ],
)
def test_segments_of_json_lines(tmp_path, capsys, rows, segments):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert {one["name"]: one["values"] for one in said(capsys, path)["segments"]} == segments


def test_golden_values_and_columns(tmp_path):
    path = tmp_path / "golden.json"
    path.write_text(json.dumps({"lm loss": {"start_step": 0, "step_interval": 5, "values": [3, 2, 1]}}))
    assert losses(path)[1:] == ([0, 5, 10], [3, 2, 1])
    path.write_text(json.dumps({"lm loss": {"start_step": 1, "values": {"1": 3.0, "6": "nan"}}}))
    assert losses(path)[1] == [1, 6]
    path.write_text(json.dumps({"config": {"lr": 1}, "history": {"loss": [3, 2], "val_loss": [4, 4]}}))
    assert losses(path)[2] == [3, 2]


def test_what_one_rank_alone_has_is_said(tmp_path, capsys):
    path = tmp_path / "ranks.jsonl"
    rows = [
        {"step": k, "rank": rank, "loss": math.nan if rank == 2 and k >= 120 else 5 - k / 100 + rank / 50}
        for k in range(200)
        for rank in (1, 0, 3, 2)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spikes((path,))
    assert (
        "rank 2 alone of 4 ranks: non-finite from step 120, 1 of 4 values a step\n" in capsys.readouterr().out
    )
