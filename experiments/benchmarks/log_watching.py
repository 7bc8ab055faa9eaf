"""Watching a log: what a new line costs, the same however long the log is.

    python -m experiments.benchmarks log_watching

The benchmark watches a Megatron console of records only from its start, then appends lines, one per look, after 1,000 and after
300,000 lines. Median processor time (user and system) per look, beside that of an idle look; alternated.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from stabilitylab.watching.kept_state import KeptState
from stabilitylab.watching.options import Options
from stabilitylab.watching.watch import Watch

LENGTHS = (1_000, 300_000)
LOOKS = 300


def line(step: int) -> str:
    """A record."""
    loss = 2 + (step * 7919 % 1000) / 50_000
    return (
        f" iteration {step:8d}/  900000 | consumed samples: {64 * step:12d} | learning rate: 6.680E-06 | "
        f"lm loss: {loss:.6E} | loss scale: 1.0 | grad norm: {1 + loss / 50:.3f} | number of skipped iterations:   0 |\n"
    )


def main(words: Sequence[str] = ()) -> int:
    """Print a line for each length."""
    with tempfile.TemporaryDirectory() as folder:
        watches, files, memories = [], [], []
        for length in LENGTHS:
            file = Path(folder) / f"{length}.log"
            file.write_text("".join(map(line, range(1, length + 1))))
            memories.append(KeptState(Path(folder) / f"state-{length}"))
            options = Options(silent_after=0.0)
            watches.append(Watch(path=file, options=options, memory=memories[-1], say=lambda alert: None))
            began = time.process_time()
            watches[-1].look()
            taken = time.process_time() - began
            print(f"first look at {length:,} lines: {taken:.2f} s, {taken / length * 1e6:.1f} us a line")
            files.append(file)
        looks: dict[tuple[int, str], list[float]] = {}
        for k in range(1, LOOKS + 1):
            for length, watch, file in zip(LENGTHS, watches, files, strict=True):
                for kind in ("idle", "new line"):
                    if kind == "new line":
                        with file.open("a") as opened:
                            opened.write(line(length + k))
                    began = time.process_time()
                    watch.look()
                    looks.setdefault((length, kind), []).append(time.process_time() - began)
        for watch, memory in zip(watches, memories, strict=True):
            watch.close()
            memory.close()
    for (length, kind), times in looks.items():
        print(f"after {length:,} lines, {kind}: {statistics.median(times) * 1e6:.0f} us a look")
    return 0


if __name__ == "__main__":
    main()
