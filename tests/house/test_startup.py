"""What a command loads before it does anything: modules that take seconds are loaded by those that need them."""

from __future__ import annotations

import subprocess
import sys

import pytest

TORCH, COMPILER = "torch", "torch._dynamo"


@pytest.mark.parametrize(
    ("program", "without"),
    [
        ("import stabilitylab.cli, glm.cli", {TORCH, "pandas", "numpy"}),
        ("import stabilitylab.logs.commands, stabilitylab.spikes.commands", {TORCH, "matplotlib"}),
        ("import stabilitylab.watching.commands, stabilitylab.watching.watch", {TORCH, "pandas"}),
        # The compiler takes as long as the rest of torch, scipy.stats two seconds.
        ("import stabilitylab.monitoring.monitor", {COMPILER, "scipy", "matplotlib"}),
        ("import glm.commands.train", {COMPILER, "scipy.stats", "pandas", "matplotlib", "tensorboard"}),
    ],
    ids=["help", "spikes", "watch", "monitor", "train"],
)
def test_what_is_loaded(program: str, without: set[str]) -> None:
    asked = f"{program}\nimport sys\nprint(*({without!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
