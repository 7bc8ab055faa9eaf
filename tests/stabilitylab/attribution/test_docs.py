"""The two examples of docs/attribution.md print what the page says."""

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[3] / "docs" / "attribution.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```\n\nprints\n\n    (.*?)\n", PAGE, re.DOTALL)


@pytest.mark.parametrize(("code", "printed"), EXAMPLES, ids=["plain", "huggingface"])
def test_an_example_prints_what_the_page_says(code, printed, capsys):
    if "transformers" in code:
        pytest.importorskip("transformers")
    exec(compile(code, "docs/attribution.md", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out.strip() == printed
