"""The zero-shot benchmark asks the same examples in words of its own."""

from __future__ import annotations

import pytest

from experiments.benchmarks.zero_shot import WORDINGS, fields, reworded
from glm.data.documentation_tasks import PROMPTS
from glm.data.special import MASK
from glm.data.templates import Template

RECORD = {
    "text": 'ID of the instance (see "Is it?"): 实例的 ID，用于查询。\nType: [MASK] of a',
    "name": "InstanceId",
    "owner": "DescribeInstancesRequest",
    "answer": "yes",
    "choices": ("yes", "no"),
}
REST = " ||| {{ answer }} ||| {{ choices | join('\n') }}"


@pytest.mark.parametrize("task", PROMPTS)
def test_what_filled_a_template_is_read_back_and_asked_in_other_words(task):
    for source in PROMPTS[task]:
        example = Template(source + REST, task).fill(RECORD, task=task, language="", group="g", where="here")
        used = {name: RECORD[name] for name in ("text", "name", "owner") if f"{{{{ {name} }}}}" in source}
        assert fields(example) == used
        again = reworded(example)
        assert (again.answer, again.choices, again.group) == (example.answer, example.choices, "g")
        expected = WORDINGS[task]
        for name, value in used.items():
            expected = expected.replace(f"{{{{ {name} }}}}", value)
        assert again.prompt == expected
        assert again.after == ""


def test_the_new_wordings_are_of_every_task_and_of_no_template():
    assert WORDINGS.keys() == PROMPTS.keys()
    for task, wording in WORDINGS.items():
        assert wording not in PROMPTS[task]
        assert wording.count(MASK) == 1
