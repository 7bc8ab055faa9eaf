"""A loop that dies without ``close`` loses nothing: ``Lifetime`` closes what is open when the process ends.

It holds only a weak reference, so the object may be garbage-collected earlier; a forked child has nothing to write.
"""

from __future__ import annotations

import atexit
import functools
import os
import weakref
from typing import Protocol


class _Closes(Protocol):
    def close(self) -> None: ...


class Lifetime:
    """The lifetime of one object, until its ``close`` or the end of the process.

    Args:
        of: the object, closed at the end before anything that was opened earlier.
    """

    def __init__(self, of: _Closes) -> None:
        self._process = os.getpid()
        self._at_exit = functools.partial(_close, weakref.ref(of), self._process)
        atexit.register(self._at_exit)

    @property
    def is_of_this_process(self) -> bool:
        """False in a forked child."""
        return self._process == os.getpid()

    def end(self) -> None:
        """Stop: the object is closed, or gone."""
        atexit.unregister(self._at_exit)


def _close(of: weakref.ref[_Closes], process: int) -> None:
    alive = of()
    if alive is not None and process == os.getpid():
        alive.close()
