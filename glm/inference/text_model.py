"""Opens a GLM for stabilitylab to read text with: the entry point ``glm`` of the group ``stabilitylab.models``.

A window has the objective's layout (``prompt.py``): its first half is context, the model predicts the second half,

    context [gMASK] sop t_1 .. t_n-1   ->   t_1 .. t_n

with one blank at the end where the model was trained on [MASK] alone, and the whole window as next tokens where it was trained on
those. So stabilitylab sees bidirectional and causal activations in equal parts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from glm.data.batch import NO_TARGET
from glm.data.config import ObjectiveConfig
from glm.data.tokenizer import Tokenizer
from glm.errors import InputError
from glm.inference.loading import open_model
from glm.inference.prompt import Kind, Prompt
from glm.precision.policy import cast_parameters
from stabilitylab.models import TextModel, Window

LEAST = 4


def open_glm(path: Path, dtype: torch.dtype) -> TextModel | None:
    """Open a run, a checkpoint or an export; None where the path is none of these.

    Raises:
        InputError: the folder is one of these, and cannot be read.
    """
    if not _ours(path):
        return None
    opened = open_model(path)
    return TextModel.of(
        cast_parameters(opened.model, dtype),
        path=path,
        name=path.resolve().name,
        predicts=True,
        longest=opened.model.config.length,
        cut=GlmWindows(tokenizer=opened.tokenizer, objective=opened.config.objective),
    )


def _ours(path: Path) -> bool:
    """Whether the configuration of a run, of a checkpoint's run, or of an export is ours."""
    folder = path.resolve()
    if (folder / "manifest.json").is_file():
        folder = folder.parent.parent
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and {"model", "objective", "optimizer"} <= config.keys()


@dataclass(frozen=True, kw_only=True)
class GlmWindows:
    """Cuts text into rows of the objective."""

    tokenizer: Tokenizer
    objective: ObjectiveConfig

    def __call__(self, parts: Iterator[str], length: int, limit: int | None) -> Iterator[Window]:
        """Windows of ``length`` tokens, the last one shorter, until ``limit`` tokens are out.

        Raises:
            InputError: ``length`` leaves no room for text.
        """
        # Beside the text there are sop and the mask, and the model only predicts the last token.
        beside = 0 if self.objective.kind == "causal" else 1
        if length < LEAST:
            raise InputError(
                f"windows of {length} tokens have no room for text: give a length of at least {LEAST}"
            )
        held: list[int] = []
        left = limit
        for part in parts:
            held += self.tokenizer.encode(part)
            done = 0
            while (size := length if left is None else min(length, left)) >= LEAST:
                text = held[done : done + size - beside]
                if len(text) < size - beside:
                    break
                yield self._window(text)
                done += len(text)
                left = None if left is None else left - size
            if size < LEAST:
                return
            del held[:done]
        if len(held) >= LEAST:
            yield self._window(held)

    def _window(self, text: Sequence[int]) -> Window:
        special = self.tokenizer.special
        causal = self.objective.kind == "causal"
        half = 1 if causal else len(text) // 2
        kind: Kind = "causal" if causal else "mask" if self.objective.kind == "span-corruption" else "gmask"
        mask = () if causal else (special.mask if kind == "mask" else special.gmask,)
        prompt = Prompt(
            kind=kind,
            context=(*text[:half], *mask),
            blanks=() if causal else (half,),
            parts=(),
            sop=special.sop,
        )
        # A row of next tokens ends with a token that nothing follows; the others end before the last one.
        layout = prompt.layout(target=text[half:] if causal else text[half:-1])
        predicted = text[half:]
        targets_BT = torch.full((1, len(layout)), NO_TARGET, dtype=torch.int64)
        first = len(layout) - len(predicted) - causal
        targets_BT[0, first : first + len(predicted)] = torch.tensor(predicted)
        context_BT = torch.zeros(1, len(layout), dtype=torch.bool)
        context_BT[0, : layout.context] = True
        return Window(
            inputs={
                "tokens_BT": torch.tensor([layout.tokens]),
                "positions": layout.place_tensor(two=self.objective.positions == "2d")[None],
                "segments_BT": torch.zeros(1, len(layout), dtype=torch.int32),
                "context_BT": context_BT,
            },
            tokens=len(layout),
            targets_BT=targets_BT,
        )
