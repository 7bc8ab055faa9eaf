"""How long a test waits for an event: until it comes. No test measures speed by wall-clock time.

On a loaded machine a process may stand still for seconds at any place. So the event itself ends a wait, and ``PATIENCE`` only ends
what hangs for good.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

# Seconds.
PATIENCE = 600.0


def wait_until(come: Callable[[], T], pause: float = 0.01) -> T:
    """The value of ``come()`` as soon as it is true; fails where it never is."""
    until = time.monotonic() + PATIENCE
    while not (value := come()):
        assert time.monotonic() < until, "it did not come"
        time.sleep(pause)
    return value
