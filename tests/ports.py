"""TCP ports for servers that tests start.

Between asking the kernel for a free port and using it, another process may be given the same one: the kernel hands out the ports of
its ephemeral range (from 32768 on Linux, from 49152 on macOS, on Windows and in RFC 6335) to all who ask for any, and tests ask all
the time. A port below that range goes to nobody who does not name it.
"""

from __future__ import annotations

import errno
import random
import socket

_NAMED = range(20_000, 32_768)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody has, drawn where the kernel gives none away."""
    draw = random.SystemRandom()  # tests seed the shared generator, all workers alike
    while True:
        port = draw.choice(_NAMED)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            else:
                return port
