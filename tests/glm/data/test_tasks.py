"""Multi-task examples: templates, the user's own tasks, those of the default corpus, and the rows that they make."""

from __future__ import annotations

import gzip
import json
import math
import zipfile

import numpy as np
import pytest

from glm.cli import main
from glm.data.batch import NO_TARGET
from glm.data.config import ObjectiveConfig
from glm.data.corpus import build_corpus
from glm.data.documentation_tasks import PROMPTS, aws_tasks, tencent_tasks
from glm.data.loader import Loader
from glm.data.sharding import build_shards
from glm.data.shards import open_data
from glm.data.tasks import open_tasks
from glm.data.templates import Template
from glm.errors import InputError

REVIEWS = "{{ review }}\n这条评论是[MASK]的。 ||| {{ label }} ||| 正面\n负面"
SUMS = "{{ a }} + {{ b }} = ||| {{ a + b }}"


def fill(source, record):
    return Template(source, "t.jinja").fill(record, task="t", language="", group="g", where="line 1")


def test_a_template_makes_prompt_answer_and_choices():
    example = fill(REVIEWS, {"review": "很好 [MASK] ||| 不错", "label": "正面"})
    # What a record spells is neither a mask nor a divider.
    assert (example.before, example.after) == ("很好 [MASK] ||| 不错\n这条评论是", "的。")
    assert (example.answer, example.choices) == ("正面", ("正面", "负面"))
    assert fill(SUMS, {"a": 2, "b": 3}).prompt == "2 + 3 = [MASK]"


@pytest.mark.parametrize(
    ("source", "record", "says"),
    [
        ("{{ a }}", {}, "has 1 parts"),
        ("a|||b|||c|||d", {}, "has 4 parts"),
        ("{% if %} [MASK] ||| b", {}, "not valid Jinja"),
        ("{{ a }} ||| {{ b }}", {"a": 1}, "cannot be filled in from line 1 .*'b' is undefined"),
        ("{{ a }} [MASK] ||| {{ b }}", {"a": 1, "b": " "}, "renders nothing as the answer from line 1"),
        ("{{ a }} [MASK] ||| yes", {"a": ""}, "renders nothing as the prompt"),
        ("[MASK] {{ a }} [MASK] ||| yes", {"a": "x"}, r"makes 2 \[MASK\]"),
        ("{% if 0 %}[MASK]{% endif %}{{ a }} ||| yes", {"a": "x"}, r"makes 0 \[MASK\]"),
        ("{{ a }} ||| yes ||| no\nmaybe", {"a": 1}, "not among its 2 choices"),
        ("{{ a.__class__.__mro__ }} ||| b", {"a": 1}, "cannot be filled in .*SecurityError"),
        ("{{ 1 // 0 }} ||| b", {}, "cannot be filled in .*ZeroDivisionError"),
    ],
)
def test_wrong_templates_are_one_clear_line(source, record, says):
    with pytest.raises(InputError, match=says):
        fill(source, record)


@pytest.fixture(scope="module")
def own_tasks(tmp_path_factory):
    """Two tasks of a user: sums, and reviews, which are longer than a short row."""
    folder = tmp_path_factory.mktemp("tasks")
    records = [{"a": a, "b": b} for a in range(20) for b in range(20)]
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n\n")
    (folder / "sums.jinja").write_text(SUMS)
    reviews = [
        {
            "review": "很好 " * (n % 40),
            "label": ("正面", "负面")[n % 2],
            "language": "zh",
            "group": f"g{n % 10}",
        }
        for n in range(1, 200)
    ]
    (folder / "reviews.jsonl").write_text("\n".join(map(json.dumps, reviews)))
    (folder / "reviews.jinja").write_text(REVIEWS, encoding="utf-8")
    return folder / "sums.jsonl", folder / "reviews.jsonl"


@pytest.fixture(scope="module")
def task_data(data_folder, text_files, own_tasks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("task_data")
    build_corpus((text_files,), folder / "corpus", None, own_tasks)
    build_shards(folder / "corpus", data_folder.parent / "tokenizer", folder / "shards", 0.2, 1)
    return open_data(folder / "shards")


def test_own_tasks_are_split_by_group(task_data):
    held, trained = open_tasks(task_data.path), open_tasks(task_data.path, "train")
    assert len(held) + len(trained) == 599
    assert {e.group for e in held} & {e.group for e in trained} == set()
    assert {e.task for e in held} == {"sums", "reviews"}
    review = next(e for e in held if e.task == "reviews")
    assert review.language == "zh"
    assert review.prompt.endswith("这条评论是[MASK]的。")
    assert review.answer in review.choices == ("正面", "负面")
    assert task_data.tasks["heldout"].counts == {
        name: sum(e.task == name for e in held) for name in ("reviews", "sums")
    }


def naive_row(pieces, special, length):
    """A multi-task row built token by token, as in the definition."""
    row = []
    for number, (prompt, answer) in enumerate(pieces):
        place = prompt.index(special.mask)
        row += [(token, NO_TARGET, i, 0, True, number) for i, token in enumerate(prompt)]
        inputs, targets = [special.sop, *answer], [*answer, special.eop]
        row += [
            (a, b, place, j + 1, False, number) for j, (a, b) in enumerate(zip(inputs, targets, strict=True))
        ]
    return row + [(special.pad, NO_TARGET, 0, 0, False, -1)] * (length - len(row))


def test_rows_of_examples_are_the_definition(task_data):
    objective = ObjectiveConfig(multitask_share=1.0, positions="2d")
    loader = Loader(task_data, objective, length=64, seed=0)
    batch = loader.samples(range(60))
    tasks = task_data.tasks["train"]
    offsets, stream = tasks.shard.offsets, tasks.shard.stream
    known = {int(offsets[2 * i]): i for i in range(len(offsets) // 2)}
    examples = open_tasks(task_data.path, "train")
    tokenizer = task_data.tokenizer
    cost_RD = loader._pool._cost[loader._pool._draw(0, np.arange(60))]
    left = []
    for row in range(60):
        pieces = []
        for piece in batch.provenance[row]:
            i = known[piece.first]
            assert piece.length == offsets[2 * i + 2] - offsets[2 * i]
            prompt = stream[offsets[2 * i] : offsets[2 * i + 1]].tolist()
            answer = stream[offsets[2 * i + 1] : offsets[2 * i + 2]].tolist()
            assert prompt == examples[i].encode_prompt(tokenizer)
            assert tokenizer.decode(answer) == examples[i].answer
            pieces.append((prompt, answer))
        expected = zip(*naive_row(pieces, tokenizer.special, 64), strict=True)
        fields = (batch.tokens_BT, batch.targets_BT, batch.positions[..., 0], batch.positions[..., 1])
        for ours, theirs in zip((*fields, batch.context_BT, batch.segments_BT), expected, strict=True):
            assert ours[row].tolist() == list(theirs)
        used, put = 0, 0
        for cost in cost_RD[row].tolist():  # first fit
            if used + cost <= 64:
                used, put = used + cost, put + 1
        assert (put, used) == (len(pieces), (batch.segments_BT[row] >= 0).sum())
        left.append(64 - used)
    assert np.mean(left) < cost_RD.mean()  # room is used: another example would not fit


def test_tasks_have_equal_shares_and_long_examples_stay_out(task_data):
    loader = Loader(task_data, ObjectiveConfig(multitask_share=1.0), length=40, seed=1)
    counts = task_data.tasks["train"].counts
    first_sum = counts["reviews"]  # tasks lie in order of their names
    drawn = loader._pool._draw(1, np.arange(3000))
    assert abs((drawn >= first_sum).mean() - 0.5) < 5 * math.sqrt(0.25 / drawn.size)
    costs = loader._pool._cost[np.unique(drawn)]
    assert costs.max() <= 40
    assert loader._pool.too_long == (loader._pool._cost > 40).sum() > 0


def test_five_in_a_hundred_rows_are_tasks(task_data, data):
    special = task_data.tokenizer.special
    rows = Loader(task_data, ObjectiveConfig(), length=64, seed=3).samples(range(6000))
    name = task_data.tasks["train"].shard.path.name
    tasks = np.array([row[0].source == name for row in rows.provenance])
    assert abs(tasks.mean() - 0.05) < 5 * math.sqrt(0.0475 / 6000)
    # Of the others, 30 and 70 as without tasks.
    whole = (rows.tokens_BT == special.gmask).any(1).numpy()
    assert not (whole & tasks).any()
    assert abs(whole[~tasks].mean() - 0.7) < 5 * math.sqrt(0.21 / (~tasks).sum())
    assert Loader(data, ObjectiveConfig(), length=64, seed=3).multitask_share == 0
    assert Loader(task_data, ObjectiveConfig(kind="causal"), length=64, seed=3).multitask_share == 0


def test_examples_are_functions_of_seed_and_sample(task_data):
    objective = ObjectiveConfig(multitask_share=0.5)
    together = Loader(task_data, objective, length=64, seed=7).samples(range(40))
    order = [31, 2, 17, 2, 39]
    apart = Loader(open_data(task_data.path), objective, length=64, seed=7).samples(order)
    for place, number in enumerate(order):
        assert apart.tokens_BT[place].tolist() == together.tokens_BT[number].tolist()
        assert apart.provenance[place] == together.provenance[number]


def test_examples_are_named(task_data):
    loader = Loader(task_data, ObjectiveConfig(multitask_share=1.0), length=64, seed=0)
    assert loader.documents(loader.samples([0]).provenance[0][0])[0].startswith(
        "tasks-train-00000.tokens: example "
    )


def test_tasks_that_are_not_there(task_data, data, data_folder):
    with pytest.raises(InputError, match="has no tasks in its train split"):
        Loader(data, ObjectiveConfig(multitask_share=0.1), length=64, seed=0)
    with pytest.raises(InputError, match=r"none of the .* task examples .* fits a row of 3"):
        Loader(task_data, ObjectiveConfig(multitask_share=1.0, pieces=1), length=3, seed=0)
    with pytest.raises(InputError, match="has no tasks in its heldout split"):
        open_tasks(data_folder)
    with pytest.raises(InputError, match="no split 'test'"):
        open_tasks(data_folder, "test")
    with pytest.raises(InputError, match="needs \\[MASK\\]"):
        ObjectiveConfig(kind="causal", multitask_share=0.1)


def test_altered_tasks_are_found(task_data, tmp_path):
    import shutil

    copy = shutil.copytree(task_data.path, tmp_path / "shards")
    file = copy / "tasks-heldout.parquet"
    raw = bytearray(file.read_bytes())
    raw[20] ^= 1
    file.write_bytes(raw)
    with pytest.raises(InputError, match="does not match its checksum"):
        open_tasks(copy)
    file.write_bytes(raw[:-1])
    with pytest.raises(InputError, match="bytes of"):
        open_data(copy)


@pytest.mark.parametrize(
    ("jsonl", "template", "says"),
    [
        (None, SUMS, "mine.jsonl does not exist"),
        ('{"a": 1, "b": 2}', None, "mine.jinja does not exist"),
        ('{"a": 1}', SUMS, "mine.jsonl, line 1 .*'b' is undefined"),
        ('{"a": 1, "b": 2}\n[3]', SUMS, "line 2 is not an object"),
        ('{"a": 1, "b": 2}\n{', SUMS, "line 2 is not JSON"),
        ('{"a": "", "b": ""}', SUMS, "renders nothing as the answer from .*mine.jsonl, line 1"),
        ('{"a": 1, "b": 2}', "no parts", "has 1 parts"),
        ('{"a": 1, "b": 2}', b"\xff", "not UTF-8"),
    ],
)
def test_wrong_tasks_are_one_clear_line(tmp_path, capsys, jsonl, template, says):
    import re

    text = tmp_path / "a.txt"
    text.write_text("some text")
    if jsonl is not None:
        (tmp_path / "mine.jsonl").write_text(jsonl)
    if template is not None:
        (tmp_path / "mine.jinja").write_bytes(template.encode() if isinstance(template, str) else template)
    out = tmp_path / "corpus"
    assert main(["corpus", str(text), "--out", str(out), "--tasks", str(tmp_path / "mine.jsonl")]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ")
    assert re.search(says, said), said
    assert not out.exists()


def test_task_names_are_refused_where_they_clash(tmp_path):
    from glm.data.files import find_tasks

    for name in ("a/x", "b/x", "describe-zh", "plain"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.with_suffix(".jsonl").write_text("")
        path.with_suffix(".jinja").write_text("")
    with pytest.raises(InputError, match="are both task 'x'"):
        find_tasks((tmp_path / "a" / "x.jsonl", tmp_path / "b" / "x.jsonl"))
    with pytest.raises(InputError, match="rename it"):
        find_tasks((tmp_path / "describe-zh.jsonl",))
    with pytest.raises(InputError, match="is not a task file"):
        find_tasks((tmp_path / "plain.txt",))


def parameter_class(name, descriptions):
    lines = "".join(
        f"        :param _{key}: {text}\n        :type {key}: {kind}\n" for key, kind, text in descriptions
    )
    return f'class {name}(AbstractModel):\n    r"""{name}\n    """\n    def __init__(self):\n        r"""\n{lines}        """\n'


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheels")
    zh = [(f"Name{n}", ("str", "int", "list of str")[n % 3], f"第{n}个参数的名称") for n in range(12)]
    en = [(key, kind, f"The name of parameter number {n}") for n, (key, kind, _) in enumerate(zh)]
    for language, described in (("zh", zh), ("en", en)):
        with zipfile.ZipFile(folder / f"{language}.whl", "w") as archive:
            archive.writestr(
                "tencentcloud/cvm/v1/models.py", "raise SystemExit\n" + parameter_class("Thing", described)
            )
    services = {}
    for n in range(7):
        members = {
            f"Field{i}": {"documentation": f"<p>What field {i} of service {n} is</p>"} for i in range(6)
        }
        services[f"s{n}"] = {
            "metadata": {"serviceFullName": f"Service number {n}"},
            "operations": {"Do": {"documentation": f"Does the thing that service {n} is for"}},
            "shapes": {
                "DoRequest": {"type": "structure", "required": ["Field0", "Field1"], "members": members}
            },
        }
    with zipfile.ZipFile(folder / "aws.whl", "w") as archive:
        for name, model in services.items():
            archive.writestr(
                f"botocore/data/{name}/2016/service-2.json.gz", gzip.compress(json.dumps(model).encode())
            )
    return folder


def test_tasks_of_the_default_corpus(wheels):
    made = [*tencent_tasks(wheels / "zh.whl", wheels / "en.whl", 6), *aws_tasks(wheels / "aws.whl", 6)]
    assert {e.task for e in made} == set(PROMPTS)
    assert len({e.task.rsplit("-", 1)[0] for e in made}) >= 5
    assert {e.group for e in made if e.task != "topic-en" and e.task != "required-en"} == {"tencent/cvm"}
    for example in made:
        assert example.answer in example.choices
        assert len(set(example.choices)) == len(example.choices) >= 2
        assert (
            not example.task.startswith(("describe", "name", "translate", "topic"))
            or len(example.choices) == 4
        )
    for example in made:
        if example.task == "translate-zh-en":
            n = next(n for n in range(12) if f"第{n}个参数" in example.prompt)
            assert example.answer == f"The name of parameter number {n}"
        if example.task == "required-en":
            assert (example.answer == "yes") == ("Field0" in example.prompt or "Field1" in example.prompt)
    again = [*tencent_tasks(wheels / "zh.whl", wheels / "en.whl", 6), *aws_tasks(wheels / "aws.whl", 6)]
    assert again == made


def test_wrong_choices_do_not_tell_by_their_place(wheels):
    made = list(tencent_tasks(wheels / "zh.whl", wheels / "en.whl", 12))
    places = [e.choices.index(e.answer) for e in made if len(e.choices) == 4]
    assert set(places) == {0, 1, 2, 3}
    yes = [e.answer in ("是", "yes") for e in made if e.task.startswith("match")]
    assert abs(sum(yes) - len(yes) / 2) <= 1
