"""``glm`` itself, that tells of every step: what is done to a training can then be done at a step."""

import sys

from glm.cli import main
from glm.train import progress

if __name__ == "__main__":
    progress.SECONDS_BETWEEN_LINES = 0.0
    sys.exit(main())
