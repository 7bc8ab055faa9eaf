"""What every Python that tests start does first: it calls the collector of cycles seldom, and not on its way out.

What a process has imported stays to its end. Seven hundred objects at a time, and once more when it ends, the collector would walk
through all of it: half a second to three quarters of each process that imports torch. ``tests/conftest.py`` puts this folder on the
path; a test that starts what a reader would start gives a path of its own.
"""

import atexit
import gc

gc.set_threshold(50_000, 10, 50)
atexit.register(gc.freeze)
