"""Building training rows: tokens a second on one core, beside the same objective token by token, and as a share of a step.

    python -m experiments.benchmarks sample_building [--data DIR] [--length 2048] [--rows 16] [--repeats 15] [--json]

The twin draws the same kinds of rows at the same shares with plain Python loops and lists, as one writes them first. Both turn
memory-mapped tokens into the tensors of a ``Batch``. A training step is forward, backward and update of glm-tiny and glm-small in
fp32 with the same rows, in the same process. All measurements are interleaved, on one thread; figures are medians; rates count the
thread's time on its core.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import TypeVar

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from glm.commands.train import preset_config, with_vocabulary
from glm.data.batch import NO_TARGET
from glm.data.config import ObjectiveConfig
from glm.data.corpus import build_corpus
from glm.data.loader import Loader
from glm.data.sharding import build_shards
from glm.data.shards import TokenData, open_data
from glm.data.tokenizer import train_tokenizer
from glm.train.engine import LocalEngine

T = TypeVar("T")
KINDS = {
    "glm, 30 % [MASK] 70 % [gMASK]": ObjectiveConfig(multitask_share=0.0),
    "[MASK] rows only": ObjectiveConfig(gmask_share=0.0, multitask_share=0.0),
    "[gMASK] rows only": ObjectiveConfig(gmask_share=1.0, multitask_share=0.0),
    "next token": ObjectiveConfig(kind="causal"),
}


class Twin:
    """The same rows, one token after another."""

    def __init__(self, data: TokenData, objective: ObjectiveConfig, length: int) -> None:
        self._stream = data.shards["train"][0].stream
        self._objective, self._length, self._special = objective, length, data.tokenizer.special
        self._random = random.Random(0)

    def batch(self, rows: int) -> tuple[torch.Tensor, ...]:
        built = [self._row() for _ in range(rows)]
        return tuple(torch.tensor(column) for column in zip(*built, strict=True))

    def _row(self) -> tuple[list[int], list[int], list[int], list[int], list[bool]]:
        first = self._random.randrange(len(self._stream) - self._length - 1)
        text = self._stream[first : first + self._length + 1].tolist()
        if self._objective.kind == "causal":
            places = list(range(self._length))
            return text[:-1], text[1:], places, [0] * self._length, [False] * self._length
        if self._random.random() < self._objective.gmask_share:
            return self._generation(text[: self._length - 1])
        room = self._length // self._objective.pieces
        parts = [self._blanks(text[n * room :], room, n) for n in range(self._objective.pieces)]
        fill = (self._special.pad, NO_TARGET, 0, -1)
        tokens, targets, positions, segments = (
            self._filled([value for part in parts for value in part[field]], fill[field])
            for field in range(4)
        )
        context = self._filled([seen for part in parts for seen in part[4]], False)
        return tokens, targets, positions, segments, context

    def _filled(self, column: list[T], value: T) -> list[T]:
        return column + [value] * (self._length - len(column))

    def _generation(self, text: list[int]) -> tuple[list[int], list[int], list[int], list[int], list[bool]]:
        n = len(text)
        cut = n - self._random.randint(math.ceil(self._objective.gmask_least * n), n)
        tokens = [*text[:cut], self._special.gmask, self._special.sop, *text[cut:-1]]
        targets = [NO_TARGET] * (cut + 1) + text[cut:]
        context = [i <= cut for i in range(n + 1)]
        return tokens, targets, list(range(n + 1)), [0] * (n + 1), context

    def _poisson(self) -> int:
        while True:
            limit, product, count = math.exp(-self._objective.span_mean), self._random.random(), 0
            while product > limit:
                count, product = count + 1, product * self._random.random()
            if count:
                return count

    def _blanks(
        self, text: list[int], room: int, segment: int
    ) -> tuple[list[int], list[int], list[int], list[int], list[bool]]:
        lengths = [self._poisson()]
        n = room - 2
        while sum(lengths) < self._objective.mask_fraction * n:
            lengths.append(self._poisson())
            n = room - 2 * len(lengths)
        visible = n - sum(lengths)
        slots = sorted(self._random.sample(range(visible + 1), len(lengths)))
        tokens: list[int] = []
        at, spans = 0, []
        for slot, length, hidden in zip(
            slots, lengths, [sum(lengths[:k]) for k in range(len(lengths))], strict=True
        ):
            begin = slot + hidden
            tokens += text[at:begin]
            spans.append((len(tokens), text[begin : begin + length]))
            tokens.append(self._special.mask)
            at = begin + length
        tokens += text[at:n]
        positions, targets = list(range(len(tokens))), [NO_TARGET] * len(tokens)
        context = [True] * len(tokens)
        self._random.shuffle(spans)
        for place, span in spans:
            for token, target in zip([self._special.sop, *span], [*span, self._special.eop], strict=True):
                tokens.append(token)
                targets.append(target)
                positions.append(place)
                context.append(False)
        left = room - len(tokens)
        return (
            tokens + [self._special.pad] * left,
            targets + [NO_TARGET] * left,
            positions + [0] * left,
            [segment] * len(tokens) + [-1] * left,
            context + [False] * left,
        )


def seconds(work: Callable[..., object], *arguments: int) -> float:
    """This thread's time on its core: other work counts only through caches."""
    started = time.thread_time()
    work(*arguments)
    return time.thread_time() - started


def building(data: TokenData, length: int, rows: int, repeats: int) -> list[dict[str, float | str]]:
    """Tokens a second of ours and of the twin, by kind of row."""
    found: list[dict[str, float | str]] = []
    for name, objective in KINDS.items():
        loader, twin = Loader(data, objective, length=length, seed=0), Twin(data, objective, length)
        loader.batch(0, rows)
        ours, theirs = [], []
        for step in range(repeats):
            ours.append(seconds(loader.batch, step, rows))
            theirs.append(seconds(twin.batch, rows))
        mine, its = statistics.median(ours), statistics.median(theirs)
        ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
        found.append(
            {
                "rows": name,
                "tokens_per_second": rows * length / mine,
                "twin": rows * length / its,
                "ratio": ratio,
            }
        )
    return found


def step_share(data: TokenData, preset: str, repeats: int) -> dict[str, float | str]:
    """Seconds to build a batch, and to train on it."""
    config = with_vocabulary(preset_config(preset), data)
    config = dataclasses.replace(config, batch=dataclasses.replace(config.batch, rows=8))
    loader = Loader(data, config.objective, length=config.model.length, seed=0)
    engine = LocalEngine(config)
    build, train = [], []
    for step in range(repeats + 1):
        started = time.perf_counter()
        batch = loader.batch(step, 8)
        built = time.perf_counter()
        engine.forward_backward(batch, step)
        engine.gradients()
        engine.update(1e-4, clip=1.0)
        if step:  # the first warms up
            build.append(built - started)
            train.append(time.perf_counter() - built)
    shares = [a / (a + b) for a, b in zip(build, train, strict=True)]
    return {
        "preset": preset,
        "build_ms": 1e3 * statistics.median(build),
        "train_ms": 1e3 * statistics.median(train),
        "share": statistics.median(shares),
    }


def sample_data(folder: Path) -> TokenData:
    """A small data folder from the documentation inside Python, repeated."""
    with (folder / "topics.jsonl").open("w", encoding="utf-8") as file:
        for number in range(4):
            for name, text in sorted(topics.items()):
                file.write(json.dumps({"text": text, "group": f"{name} {number}"}) + "\n")
    build_corpus((folder / "topics.jsonl",), folder / "corpus", None)
    train_tokenizer(folder / "corpus", folder / "tokenizer", vocabulary=4096, sample_characters=400_000)
    return build_shards(folder / "corpus", folder / "tokenizer", folder / "shards", 0.0, 1)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="sample_building", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--data", type=Path, help="folder made by glm shards; left out: text that Python carries"
    )
    parser.add_argument("--length", type=int, default=2048, help="tokens a row")
    parser.add_argument("--rows", type=int, default=16, help="rows a batch")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = open_data(options.data) if options.data is not None else sample_data(Path(folder))
        rows = building(data, options.length, options.rows, options.repeats)
        shares = [step_share(data, preset, 5) for preset in ("glm-tiny", "glm-small")]
    if options.json:
        print(json.dumps({"length": options.length, "rows": options.rows, "building": rows, "steps": shares}))
        return 0
    console = Console()
    table = Table(
        "rows", "million tokens/s", "twin", "ratio", title=f"{options.rows} rows of {options.length}"
    )
    for row in rows:
        figures = float(row["tokens_per_second"]) / 1e6, float(row["twin"]) / 1e6, float(row["ratio"])
        table.add_row(escape(str(row["rows"])), *(f"{figure:.2f}" for figure in figures))
    console.print(table)
    for share in shares:
        console.print(
            f"{share['preset']}: {share['build_ms']:.2f} ms to build 8 rows, {share['train_ms']:.0f} ms to train on them: "
            f"{share['share']:.2%} of the step"
        )
    return 0
