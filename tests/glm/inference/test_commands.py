"""``glm generate``, ``glm evaluate`` and ``glm export`` as a user runs them."""

from __future__ import annotations

import dataclasses
import json

import pytest

from glm.cli import main
from glm.errors import InputError
from glm.inference.decoding import DecodingConfig, Span
from glm.inference.generation import fill, joined_text
from glm.inference.loading import OpenedModel


def said(capsys, *words):
    assert main(list(words)) == 0
    return capsys.readouterr()


def test_blanks_are_filled_one_after_another(run, opened, capsys):
    text = "The [MASK] statement, 训练[MASK]中断。"
    options = ["--method", "top-p", "--seed", "7", "--tokens", "5"]
    output = said(capsys, "generate", str(run), "--prompt", text, *options, "--json")
    found = json.loads(output.out)
    assert len(found["blanks"]) == 2
    first, second = found["blanks"]
    assert found["text"] == f"The {first} statement, 训练{second}中断。"
    assert all(1 <= len(span["tokens"]) <= 5 for span in found["spans"] if span["ended"] == "length")
    # The Python API gives the same, and so does the command again.
    api = fill(opened, text, DecodingConfig(method="top-p", seed=7, tokens=5))
    assert (api.text, list(api.blanks)) == (found["text"], found["blanks"])
    plain = said(capsys, "generate", str(run), "--prompt", text, *options)
    assert plain.out == found["text"] + "\n"
    assert "tokens/s" in plain.err
    assert api.timing.prefill_tokens > 0
    assert api.timing.decode_tokens == sum(len(span.tokens) - (span.ended == "length") for span in api.spans)


@pytest.mark.parametrize("method", ["greedy", "top-p", "beam"])
def test_a_text_is_continued_up_to_the_positions(causal_run, run, capsys, method):
    for model in (run, causal_run):
        text = "The import statement"
        out = said(
            capsys, "generate", str(model), "--prompt", text, "--method", method, "--tokens", "200", "--json"
        ).out
        found = json.loads(out)
        assert found["text"] == text + found["blanks"][0]
        assert found["spans"][0]["ended"] in ("eop", "eos", "length")
        assert len(found["spans"][0]["tokens"]) < 96


def test_every_blank_has_room_however_long_the_others(opened):
    prompt = "[MASK]".join(["a"] * 6)
    filled = fill(opened, prompt, DecodingConfig(tokens=500))
    assert len(filled.spans) == 5
    assert all(span.tokens or span.ended != "length" for span in filled.spans)
    with pytest.raises(InputError, match="the model has 96 positions: nothing can be generated"):
        fill(opened, "[MASK]".join(["a"] * 60))


@pytest.mark.parametrize(
    ("before", "joined"), [("the", " import"), ("the ", "import"), ("类型：", "import"), ("", "import")]
)
def test_a_space_between_two_words_is_not_lost(opened, before, joined):
    tokens = tuple(opened.tokenizer.encode("import"))
    span = Span(tokens=tokens, log_probability=0.0, ended="eop")
    assert joined_text(before, span, opened.tokenizer) == joined


def test_two_dimensional_positions_are_used_where_they_were_trained(opened):
    objective = dataclasses.replace(opened.config.objective, positions="2d")
    two = OpenedModel(opened.model, opened.tokenizer, dataclasses.replace(opened.config, objective=objective))
    # This model has 1-D rotary positions, which ignore the second one.
    assert fill(two, "The[MASK]").text == fill(opened, "The[MASK]").text


def test_an_evaluation_as_tables_and_as_json(run, task_data, tmp_path, capsys):
    words = ["evaluate", str(run), "--data", str(task_data), "--rows", "2", "--examples", "10"]
    found = json.loads(said(capsys, *words, "--json").out)
    assert found["held_out"] is True
    assert {one["task"] for one in found["tasks"]} == {"parity-en", "parity-zh"}
    assert {one["language"] for one in found["last_words"]} == {"en", "zh"}
    assert {one["objective"] for one in found["perplexity"]} == {"[MASK]", "[gMASK]", "multi-task"}
    tables = said(capsys, *words).out
    for words_of in ("held-out perplexity", "[gMASK]", "last words", "parity-zh", "0.500"):
        assert words_of in tables
    # An export says too what it was trained on; a task of one's own needs no place in the data.
    said(capsys, "export", str(run), "--out", str(tmp_path / "export"))
    (tmp_path / "mine.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    (tmp_path / "mine.jinja").write_text("{{ a }} is[MASK] ||| one ||| one\ntwo")
    mine = [str(tmp_path / "export"), "--data", str(task_data), "--parts", "tasks", "--json"]
    found = json.loads(said(capsys, "evaluate", *mine, "--tasks", str(tmp_path / "mine.jsonl")).out)
    assert found["held_out"] is True
    assert [(one["task"], one["examples"]) for one in found["tasks"]] == [("mine", 2)]
    assert found["perplexity"] == []


def test_other_data_are_told_of_or_refused(run, causal_run, task_data, data_folder, tmp_path, capsys):
    from glm.data.corpus import build_corpus
    from glm.data.sharding import build_shards

    text = tmp_path / "text.txt"
    text.write_text(
        "\n\n".join(f"Another text of document {n}, which is about nothing. " * 30 for n in range(40))
    )
    build_corpus((text,), tmp_path / "corpus", None)
    build_shards(tmp_path / "corpus", task_data / "tokenizer.model", tmp_path / "shards", 0.5, 1)
    words = ["evaluate", str(run), "--data", str(tmp_path / "shards"), "--parts", "perplexity", "--rows", "1"]
    assert "trained on another data folder" in " ".join(said(capsys, *words).out.split())
    refused(["evaluate", str(run), "--data", str(data_folder)], capsys, "another tokenizer")
    refused(
        ["evaluate", str(run), "--data", str(tmp_path / "shards"), "--parts", "tasks"], capsys, "no tasks"
    )
    # Evaluation leaves out the parts that the data do not allow, unless asked for them by name.
    words = ["evaluate", str(run), "--data", str(tmp_path / "shards"), "--rows", "1", "--examples", "5"]
    out = said(capsys, *words).out
    assert "held-out perplexity" in out
    assert "zero-shot" not in out


def refused(words, capsys, *says):
    try:
        code = main(words)
    except SystemExit as stop:
        code = stop.code
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert lines[-1].startswith("error: ")
    assert len([line for line in lines if line.startswith("error")]) == 1
    assert all(said in lines[-1] for said in says), lines[-1]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("generate nowhere --prompt a", "does not exist"),
        ("generate RUN", "prompt"),
        ("generate RUN --prompt ", "empty"),
        ("generate RUN --prompt [sMASK]a", "[sMASK], which the tokenizer does not know"),
        ("generate RUN --prompt a --top-p 2", "top-p is a probability"),
        ("generate RUN --prompt a --beams 0", "beams must be at least 1"),
        ("generate RUN --prompt a --method best", "greedy"),
        ("generate RUN --prompt a --device nothing", "--device nothing cannot be used"),
        ("generate CAUSAL --prompt a[MASK]", "trained on next tokens alone"),
        ("evaluate RUN", "data"),
        ("evaluate RUN --data nowhere", "nowhere"),
        ("evaluate RUN --data DATA --rows 0", "--rows and --examples must be at least 1"),
        ("evaluate RUN --data DATA --parts", "parts"),
        ("export RUN --out RUN", "exists already"),
        ("export nowhere --out x", "does not exist"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(run, causal_run, task_data, capsys, words, says):
    places = {"RUN": str(run), "CAUSAL": str(causal_run), "DATA": str(task_data)}
    refused([places.get(word, word) for word in words.split(" ")], capsys, says)


def test_a_prompt_longer_than_the_positions_is_refused(run, capsys):
    refused(
        ["generate", str(run), "--prompt", "word " * 300], capsys, "tokens and the model has 96 positions"
    )
