"""Reading logs: rows a second, against pandas.read_csv.

    python -m experiments.benchmarks log_reading

One million rows of CSV and Parquet, and a console of a million lines of which one in a thousand is a record. Processor time
(user and system) of ``open_logs`` and of all its blocks, medians of three, the peer's in the same run, alternated.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from stabilitylab.logs.recognise import open_logs

ROWS = 1_000_000
REPEATS = 3


def seconds(work: Callable[[], object]) -> float:
    """Processor time of one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def read(path: Path) -> int:
    """Every row of every segment."""
    return sum(len(block) for log in open_logs([path]) for block in log.blocks())


def main(words: Sequence[str] = ()) -> int:
    """Print a line for each kind."""
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {"step": np.arange(ROWS), "loss": 2 + rng.random(ROWS), "grad_norm": rng.random(ROWS), "lr": 1e-4}
    )
    with tempfile.TemporaryDirectory() as folder:
        csv, parquet, console = (Path(folder) / name for name in ("log.csv", "log.parquet", "log.txt"))
        table.to_csv(csv, index=False, float_format="%.5f")
        table.to_parquet(parquet)
        line = (
            "2026-11-29 10:00:00,000 INFO worker: fetched a batch of 64 samples in 0.0123 s, queue 17 of 64\n"
        )
        with console.open("w") as file:
            for k in range(ROWS // 1000):
                file.write(line * 999 + f"iter {k}: loss {2 + k % 7 / 10:.4f}, time 210.11ms, mfu 30.20%\n")
        works: dict[str, Callable[[], object]] = {
            "CSV": lambda: read(csv),
            "CSV, pandas.read_csv": lambda: pd.read_csv(csv),
            "Parquet": lambda: read(parquet),
            "console lines": lambda: read(console),
        }
        taken: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(REPEATS):
            for name, work in works.items():
                taken[name].append(seconds(work))
    for name, times in taken.items():
        print(f"{name}: {ROWS / statistics.median(times) / 1e6:.2f} M a second")
    return 0


if __name__ == "__main__":
    main()
