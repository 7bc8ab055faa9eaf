"""Every arm of every suite is a command that ``glm train`` takes, and none has a flag without effect.

The parser takes a tenth of a second a command. Its result for a flag depends only on the preset, the flag and its word. So where
the parser has already seen all flags of an arm with those words, the test builds the configuration from the earlier results;
building it checks the values against each other, as in the parser. For every arm that the parser does see, both ways must give the
same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.lookup import load
from experiments.study import Study
from experiments.suites import SUITES
from glm.commands.train import parse_command, preset_config
from glm.train.config import TrainConfig
from glm.train.unused_settings import refuse_idle

# Flags of the command, not of the configuration.
BESIDE = ("data", "out", "device")


def commands(folder: Path) -> Iterator[tuple[str, bool, list[str]]]:
    """(name, whether it is a suite's, the words after ``glm train``) of every arm."""
    for name in SUITES:
        suite = load(name)  # refuses claims about arms or metrics that do not exist
        for arm in suite.arms:
            if isinstance(suite, Study):
                flags = {**suite.settings, **arm.settings, "data": str(folder), "out": str(folder / "run")}
                words = [word for flag, value in flags.items() for word in (f"--{flag}", value) if word]
                yield f"{name}: {arm.name}", False, [suite.preset, *words]
            else:
                rate = max(suite.rates, default=None)
                command = suite.command(arm, 0, data=folder, out=folder / "run", rate=rate)
                assert command[0] == "train"
                yield f"{name}: {arm.name}", True, command[1:]


def flags_of(words: list[str]) -> list[tuple[str, str]]:
    """(flag, its word; empty for a switch), except the command's own flags."""
    found: list[tuple[str, str]] = []
    for word in words:
        if word.startswith("--"):
            found.append((word[2:], ""))
        else:
            found[-1] = (found[-1][0], word)
    return [(flag, word) for flag, word in found if flag not in BESIDE]


def path_of(flag: str) -> tuple[str, ...]:
    """Names of the fields that lead to what a flag sets: ``a.no-b`` sets ``a``'s ``b``."""
    *groups, name = flag.replace("-", "_").split(".")
    return (*groups, name.removeprefix("no_"))


def at(config: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        config = getattr(config, name)
    return config


def replaced(config: Any, values: dict[tuple[str, ...], Any]) -> Any:
    """``config`` with all these values at once."""
    own = {path[0]: value for path, value in values.items() if len(path) == 1}
    for group in {path[0] for path in values if len(path) > 1}:
        below = {path[1:]: value for path, value in values.items() if path[0] == group}
        own[group] = replaced(getattr(config, group), below)
    return dataclasses.replace(config, **own)


def test_every_arm_is_a_command_that_parses_and_has_no_flag_without_effect(tmp_path: Path) -> None:
    known: dict[tuple[str, str, str], Any] = {}
    parsed = 0
    for whose, of_a_suite, words in commands(tmp_path):
        preset, flags = words[0], flags_of(words[1:])
        config: TrainConfig | None = None
        if any((preset, *flag) not in known for flag in flags):
            config = parse_command(words).config
            parsed += 1
            known |= {(preset, flag, word): at(config, path_of(flag)) for flag, word in flags}
        values = {path_of(flag): known[preset, flag, word] for flag, word in flags}
        together = replaced(preset_config(preset), values)
        assert config in (None, together), whose
        if of_a_suite:  # a study's trials share settings that some of them do not read
            refuse_idle(words, together)
    assert parsed > 50
