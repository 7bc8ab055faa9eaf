"""Which column is the loss, which one counts, and what a refusal offers."""

import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from stabilitylab.errors import InputError
from stabilitylab.logs.recognise import open_logs
from stabilitylab.spikes.commands import spikes
from stabilitylab.telemetry import LOSS
from tests.stabilitylab.logs.told import losses, many


def json_lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_refusal_offers_neither_counters_nor_times_nor_rates(tmp_path):
    rows = [
        {"train_steps_done": k, "elapsed_s": 1.5 * k, "lr": 0.1 / k, "count": k, "wer": 9 / k}
        for k in range(1, 9)
    ]
    with pytest.raises(InputError) as refusal:
        open_logs([json_lines(tmp_path / "a.jsonl", *rows)])
    assert str(refusal.value).endswith("name one with --loss: --loss wer")
    rows = [{"words": 10 * k, "update": k, "penalty": 9 / k} for k in range(1, 9)]
    with pytest.raises(InputError) as refusal:
        open_logs([json_lines(tmp_path / "a.jsonl", *rows)])
    assert str(refusal.value).endswith("--loss penalty or --loss words")


def test_the_counter_stands_beside_its_loss_not_in_a_time(tmp_path):
    rows = [{"ts": 1.7e9 + k, "event": "train", "data": {"step": 5 * k, "loss": 9 / k}} for k in range(1, 9)]
    _, steps, _ = losses(json_lines(tmp_path / "a.jsonl", *rows))
    assert steps == list(range(5, 41, 5))
    rows = [{"created": 1_700_000_000 + k, "loss": 9 / k} for k in range(1, 9)]
    assert losses(json_lines(tmp_path / "a.jsonl", *rows))[1] == list(range(8))


def test_a_speed_that_rises_counts_nothing(tmp_path):
    line = "Progress: {k}.0% words/sec/thread: 12{k} lr:  0.099 avg.loss:  {x:.6f} ETA:   0h 0m12s"
    (path := tmp_path / "a.log").write_text(many(line))
    assert "step" not in losses(path)[0].columns


def test_a_running_mean_is_not_the_loss_beside_it(tmp_path):
    """OpenRLHF's bar; an auxiliary term beside a mean is not the loss."""
    line = " {k}%|## | {k}/9 [00:01<00:09,  1.20it/s, gpt_loss={x:.3f}, loss_mean=9.2, lr=1e-5]"
    (path := tmp_path / "a.log").write_text(many(line))
    assert losses(path)[0].columns[LOSS] == "gpt_loss"
    path.write_text(many("step {k} aux_loss 0.01{k} mean_loss {x:.3f}"))
    assert losses(path)[0].columns[LOSS] == "mean_loss"


def test_names_of_columns_in_another_language(tmp_path):
    (path := tmp_path / "a.csv").write_text(
        "Schritt;Verlust;Lernrate\n" + many("{k};{x};0,1").replace(".", ",")
    )
    log, steps, values = losses(path)
    assert (steps, values) == ([1, 2, 3, 4, 5], [8.9, 8.8, 8.7, 8.6, 8.5])
    assert log.columns["train/-/learning_rate"] == "Lernrate"


def test_points_part_thousands_where_commas_part_fractions(tmp_path):
    (path := tmp_path / "a.csv").write_text("step;loss\n9.000;1.203,5\n10.000;1.102,5\n11.000;999,5\n")
    assert losses(path)[1:] == ([9000, 10000, 11000], [1203.5, 1102.5, 999.5])


def test_a_coloured_table(tmp_path):
    """skorch marks the best value of each column."""
    head = "  epoch    train_loss    valid_loss     dur\n-------  ------------  ------------  ------\n"
    rows = many("      {k}        \x1b[36m{x:.4f}\x1b[0m        \x1b[35m9.1234\x1b[0m  0.0512")
    (path := tmp_path / "a.log").write_text(head + rows)
    assert losses(path)[1:] == ([1, 2, 3, 4, 5], [8.9, 8.8, 8.7, 8.6, 8.5])


@pytest.mark.parametrize("key", ["{}", "epoch_{}", "step {}"])
def test_a_json_object_of_steps(tmp_path, key):
    document = {key.format(10 * k): {"train_loss": 9 / k, "val_loss": 9.9} for k in range(1, 6)}
    for indent in (None, 1):
        (path := tmp_path / "a.json").write_text(json.dumps(document, indent=indent))
        assert losses(path)[1:] == ([10, 20, 30, 40, 50], [9.0, 4.5, 3.0, 2.25, 1.8])


def test_one_value_a_line_under_a_short_name(tmp_path):
    rows = [{"key": key, "step": k, "val": k / 10} for k in range(1, 6) for key in ("loss", "lr")]
    log, steps, values = losses(json_lines(tmp_path / "a.jsonl", *rows))
    assert (steps, values) == ([1, 2, 3, 4, 5], [0.1, 0.2, 0.3, 0.4, 0.5])
    assert log.columns["train/-/learning_rate"] == "lr"


@pytest.mark.parametrize(
    ("line", "chosen"),
    [
        ("step {k} cross-entropy {x} z_loss 0.0001", "cross-entropy"),
        ("step {k} nll {x} aux_loss 0.01", "nll"),
        ("step {k} trainLoss {x} aux_loss 0.01", "trainLoss"),
        ("step {k} cross_entropy_loss {x} avg_loss 9.5", "cross_entropy_loss"),
        ("step {k} objective {x} aux_loss 0.01{k}", "objective"),
        ("step {k} objective {x} eta 0:10:0{k}\nval_loss 9.9", "objective"),
    ],
)
def test_beside_terms_that_steady_a_model(tmp_path, line, chosen):
    (path := tmp_path / "a.log").write_text(many(line, 9))
    assert losses(path)[0].columns[LOSS] == chosen


def test_a_steadying_term_alone_is_no_loss(tmp_path):
    rows = [{"step": k, "objective": 9 / k, "aux_loss": 0.01 / k} for k in range(1, 6)]
    with pytest.raises(InputError, match="no loss but terms that steady a model") as refusal:
        losses(json_lines(tmp_path / "a.jsonl", *rows))
    assert str(refusal.value).endswith("--loss objective or --loss aux_loss")


def test_names_whose_words_a_capital_letter_parts(tmp_path):
    rows = [
        {"globalStep": 5 * k, "trainLoss": 9 / k, "learningRate": 0.1, "gradNorm": 1.5} for k in range(1, 6)
    ]
    log, steps, _ = losses(json_lines(tmp_path / "a.jsonl", *rows))
    assert steps == [5, 10, 15, 20, 25]
    assert [*log.columns.values()] == ["trainLoss", "globalStep", "gradNorm", "learningRate"]


def test_names_are_no_markup(tmp_path, capsys):
    """A run called [/] ended ``spikes`` in a traceback, and one called [red] lost its name."""
    runs = ("[/]", "[red]a")
    rows = [
        {"run": run, "step": k, "loss": 3 - k / 100 + 5 * (k == 60), "[b]": k}
        for run in runs
        for k in range(99)
    ]
    path = json_lines(tmp_path / "[bold]a.jsonl", *rows)
    spikes((path,))
    said = capsys.readouterr().out
    assert all(f"[bold]a.jsonl, {run}: 1 " in said for run in runs)
    assert all(f"[bold]a.jsonl, {run} " in said for run in runs)  # the tables' titles


@pytest.mark.parametrize("name", ["step_id", "iter_idx", "timestep", "n_steps", "total_steps"])
@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_other_names_of_steps_come_before_amounts(tmp_path, name, form):
    rows = [{"": k, "tokens": 4096 * k, "loss": 9 / k, name: 5 * k} for k in range(1, 41)]
    path = tmp_path / f"a.{form}"
    if form == "csv":
        path.write_text(
            ",".join(rows[0]) + "\n" + "".join(",".join(map(str, r.values())) + "\n" for r in rows)
        )
    elif form == "jsonl":
        evaluated = [{name: row[name], "eval_loss": 9.0} for row in rows]
        some = [one for k, row in enumerate(rows) for one in ((row, evaluated[k]) if k % 8 == 7 else (row,))]
        json_lines(path, *some)
    else:
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    assert losses(path)[1] == list(range(5, 201, 5))


def test_amounts_that_stand_still_count_nothing(tmp_path):
    rows = [{"total_steps": 1000, "n_steps": 8, "it": k, "loss": 9 / k} for k in range(1, 41)]
    assert losses(json_lines(tmp_path / "a.jsonl", *rows))[1] == list(range(1, 41))


def test_a_part_is_not_the_loss_because_the_rest_is_an_average(tmp_path):
    for part in ("aux_loss", "kl_loss"):
        rows = [{"step": k, part: 0.01, "avg_train_loss": 9 / k} for k in range(1, 9)]
        with pytest.raises(InputError, match="several loss columns"):
            losses(json_lines(tmp_path / "a.jsonl", *rows))


@pytest.mark.parametrize("name", ["ce", "train/ce", "objective", "nll"])
def test_losses_without_the_word_in_tables_and_documents(tmp_path, name):
    rows = [{"step": k, "lr": 0.1, name: 9 / k} for k in range(1, 6)]
    (tmp_path / "a.csv").write_text(f"step,lr,{name}\n" + "".join(f"{k},0.1,{9 / k}\n" for k in range(1, 6)))
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "b.json").write_text(json.dumps({key: [row[key] for row in rows] for key in rows[0]}))
    json_lines(tmp_path / "a.jsonl", *rows)
    for file in ("a.csv", "a.json", "b.json", "a.jsonl"):
        assert losses(tmp_path / file)[2] == [9.0, 4.5, 3.0, 2.25, 1.8]


def test_a_files_name_is_no_formula(tmp_path):
    (path := tmp_path / r"cost$\frac$.log").write_text(many("step {k} loss {x}", 40))
    spikes((path,), plot=(picture := tmp_path / "a.png"))
    assert picture.stat().st_size > 1000


@pytest.mark.parametrize(
    ("header", "chosen"),
    [
        ("step,bpb,val_bpb", "bpb"),
        ("step,perplexity,eval_perplexity", "perplexity"),
        ("step,train_rmse,test_rmse", "train_rmse"),
    ],
)
def test_what_stands_for_a_loss_in_a_table(tmp_path, header, chosen):
    (path := tmp_path / "a.csv").write_text(f"{header}\n" + many("{k},{x},99.5"))
    log, _, values = losses(path)
    assert log.columns[LOSS] == chosen
    assert values == [8.9, 8.8, 8.7, 8.6, 8.5]
