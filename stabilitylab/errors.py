"""The one error that users see: names what they gave, where, and what to do.

Any input from outside (a path, a column, a config field, a checkpoint) can be wrong. Code that notices raises ``InputError``; a
command line turns it into one line on stderr and exit code 2, without a traceback. Every other exception is our own defect and
keeps its traceback.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable


class InputError(ValueError):
    """Some input from outside is wrong. The message names it and the way out, in one line."""


def run_command(command: Callable[[], int | None]) -> int:
    """Run a command-line entry point and turn expected failures into one line and an exit code.

    Returns:
        The command's own code (``None`` counts as 0); 2 for wrong input or a full disk; 130 after an interrupt that the
        command did not handle itself.
    """
    try:
        return command() or 0
    except InputError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone (``| head``): nothing is left to say.
        sys.stderr.close()
        return 0
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            where = f" while writing {error.filename}" if error.filename else ""
            return _refuse(
                f"{os.strerror(error.errno)}{where}: free some space and run the same command again"
            )
        raise


def _refuse(message: str) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return 2
