"""A short run loads neither torch's compiler nor what only reading logs and drawing need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
from glm.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
print(*({"torch._dynamo", "sympy", "pandas", "matplotlib"} & set(sys.modules)), file=sys.stderr)
"""


def test_a_run_of_one_step_loads_what_it_uses(data_folder: Path, tmp_path: Path) -> None:
    words = ["--model.layers", "1", "--model.hidden", "16", "--model.heads", "2", "--batch.rows", "2"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "train", "glm-tiny", "--data", str(data_folder)]
        + ["--out", str(tmp_path / "run"), "--steps", "1", *words],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.split() == []
    assert next((tmp_path / "run" / "telemetry").glob("*.parquet"))
