"""Builds the batch of a step again, from the sample numbers that telemetry recorded."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from glm.data.loader import Loader
from stabilitylab.runs import load_run
from stabilitylab.runs.folder import RunFolder

if TYPE_CHECKING:
    import pandas as pd

SHOWN = 12  # tokens of a row to quote


class BatchDescriber:
    """Step -> the documents of its batch, each with its range of tokens, for a reader.

    Args:
        run: the folder whose telemetry says which samples a step saw. The first call reads it.
        loader: the run's own.
        length: tokens a row.
    """

    def __init__(self, run: RunFolder, loader: Loader, length: int) -> None:
        self._run = run
        self._loader = loader
        self._length = length

    def __call__(self, step: int) -> list[str]:
        samples = self.samples(step)
        if not samples:
            return []
        lines = []
        batch = self._loader.samples(samples)
        for tokens_T, row in zip(batch.tokens_BT, batch.provenance, strict=True):
            for piece in row:
                documents = self._loader.documents(piece)
                more = f" and {len(documents) - 1} more" if len(documents) > 1 else ""
                ends = f"tokens {piece.first:,} to {piece.first + piece.length - 1:,}"
                lines.append(f"{documents[0] if documents else piece.source}{more} ({ends})")
            words = " ".join(self._loader.data.tokenizer.decode(tokens_T[:SHOWN].tolist()).split())
            lines[-1] += f', row begins "{words}"'
        return lines

    def samples(self, step: int) -> range:
        """Numbers of the rows that ``step`` trained on; empty where telemetry does not say."""
        first, tokens = self._recorded
        if step not in first.index or step not in tokens.index:
            return range(0)
        begin = int(first.loc[step])
        return range(begin, begin + int(tokens.loc[step]) // self._length)

    @cached_property
    def _recorded(self) -> tuple[pd.Series[float], pd.Series[float]]:
        run = load_run(self._run.path)
        return run.series("train/-/first_sample"), run.series("train/-/tokens")
