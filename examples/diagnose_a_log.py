"""Only a log: find what happened in it. Any log of docs/logs.md; here one made up, with a spike and a divergence.

python examples/diagnose_a_log.py [LOG]
"""

import sys
from pathlib import Path

import numpy as np

from stabilitylab import find_spikes
from stabilitylab.cli import main


def made_up(path: Path) -> Path:
    """600 steps of a loss: a spike at 300 that comes back, and a rise at 500 that does not."""
    draw = np.random.default_rng(0)
    steps = np.arange(600)
    loss = (2.0 + 3.0 * np.exp(-steps / 80.0)) * (1 + 0.01 * draw.normal(size=600))
    loss[300:306] += [1.0, 2.0, 1.6, 0.9, 0.5, 0.2]
    loss[500:] += np.minimum(4.0, 0.4 * np.arange(100))
    path.write_text("step,loss\n" + "\n".join(f"{s},{v:.4f}" for s, v in zip(steps, loss, strict=True)))
    return path


if __name__ == "__main__":
    log = Path(sys.argv[1]) if len(sys.argv) > 1 else made_up(Path("made_up.csv"))
    main(["spikes", str(log)])  # on the terminal; the same in Python, on arrays:
    if len(sys.argv) == 1:
        step, loss = np.loadtxt(log, delimiter=",", skiprows=1).T
        for episode in find_spikes(step.astype(int), loss):
            print(episode.kind, episode.onset, episode.end)
