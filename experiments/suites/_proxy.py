"""The small model on which studies run by the hundred, and its text.

4 layers of 32, rows of 64 tokens, 8 rows an update, 512 pieces: an update takes some 12 ms of one core of 2026, a run 1 to 2 s.
What GLM-130B met shows here too: in fp16 a rate over 2^-2 or so ends in overflow within twenty updates of warm-up's end.
"""

from __future__ import annotations

from pathlib import Path

from experiments.data import build

PROXY = {
    "model.layers": "4",
    "model.hidden": "32",
    "model.length": "64",
    "batch.rows": "8",
    "objective.pieces": "2",
    "objective.multitask-share": "0",
    "loss-scale.window": "50",
    "schedule.warmup": "20",
    "steps": "60",
}
NEXT_TOKEN = {"objective.kind": "causal"}


def proxy_text(folder: Path) -> Path:
    """4 million characters of the default corpus in 512 pieces, a tenth of the groups held out."""
    return build(folder, characters=4_000_000, vocabulary=512, sample=500_000, heldout=0.1)
