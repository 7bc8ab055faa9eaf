"""For every kind of bad input: one line on rank 0, nothing on the others, exit code 2 on all, and no rank waits for ever."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.patience import PATIENCE

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.distributed

SAYS = {
    "topology": "is 3, but 2 processes were started",
    "heads": "does not divide model.heads 1",
    "flag": "--model.layrs",
    "configuration": "rank 1 has another configuration than rank 0",
    "version": "rank 1 has another stabilitylab than rank 0 (9.9.9",
    "data": "not a finished shards",
    "run": "already holds a run: add --resume",
    "settings": "was trained with other settings (model.norm",
    "checkpoint": "the checkpoint is of another model: layers.0.feed_forward.up.weight",
    "damaged": "no undamaged checkpoint",
    "port": "free the port or set MASTER_PORT",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory, data_folder):
    """Exit codes and words of both ranks of every case, made by real processes."""
    command = [sys.executable, "-m", "tests.glm.parallel.refusals", str(tmp_path_factory.mktemp("refusals"))]
    done = subprocess.run(
        [*command, str(data_folder)],
        cwd=Path(__file__).parents[3],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", ["trained", "resumed"])
def test_what_is_right_is_not_refused(found, case):
    assert [rank["code"] for rank in found[case]] == [0, 0], found[case]


def words(rank: dict[str, Any]) -> list[str]:
    """A rank's output, without gloo's own under torch 2.9."""
    return [line for line in rank["said"].strip().splitlines() if not line.startswith("[Gloo] Rank")]


@pytest.mark.parametrize("case", SAYS)
def test_wrong_input_is_one_line_of_one_rank_and_2_on_all(found, case):
    first, second = found[case]
    (line,) = words(first)
    assert line.startswith("error: ")
    assert SAYS[case] in line
    assert words(second) == []
    assert (first["code"], second["code"]) == (2, 2)
