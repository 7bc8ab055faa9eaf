"""What the HuggingFace Trainer prints: one Python dict per record, between progress bars.

    {'loss': 2.31, 'grad_norm': 1.2, 'learning_rate': 2e-05, 'epoch': 0.5}          transformers 4
    {'loss': '2.31', 'grad_norm': '1.2', 'learning_rate': '2e-05', 'epoch': '0.5'}  transformers 5

Source: transformers/trainer_callback.py, PrinterCallback and ProgressCallback; TRL, ms-swift and LLaMA-Factory print the same. The
dict holds no step. A bar does (``120/300 [``), and the reader believes it where it rises from record to record. tqdm draws its bar
anew below what it writes, and shows the step there; the bar above may be some steps behind, and counts only where tqdm drew none
anew. DeepSpeed's lines about its loss scale (deepspeed/runtime/fp16/loss_scaler.py, 0.19) belong to the record before.
"""

from __future__ import annotations

import collections
import itertools
import re
from collections.abc import Iterator
from typing import Any

from stabilitylab.logs.column_names import counter_of
from stabilitylab.logs.pattern import NUMBER, LineValues, number
from stabilitylab.logs.rank_labels import rank_in
from stabilitylab.logs.reading import Reading, Row, text_rows
from stabilitylab.logs.source import LogFile

_RECORD = re.compile(
    rb"\{(?=')[^{}\r\n]*'(?:loss|grad_norm|train_loss|eval_loss|learning_rate)':[^{}\r\n]*\}"
    rb"|OVERFLOW! Rank \d+ Skipping step\. Attempted loss scale: (?P<scale>[\d.e+]+)(?:[^\r\n]*reducing to (?P<next>[\d.e+]+))?"
)
# Also np.float64(1.2), tensor(1.2, device='cuda:0').
_PAIR = re.compile(
    rf"'([^']+)':\s*'?(?:[A-Za-z][\w.]*\()?(?:(\d+)/\d+|({NUMBER}))'?(?:(?:, \w+=[^(){{}},]*)*\))?\s*[,}}]",
    re.IGNORECASE,
)
_BAR = re.compile(rb"\s(\d+)/(\d+) \[")
# On the next line, after any prefix of a logger or launcher.
_DRAWN_ANEW = re.compile(rb"\s*[^\r\n|{}]{0,80}?\d+%\|[^|\r\n]*\|\s(\d+)/(\d+) \[")
_BEFORE = 4096
_FEW_FALLS = 8  # least records between two restarts
_TOLD = re.compile(
    rb"(?:(?i:step|iteration|iter|itr?|updates?)\W{0,3}\d+\b[^{}\r\n]{0,40}|\[\w+\s+\d+\]\s*)\{(?=')[^{}\r\n]*'loss':"
)


def read_huggingface_console(source: LogFile) -> Reading | None:
    """The printed records; None where there are none."""
    first = list(itertools.islice(_records(source), 2000))
    if not any("loss" in values or "train_loss" in values for values, *_ in first):
        return None
    if _TOLD.search(source.head()):
        return None  # another trainer's dictionary, behind its own step
    lines = source.head().decode("utf-8", "replace").splitlines()
    if len({rank_in(line) for line in lines if "'loss':" in line}) > 1:
        return None  # several processes; the Trainer prints from one
    bars = [bar for values, bar, _ in first if "loss" in values]
    anew = _is_drawn_anew(bars, [below for values, _, below in first if "loss" in values])
    believed = anew or _rises(bars)
    scale = next((values["attempted"] for values, *_ in first if "attempted" in values), None)
    reading = Reading(
        format="HuggingFace Trainer console",
        rows=lambda: text_rows(source, reading),
        pieces=lambda: HuggingFacePieces(reading, believed, scale, anew),
        step="step",
        losses=("loss",),
    )
    if not believed and not any(
        counter_of(name) and name != "epoch" for values, *_ in first for name in values
    ):
        reading.notes.append("the records hold no step, and no bar tells it: they are counted from 0")
    return reading


class HuggingFacePieces:
    """Reads printed records.

    Args:
        reading: counts what is left out.
        believed: whether the bars give the steps.
        scale: the loss scale at the start, which the first overflow tried; None: there is none.
        anew: whether the bars below the records give the steps.
    """

    def __init__(self, reading: Reading, believed: bool, scale: float | None, anew: bool) -> None:
        self._reading, self._believed, self._anew = reading, believed, anew
        self.state: dict[str, Any] = {"count": -1, "scale": scale, "bar": None, "held": None, "rest": ""}

    def take(self, piece: bytes) -> Iterator[Row]:
        """The records; where the text mentions a loss scale, it holds the last back for the lines that belong to it."""
        if self._anew:
            piece = self.state["rest"].encode("utf-8", "surrogateescape") + piece
            cut = _without_bar(piece)
            self.state["rest"] = piece[cut:].decode("utf-8", "surrogateescape")
            piece = piece[:cut]
        yield from self._rows(piece)
        if self.state["scale"] is None:
            yield from self._held()

    def _rows(self, piece: bytes) -> Iterator[Row]:
        state = self.state
        for values, above, below in _records_in(piece, state):
            bar = below if self._anew and below is not None else above
            if "loss" in values:
                if state["held"] is not None:
                    yield "", state["held"]
                state["count"] += 1
                known = self._believed and bar is not None
                told = next((values[name] for name in values if counter_of(name) and name != "epoch"), None)
                step = (
                    told if told is not None else float(bar if known and bar is not None else state["count"])
                )
                state["held"] = {**values, "step": step}
                if state["scale"] is not None:
                    state["held"]["loss_scale"] = state["scale"]
            elif "loss_scale" in values:
                state["scale"] = values["loss_scale"]
                if state["held"] is not None:
                    state["held"] |= values
            else:
                summary = "train_runtime" in values or "train_loss" in values
                self._reading.left_out["the closing summary" if summary else "rows of evaluation"] += 1

    def end(self) -> Iterator[Row]:
        """The last record."""
        rest, self.state["rest"] = self.state["rest"], ""
        yield from self._rows(rest.encode("utf-8", "surrogateescape"))
        yield from self._held()

    def _held(self) -> Iterator[Row]:
        held, self.state["held"] = self.state["held"], None
        if held is not None:
            yield "", held


def _rises(bars: list[int | None]) -> bool:
    """Whether bars rise from record to record, or fall back only where a run continues from a checkpoint."""
    told = [bar for bar in bars if bar is not None]
    if len(told) < len(bars) or not told:
        return False
    falls = sum(a > b for a, b in itertools.pairwise(told))
    return falls * _FEW_FALLS <= len(told) and not any(a == b for a, b in itertools.pairwise(told))


def _is_drawn_anew(above: list[int | None], below: list[int | None]) -> bool:
    """Whether the bars below the records give their steps, not those above: a Trainer logs at a regular interval."""
    while below and below[-1] is None:  # the last record may have none
        above, below = above[:-1], below[:-1]
    if not below or not _rises(below):
        return False
    return not _rises(above) or above[0] == 0 or _regularity(below) > _regularity(above)


def _regularity(bars: list[int | None]) -> tuple[float, int]:
    """The share of the commonest distance between steps, and the number of steps that are its multiples."""
    told = [bar for bar in bars if bar is not None]
    distances = collections.Counter(b - a for a, b in itertools.pairwise(told)).most_common(1)
    if not distances:
        return 0.0, 0
    ((distance, times),) = distances
    return times / (len(told) - 1), sum(bar % distance == 0 for bar in told)


def _without_bar(piece: bytes) -> int:
    """Where the last record begins, if its bar may follow; else the piece's length."""
    last = next(iter(collections.deque(_RECORD.finditer(piece), maxlen=1)), None)
    waits = last is not None and last["scale"] is None and not piece[last.end() :].strip()
    return last.start() if last is not None and waits else len(piece)


def _records(source: LogFile) -> Iterator[tuple[LineValues, int | None, int | None]]:
    """The numbers of each record, the last progress bar above it and the one right below."""
    state: dict[str, Any] = {"bar": None}
    for chunk in source.chunks():
        yield from _records_in(chunk, state)


def _records_in(chunk: bytes, state: dict[str, Any]) -> Iterator[tuple[LineValues, int | None, int | None]]:
    at = 0
    for found in _RECORD.finditer(chunk):
        if found["scale"] is not None:
            reached = number((found["next"] or found["scale"]).decode())
            attempted = number(found["scale"].decode())
            yield {"loss_scale": reached, "attempted": attempted, "skipped": 1.0}, state["bar"], None
            continue
        # Of perhaps thousands of bars before a record only the last few matter.
        bars = _BAR.findall(chunk, max(at, found.start() - _BEFORE), found.start())
        state["bar"] = int(bars[-1][0]) if bars else state["bar"]
        at = found.end()
        text = found[0].decode("utf-8", errors="replace")
        anew = _DRAWN_ANEW.match(chunk, at)
        below = int(anew[1]) if anew else None
        yield (
            {name: number(ratio or value) for name, ratio, value in _PAIR.findall(text)},
            state["bar"],
            below,
        )
    bars = _BAR.findall(chunk, max(at, len(chunk) - _BEFORE))
    state["bar"] = int(bars[-1][0]) if bars else state["bar"]
