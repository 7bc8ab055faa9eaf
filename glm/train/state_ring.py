"""A ring of recent states in memory, to which the loop goes back when a detector fires.

Rolling back n steps needs the state of n steps ago. Checkpoints on disk are too far apart, so while a responder is active the loop
keeps copies of its state every ``every`` steps, the newest ``size`` of them. One copy is the fp32 weights and two moments: 12 bytes
a parameter.
"""

from __future__ import annotations

from collections import deque

from glm.train.checkpoint import Checkpoint


class StateRing:
    """The newest states, oldest first.

    Args:
        every: steps between copies.
        size: copies kept.
    """

    def __init__(self, *, every: int, size: int) -> None:
        self.every = every
        self._states: deque[Checkpoint] = deque(maxlen=size)

    @classmethod
    def covering(cls, steps: int) -> StateRing:
        """A ring that reaches back at least ``steps``, with about ten states."""
        every = max(1, steps // 8)
        return cls(every=every, size=steps // every + 2)

    def is_due(self, step: int) -> bool:
        """Whether to keep the state before ``step``: a run that begins, or resumes, at once has a state to go back to."""
        if not self._states:
            return True
        return step % self.every == 0 and self._states[-1].step != step

    def keep(self, state: Checkpoint) -> None:
        """Copy a live state into the ring."""
        self._states.append(state.copied())

    def newest_at(self, step: int) -> Checkpoint | None:
        """The newest state at or before ``step``, or the oldest there is. None: there is none."""
        older = [state for state in self._states if state.step <= step]
        return older[-1] if older else next(iter(self._states), None)

    def take_back(self, step: int) -> Checkpoint | None:
        """The newest state at or before ``step``, or the oldest there is; drops newer ones. None: there is none."""
        while len(self._states) > 1 and self._states[-1].step > step:
            self._states.pop()
        return self._states[-1] if self._states else None
