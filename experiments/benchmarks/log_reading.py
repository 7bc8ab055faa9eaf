"""Reading logs: rows per second and memory, against pandas.read_csv and, if given, another build.

    python -m experiments.benchmarks log_reading [FOLDER OF ANOTHER BUILD]

One million rows of CSV and Parquet; consoles of a million lines with one record in a thousand, and of 200,000 records (nanoGPT's,
Megatron-LM's, and of no known trainer). Each reading has its own process: processor time (user and system) of reading alone,
without imports, and the rise of its resident memory (Linux). Medians of five; readers take turns.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from stabilitylab.errors import InputError

ROWS = 1_000_000
RECORDS = 200_000
REPEATS = 5

_MEASURE = """
import re, sys, time
from pathlib import Path
import pandas as pd
import pyarrow.csv, pyarrow.parquet
{setup}

def status(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

path = Path(sys.argv[1])
Path("/proc/self/clear_refs").write_text("5")  # the peak begins again at what is resident now
before = status("VmRSS")
start = time.process_time()
{work}
taken = time.process_time() - start
print(taken, status("VmHWM") - before)
"""
_OURS = (
    "from stabilitylab.logs.recognise import open_logs; import stabilitylab.logs.table_files",
    "rows = sum(len(block) for log in open_logs([path]) for block in log.blocks())",
)
_BEFORE = (
    "from stabilitylab.spikes.logs import open_log; import stabilitylab.spikes.log_tables",
    "rows = sum(len(block) for block in open_log(path).blocks())",
)
_PANDAS = ("", "rows = len(pd.read_csv(path))")


def measured(code: tuple[str, str], path: Path, build: Path) -> tuple[float, float]:
    """Seconds and MB of one reading in a fresh process."""
    setup, work = code
    text = _MEASURE.format(setup=setup, work=work)
    environment = {**os.environ, "PYTHONPATH": str(build), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        # From another folder: the current one comes before PYTHONPATH.
        [sys.executable, "-c", text, str(path)],
        env=environment,
        cwd=path.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, megabytes = map(float, done.stdout.split())
    return seconds, megabytes


def write_inputs(folder: Path) -> dict[str, tuple[Path, int]]:
    """Kind -> file and number of rows or lines."""
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {"step": np.arange(ROWS), "loss": 2 + rng.random(ROWS), "grad_norm": rng.random(ROWS), "lr": 1e-4}
    )
    csv, parquet, sparse, dense = (
        folder / name for name in ("log.csv", "log.parquet", "sparse.txt", "dense.txt")
    )
    table.to_csv(csv, index=False, float_format="%.5f")
    table.to_parquet(parquet)
    line = "2026-11-29 10:00:00,000 INFO worker: fetched a batch of 64 samples in 0.0123 s, queue 17 of 64\n"
    with sparse.open("w") as file:
        for k in range(ROWS // 1000):
            file.write(line * 999 + f"iter {k}: loss {2 + k % 7 / 10:.4f}, time 210.11ms, mfu 30.20%\n")
    with dense.open("w") as file:
        for k in range(RECORDS):
            file.write(f"iter {k}: loss {2 + k % 7 / 10:.4f}, time 210.11ms, mfu 30.20%\n")
    megatron, unknown = folder / "megatron.txt", folder / "unknown.txt"
    with megatron.open("w") as file:
        for k in range(RECORDS):
            file.write(
                f" [2026-11-29 10:00:00] iteration {k:8d}/  500000 | consumed samples: {k * 256:12d} | "
                "elapsed time per iteration (ms): 512.1 | learning rate: 1.500000E-04 | global batch size:   256 | "
                f"lm loss: {2 + k % 7 / 10:.6E} | loss scale: 1.0 | "
                f"grad norm: {1 + k % 5 / 10:.3f} | number of skipped iterations:   0 | number of nan iterations:   0 |\n"
            )
    with unknown.open("w") as file:
        for k in range(RECORDS):
            file.write(
                f"2026-11-29 10:00:00,123 - INFO - [step {k}/500000] train loss: {2 + k % 7 / 10:.4f} | lr: 1.50e-04 | "
                f"grad_norm: {1 + k % 5 / 10:.3f} | tok/s: 12345\n"
            )
    return {
        "CSV": (csv, ROWS),
        "Parquet": (parquet, ROWS),
        "console, one line in a thousand": (sparse, ROWS),
        "console, every line": (dense, RECORDS),
        "console, every line, Megatron-LM": (megatron, RECORDS),
        "console, every line, no known trainer": (unknown, RECORDS),
    }


def main(words: Sequence[str] = ()) -> int:
    """Print a line for each kind and reader."""
    here = Path(__file__).parents[2]
    other = Path(words[0]) if words else None
    before = _OURS if other is not None and (other / "stabilitylab/logs/recognise.py").is_file() else _BEFORE
    if other is not None and before is _BEFORE and not (other / "stabilitylab/spikes/logs.py").is_file():
        raise InputError(
            f"{other} is no build that reads logs in stabilitylab/logs or stabilitylab/spikes/logs.py"
        )
    with tempfile.TemporaryDirectory() as folder:
        for kind, (path, count) in write_inputs(Path(folder)).items():
            readers = {"this build": (_OURS, here)}
            if other is not None and (before is _OURS or not kind.startswith("console")):
                readers["other build"] = (before, other)
            if kind == "CSV":
                readers["pandas.read_csv"] = (_PANDAS, here)
            found: dict[str, list[tuple[float, float]]] = {name: [] for name in readers}
            for _ in range(REPEATS):
                for name, (code, build) in readers.items():
                    found[name].append(measured(code, path, build))
            own = statistics.median(seconds for seconds, _ in found["this build"])
            for name, several in found.items():
                seconds = statistics.median(s for s, _ in several)
                memory = statistics.median(m for _, m in several)
                print(
                    f"{kind}, {name}: {count / seconds / 1e6:.2f} M a second ({seconds / own:.2f} times this build's time), "
                    f"{memory:.0f} MB"
                )
    return 0


if __name__ == "__main__":
    main(sys.argv[1:])
