"""How long a test waits for what must come: until it comes. No test measures speed by a clock on the wall.

On a loaded machine a process may stand still for seconds at any place. So a wait ends by what is waited for, and ``PATIENCE`` only
ends what hangs for good.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

# Seconds.
PATIENCE = 600.0


def wait_until(come: Callable[[], T], pause: float = 0.01) -> T:
    """What ``come`` returns as soon as that is true; fails where it never is."""
    until = time.monotonic() + PATIENCE
    while not (value := come()):
        assert time.monotonic() < until, "it did not come"
        time.sleep(pause)
    return value
