"""A rank's own inputs: the cost of dropout masks that are functions, and of building its own rows instead of all.

*Dropout*: a forward and backward pass of a preset at dropout 0.1, its masks functions of (seed, update, row, place), beside the
same model with ``F.dropout``, and without dropout; a pass of each in turn, with the same weights and batch, in one process. Medians
of the ratios of neighbours, 95 % by bootstrap. ``F.dropout again`` is the control.

*Rows*: processor time to build a whole batch, and to build the rows of one of d replicas; medians, in turn.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from experiments.benchmarks._presets import preset
from experiments.benchmarks._worlds import batch
from experiments.benchmarks.sample_building import sample_data, seconds
from experiments.statistics import median_interval
from glm.data.config import ObjectiveConfig
from glm.data.loader import Loader
from glm.model import block, dropout, transformer
from glm.model.transformer import Transformer
from stabilitylab.command_line import parse


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Dropout masks, and a rank's own rows.

    Attributes:
        preset: a preset of `glm train`.
        vocabulary: vocabulary size, where the preset leaves it open.
        rows: rows of a pass.
        rounds: passes of each kind.
        batch_rows: rows of the batch to build.
        length: tokens of its rows.
        replicas: replicas that share it.
        repeats: how often to build it.
        json: print one JSON object.
    """

    preset: str = "glm-tiny"
    vocabulary: int = 4096
    rows: int = 4
    rounds: int = 25
    batch_rows: int = 256
    length: int = 2048
    replicas: tuple[int, ...] = (2, 8)
    repeats: int = 9
    json: bool = False


def main(argv: Sequence[str]) -> int:
    settings: Settings = parse(Settings, argv, program="python -m experiments.benchmarks rank_inputs")
    torch.set_num_threads(1)
    ratios, built = _dropout(settings), _rows(settings)
    if settings.json:
        print(json.dumps({"settings": dataclasses.asdict(settings), "dropout": ratios, "rows": built}))
        return 0
    console = Console()
    table = Table("a pass beside F.dropout's", "ratio", "95 %", title="Dropout 0.1, processor time")
    for name, (middle, low, high) in ratios.items():
        table.add_row(name, f"{middle:.3f}", f"{low:.3f} to {high:.3f}")
    console.print(table)
    table = Table("replicas", "ms", title=f"Building {settings.batch_rows} rows of {settings.length}")
    for name, milliseconds in built.items():
        table.add_row(name, f"{milliseconds:.2f}")
    console.print(table)
    return 0


def _torchs(x: Tensor, p: float, keys_B: Tensor | None, place: int) -> Tensor:
    del place
    return x if keys_B is None else F.dropout(x, p)


def _nothing(x: Tensor, p: float, keys_B: Tensor | None, place: int) -> Tensor:
    del p, keys_B, place
    return x


def _dropout(settings: Settings) -> dict[str, tuple[float, float, float]]:
    """For each kind the ratio of its pass to one with ``F.dropout``: median, low, high."""
    config = dataclasses.replace(preset(settings.preset, settings.vocabulary).model, dropout=0.1)
    model = Transformer(config).train()
    rows = batch(config, settings.rows, 0)
    inputs = (rows.tokens_BT, rows.targets_BT, rows.positions, rows.segments_BT, rows.context_BT)
    kinds: dict[str, Callable[..., Tensor]] = {
        "F.dropout": _torchs,
        "functions of the row": dropout.dropout,
        "F.dropout again": _torchs,
        "no dropout": _nothing,
    }

    def passes(update: int) -> None:
        keys_B = dropout.row_keys(0, update, range(settings.rows))
        loss, _ = model.loss(*inputs, keys_B)
        loss.backward()  # type: ignore[no-untyped-call]

    taken: dict[str, list[float]] = {name: [] for name in kinds}
    for update in range(settings.rounds + 2):
        for name, kind in kinds.items():
            with mock.patch.object(block, "dropout", kind), mock.patch.object(transformer, "dropout", kind):
                taken[name].append(seconds(passes, update))
    times = {name: np.array(one[2:]) for name, one in taken.items()}
    found = {}
    for name in list(kinds)[1:]:
        ratios = times[name] / times["F.dropout"]
        low, high = median_interval(ratios[None])
        found[name] = (float(np.median(ratios)), float(low), float(high))
    return found


def _rows(settings: Settings) -> dict[str, float]:
    """Milliseconds to build the whole batch, and one replica's rows of it."""
    with tempfile.TemporaryDirectory() as folder:
        data = sample_data(Path(folder))
        loader = Loader(data, ObjectiveConfig(multitask_share=0.0), length=settings.length, seed=0)
        shares = (1, *settings.replicas)
        taken: dict[int, list[float]] = {share: [] for share in shares}
        for repeat in range(settings.repeats + 1):
            for share in shares:
                first = repeat * settings.batch_rows
                numbers = range(first, first + settings.batch_rows // share)
                taken[share].append(seconds(lambda numbers=numbers: loader.samples(numbers)))
    return {
        "all" if share == 1 else f"1 of {share}": 1e3 * statistics.median(one[1:])
        for share, one in taken.items()
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
