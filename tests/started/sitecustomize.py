"""What every Python that tests start does first: it runs the garbage collector seldom, and not on its way out.

What a process has imported stays to its end. The collector would walk through all of it after every seven hundred new objects, and
once more at the end: half to three quarters of a second of each process that imports torch. ``tests/conftest.py`` puts this folder
on the path; a test that starts what a reader would start gives a path of its own.
"""

import atexit
import gc

gc.set_threshold(50_000, 10, 50)
atexit.register(gc.freeze)
