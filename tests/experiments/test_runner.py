"""A suite whose runs fail says so in one line, each cause once."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.arm import Arm, Suite
from experiments.runner import run_suite
from stabilitylab.errors import InputError


def test_each_cause_is_told_once(tmp_path: Path) -> None:
    suite = Suite(
        name="broken",
        question="?",
        preset="glm-tiny",
        steps=2,
        seeds=(0, 1),
        settings={},
        arms=(Arm(name="one", summary=""),),
        claims=(),
        data=lambda folder: folder,
    )
    with pytest.raises(InputError) as caught:
        run_suite(suite, data=tmp_path / "nowhere", out=tmp_path / "runs", parallel=2)
    message = str(caught.value)
    assert message.startswith("2 of the suite's runs failed: one, seed 0, one, seed 1: error: ")
    assert message.count("nowhere") == 1
    assert "\n" not in message
