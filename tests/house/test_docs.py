"""The site's pages: all of them in the navigation, every link to a file that is there, metrics from the tested tables."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)(?:#[^)]*)?\)")
GENERATED = {"metrics.md"}


def test_every_page_is_in_the_navigation() -> None:
    named = set(re.findall(r"[\w-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    assert named == {page.name for page in PAGES} | GENERATED


def test_every_finding_is_told_among_the_surprises() -> None:
    told = set(re.findall(r"`findings/(\w+\.sh)`", (DOCS / "surprises.md").read_text(encoding="utf-8")))
    assert told == {script.name for script in (ROOT / "findings").glob("*.sh")}


def test_prose_is_wrapped() -> None:
    """At 132 columns, except for longer words, tables, code and pictures."""
    whole = re.compile(r"```.*?```|^(?: {4}|\||!\[|:::).*?$", re.S | re.M)
    for page in (
        *PAGES,
        *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "findings/README.md")),
    ):
        for line in whole.sub("", page.read_text(encoding="utf-8")).splitlines():
            assert len(line) <= 132 or " " not in line.strip(), f"{page.name}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_code_in_tables_has_no_bars(page: Path) -> None:
    """GitHub needs a backslash before such a bar, and the site shows that backslash."""
    assert re.findall(r"^\|.*`[^`|]*\\\|[^`]*`", page.read_text(encoding="utf-8"), re.M) == []


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert target in GENERATED or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_that_are_named_exist(page: Path) -> None:
    """`glm/model/block.py`, `examples/own_probe.py`: prose goes out of date when a file moves."""
    named = re.findall(
        r"`((?:stabilitylab|glm|experiments|examples|tests|findings)/[\w/.]+)`", page.read_text("utf-8")
    )
    for name in named:
        assert (ROOT / name).exists(), name


# Files of other projects that docstrings name as their source.
OF_OTHERS = {
    "_client.py", "chat_sft.py", "constants.py", "convert_hf_to_gguf.py", "models.py", "quants.py", "train_gpt.py", "train_gpt2.py",
    "train_utils.py", "trainer.py",
}  # fmt: skip


def test_files_that_the_source_names_exist() -> None:
    """``divergence.py says why``: a docstring goes out of date when a file moves."""
    sources = [
        file for floor in ("stabilitylab", "glm", "experiments") for file in (ROOT / floor).rglob("*.[pch]*")
    ]
    there = {file.name for file in sources} | {file.name for file in (ROOT / "tests").rglob("*.py")}
    named: dict[str, str] = {}
    for file in sources:
        if file.suffix in (".py", ".c", ".h"):
            text = file.read_text(encoding="utf-8")
            named |= dict.fromkeys(re.findall(r"(?<![\w/.-])[a-z_0-9]+\.py\b", text), file.name)
    unknown = {name: where for name, where in named.items() if name not in there}
    assert {name: where for name, where in unknown.items() if name not in OF_OTHERS} == {}
    assert unknown.keys() >= OF_OTHERS


# https://keepachangelog.com/en/1.1.0, in its order.
HEADINGS = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]


def changelog_faults(text: str) -> list[str]:
    """Headings of a changelog's releases that are not standard, stand twice, or are out of order."""
    faults = []
    for release in re.split(r"^## ", text, flags=re.M)[1:]:
        headings = re.findall(r"^#{3,} (.*)", release, flags=re.M)
        if headings != [name for name in HEADINGS if name in headings]:
            faults.append(f"{release.splitlines()[0]}: {', '.join(headings)}")
    return faults


def test_the_changelog_keeps_its_headings() -> None:
    assert changelog_faults((ROOT / "CHANGELOG.md").read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "headings", [("Changed", "Added"), ("Added", "Decisions"), ("Fixed", "Fixed")], ids="-".join
)
def test_a_heading_out_of_order_is_found(headings: tuple[str, str]) -> None:
    text = "# Changelog\n\n## [1]\n\n### Added\n- x\n\n## [0]\n" + "".join(
        f"\n### {name}\n- y\n" for name in headings
    )
    assert changelog_faults(text) == [f"[0]: {', '.join(headings)}"]
