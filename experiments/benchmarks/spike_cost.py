"""What ``stabilitylab spikes FILE`` costs, start to end, against another build of it.

    python -m experiments.benchmarks spike_cost [--former TREE] [--rows N] [--repeats R] [--noise S]

A log of N rows with loss (noise of S = 2.5 % on a slow fall), gradient norm (log-normal, .2) and rate, as CSV and as JSON lines.
Each build has its own process with one thread, chosen by PYTHONPATH; the builds take turns. Medians of processor time (user and
system) and wall time.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

_RUN = "import sys; from stabilitylab.cli import main; sys.argv = ['stabilitylab', 'spikes', sys.argv[1]]; main()"


def write_logs(folder: Path, rows: int, noise: float) -> dict[str, Path]:
    """Format -> file."""
    rng, at = np.random.default_rng(0), np.arange(rows)
    rates = 3e-4 * np.minimum(at / 2000, 1) * (0.5 + 0.5 * np.cos(np.pi * at / rows))
    losses = (2 + 6 * np.exp(-10 * at / rows)) * (1 + noise * rng.standard_normal(rows))
    norms = np.exp(0.2 * rng.standard_normal(rows))
    csv, lines = folder / "log.csv", folder / "log.jsonl"
    with csv.open("w") as table, lines.open("w") as records:
        table.write("step,loss,grad_norm,lr\n")
        for i, loss, norm, rate in zip(
            at.tolist(), losses.tolist(), norms.tolist(), rates.tolist(), strict=True
        ):
            table.write(f"{i},{loss:.6f},{norm:.6f},{rate:.8g}\n")
            row = {"step": i, "loss": round(loss, 6), "grad_norm": round(norm, 6), "lr": float(f"{rate:.8g}")}
            records.write(json.dumps(row) + "\n")
    return {"CSV": csv, "JSON lines": lines}


def cost(tree: Path, file: Path) -> tuple[float, float]:
    """Processor seconds and wall seconds of one run."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-c", _RUN, str(file)], cwd=tree, env=environment, check=True, capture_output=True
    )
    wall, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return processor, wall


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="spike_cost", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--former", type=Path, help="a tree of another build")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--noise", type=float, default=0.025)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(argv)
    here = Path(__file__).resolve().parents[2]
    builds = {"this build": here} | ({"former": options.former.resolve()} if options.former else {})
    with tempfile.TemporaryDirectory() as folder:
        for name, file in write_logs(Path(folder), options.rows, options.noise).items():
            cost(here, file)  # compiles what is compiled at first use
            took: dict[str, list[tuple[float, float]]] = {build: [] for build in builds}
            for _ in range(options.repeats):
                for build, tree in builds.items():
                    took[build].append(cost(tree, file))
            middle = {
                b: [statistics.median(column) for column in zip(*t, strict=True)] for b, t in took.items()
            }
            said = ", ".join(f"{b} {m[0]:.2f} s (wall {m[1]:.2f})" for b, m in middle.items())
            if "former" in middle:
                said += f"; {middle['this build'][0] / middle['former'][0]:.3f} of the former"
            print(f"{name}: {said}", flush=True)
    return 0
