import sys

from glm.cli import main

sys.exit(main())
