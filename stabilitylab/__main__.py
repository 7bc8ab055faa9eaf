import sys

from stabilitylab.cli import main

sys.exit(main())
