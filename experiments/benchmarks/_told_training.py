"""``glm`` itself, telling of every step, so that the benchmark can disturb a training at a given step."""

import sys

from glm.cli import main
from stabilitylab.command_line import imports_uncollected

if __name__ == "__main__":
    with imports_uncollected():
        from glm.commands import train as train  # all that the command imports
        from glm.train import progress
    progress.SECONDS_BETWEEN_LINES = 0.0
    sys.exit(main())
