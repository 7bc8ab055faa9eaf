"""Turns text into windows: reads it in blocks, tokenises block by block, cuts it into pieces that the model takes at once.

A file of any size passes through; memory holds no more than a block and a window. Blocks end before a line that is not empty, so
that tokens do not straddle them: tokens are those of the whole text, except where a tokenizer joins words over line breaks.

What a tokenizer puts around a text (``[CLS]`` ... ``[SEP]``, ``<s>``) it puts around every window: that is how the model was
trained, and massive activations sit on just these tokens (Sun et al., arXiv:2402.17762, section 3). Windows do not overlap and the
model remembers nothing from one to the next, so losses are those of texts of that length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stabilitylab.errors import InputError

BLOCK = 1 << 16
NO_TARGET = -100

Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class Window:
    """What a model takes at once.

    Attributes:
        inputs: keyword arguments of the module.
        tokens: how many, special ones included.
        targets_BT: for each output position the token it should predict, -100 for none; None for models without a loss.
    """

    inputs: Mapping[str, Any]
    tokens: int
    targets_BT: Tensor | None = None

    def on(self, device: torch.device) -> Window:
        """The same window on a device."""
        inputs = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in self.inputs.items()}
        targets_BT = None if self.targets_BT is None else self.targets_BT.to(device)
        return replace(self, inputs=inputs, targets_BT=targets_BT)


def read_text(text: Iterable[str] | Path) -> Iterator[str]:
    """The text in parts: a file's blocks, or the strings as they are.

    Raises:
        InputError: the file is missing or is not UTF-8 text.
    """
    if isinstance(text, Path):
        yield from _blocks(text)
    elif isinstance(text, str):
        yield text
    else:
        yield from text


def _blocks(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as file:
            held = ""
            while block := file.read(BLOCK):
                held += block
                # Cut before the last line that is not empty: line breaks in a row are often one token.
                end = held.rstrip("\n").rfind("\n") + 1
                if end:
                    yield held[:end]
                    held = held[end:]
            if held:
                yield held
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text: give a plain text file") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder: give a plain text file") from None
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: give a plain text file") from None
    except PermissionError:
        raise InputError(f"{path} may not be read: give a plain text file") from None


@dataclass(frozen=True, kw_only=True)
class TokenWindows:
    """Cuts text into windows of tokens for a model that takes ``input_ids``.

    Attributes:
        encode: text to token numbers, nothing added.
        before: tokens that go before every window.
        after: tokens that go after it.
        predicts: whether each position predicts the next token.
    """

    encode: Encode
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    predicts: bool

    def __call__(self, parts: Iterator[str], length: int, limit: int | None) -> Iterator[Window]:
        """Windows of ``length`` tokens, the last one shorter, until ``limit`` tokens are out.

        Raises:
            InputError: ``length`` leaves no room for text.
        """
        frame = len(self.before) + len(self.after)
        least = 1 + (self.predicts and not self.before)
        if length < frame + least:
            raise InputError(
                f"windows of {length} tokens have no room for text: give a length of at least {frame + least}"
            )
        held: list[int] = []
        left = limit
        for part in parts:
            held.extend(self.encode(part))
            done = 0
            while len(held) - done >= (room := _smaller(length, left) - frame) and room >= least:
                yield self._window(held[done : done + room])
                done += room
                left = None if left is None else left - room - frame
            if room < least:
                return
            del held[:done]
        if len(held) >= least:
            yield self._window(held)

    def _window(self, tokens: Sequence[int]) -> Window:
        tokens_BT = torch.tensor([[*self.before, *tokens, *self.after]], dtype=torch.int64)
        targets_BT = None
        if self.predicts:
            targets_BT = torch.full_like(tokens_BT, NO_TARGET)
            targets_BT[:, :-1] = tokens_BT[:, 1:]
        return Window(inputs={"input_ids": tokens_BT}, tokens=tokens_BT.shape[1], targets_BT=targets_BT)


def _smaller(length: int, left: int | None) -> int:
    return length if left is None else min(length, left)
