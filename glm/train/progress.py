"""Shows a person a run's progress: loss, gradient norm, learning rate, tokens/s, time left.

On a terminal a bar that redraws; elsewhere (a log file, a batch job) one line every few seconds, whose start ``step N/TOTAL`` other
programs may read.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from glm.train.events import Callback, StepInfo
from glm.train.loop import Trainer
from stabilitylab.monitoring.sentences import event_line
from stabilitylab.telemetry import Event

SECONDS_BETWEEN_LINES = 5.0
# Events to show a person as they happen; checkpoints and the like are routine.
ROUTINE = frozenset({"checkpoint", "run-start", "run-end"})


class ProgressCallback(Callback):
    """Live progress on a console.

    Args:
        console: where to; standard error by default, so that standard output stays for results.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._bar: Progress | None = None
        self._steps = 0
        self._began = 0.0
        self._first_step = 0
        self._last_line = 0.0
        self._tokens_per_second = 0.0

    def train_start(self, trainer: Trainer) -> None:
        self._steps = trainer.config.steps
        self._first_step = trainer.step
        self._began = time.perf_counter()
        self._last_line = self._began
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[said]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._bar.add_task("training", total=self._steps, completed=trainer.step, said="")
            self._bar.start()

    def step_end(self, info: StepInfo) -> Sequence[Event]:
        now = info.tokens / max(info.seconds, 1e-9)
        # An exponential mean over about ten steps: steady enough to read, quick enough to show a stall.
        self._tokens_per_second = (
            0.9 * self._tokens_per_second + 0.1 * now if self._tokens_per_second else now
        )
        said = (
            f"loss {info.loss:.4f}  gradient norm {info.gradient_norm:.3g}  lr {info.learning_rate:.2e}  "
            f"{self._tokens_per_second:,.0f} tokens/s" + ("  skipped" if info.skipped else "")
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=info.step + 1, said=said)
        elif (moment := time.perf_counter()) - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = moment
            self._line(info.step + 1, said)
        return ()

    def event(self, event: Event) -> None:
        if event.kind not in ROUTINE:
            # Names come from the run and are no markup.
            self.console.print(Text(event_line(event), style="yellow"), soft_wrap=True)

    def train_end(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _line(self, done: int, said: str) -> None:
        seconds = time.perf_counter() - self._began
        left = seconds / max(1, done - self._first_step) * (self._steps - done)
        self.console.print(
            f"step {done}/{self._steps}  {said}  {left:,.0f} s left",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )
