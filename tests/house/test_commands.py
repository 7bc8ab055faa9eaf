"""Every command that help names exists, and both ways of calling a program are one."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import glm.cli
import stabilitylab.cli

COMMANDS = [(cli, name) for cli in (glm.cli, stabilitylab.cli) for name in cli.COMMANDS]


@pytest.mark.parametrize(("cli", "name"), COMMANDS, ids=[name for _, name in COMMANDS])
def test_commands_exist_and_have_help(cli, name, capsys):
    module = importlib.import_module(cli.COMMANDS[name][0])
    assert callable(getattr(module, name, None) or getattr(module, f"{name}_command"))
    try:
        code = cli.main([name, "--help"])
    except SystemExit as stop:
        code = stop.code
    assert code == 0
    assert "usage" in capsys.readouterr().out.lower()


@pytest.mark.parametrize("cli", [glm.cli, stabilitylab.cli])
def test_the_version_is_the_distributions(cli, capsys):
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))[
        "project"
    ]
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.split()[1] == stabilitylab.__version__ == project["version"]


@pytest.mark.parametrize("package", ["glm", "stabilitylab", "experiments"])
def test_module_and_script_are_the_same(package):
    said = [
        subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for command in (
            [sys.executable, "-m", package, "--help"],
            [sys.executable, "-c", f"import sys; from {package}.cli import main; sys.exit(main(['--help']))"],
        )
    ]
    assert said[0] == said[1]
    assert said[0].startswith("usage")
