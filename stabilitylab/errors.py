"""The one error that users see: names what they gave, where, and what to do.

Any input from outside (a path, a column, a config field, a checkpoint) can be wrong. Code that notices raises ``InputError``; a
command line turns it into one line on stderr and exit code 2, without a traceback. Every other exception is our own defect and
keeps its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable


class InputError(ValueError):
    """Some input from outside is wrong. The message names it and the way out, in one line."""


# What the system says of a path that cannot serve: it is the user's to choose another.
REFUSED_PATH = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run_command(command: Callable[[], int | None]) -> int:
    """Run a command-line entry point and turn expected failures into one line and an exit code.

    Returns:
        The command's own code (``None`` counts as 0); 2 for wrong input, a full disk, or a path that the system refuses; 130
        after an interrupt that the command did not handle itself; 0 where the output's reader has gone (``| head``).
    """
    try:
        code = _outcome(command)
    except SystemExit as stop:
        # rich's consoles leave with 1 where nobody reads; the parser leaves with 0 after --help, with 2 after its refusal.
        if not isinstance(stop.__context__, BrokenPipeError):
            _outcome(_flush)
            raise
        code = _reader_gone()
    # Python would flush when the process ends, where an error can only be ignored, and printed.
    return _outcome(_flush) or code


def _outcome(command: Callable[[], int | None]) -> int:
    try:
        return command() or 0
    except InputError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return _reader_gone()
    except OSError as error:
        if error.errno in _FULL:
            where = f" while writing {error.filename}" if error.filename else ""
            return _refuse(
                f"{os.strerror(error.errno)}{where}: free some space and run the same command again"
            )
        if error.errno in REFUSED_PATH and error.filename is not None:
            return _refuse(f"cannot use {error.filename}: {os.strerror(error.errno)}; give another path")
        raise


def _flush() -> None:
    if sys.stdout is not None and not sys.stdout.closed:
        try:
            sys.stdout.flush()
        except OSError as error:
            _discard_output()
            if not isinstance(error, BrokenPipeError):
                error.filename = "the output"
            raise


def _reader_gone() -> int:
    """Nothing is left to say, and what is still buffered goes nowhere."""
    _discard_output()
    return 0


def _discard_output() -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a stream of a test has no descriptor
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _refuse(message: str) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return 2
