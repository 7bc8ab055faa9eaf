"""Where packages lie. Everything else stands in pyproject.toml.

The experiments are a folder of the clone; installed, they lie inside stabilitylab (see stabilitylab/laboratory.py), since a package
called ``experiments`` in site-packages would hide everybody else's. An editable installation has them in the clone itself, and the
plain layout, for which setuptools puts the clone on Python's path. For any other layout it installs an importer that Python asks
last, after it has taken a folder named ``stabilitylab`` beside a script, such as the clone, for the package.
"""

import sys

from setuptools import find_packages, setup

BUNDLED = "stabilitylab._bundled"
PACKAGES = find_packages(include=["stabilitylab*", "glm*"])

if "editable_wheel" in sys.argv:
    setup(packages=PACKAGES, package_dir={"": "."})
else:
    setup(
        packages=[*PACKAGES, *(f"{BUNDLED}.{name}" for name in find_packages(include=["experiments*"]))],
        package_dir={f"{BUNDLED}.experiments": "experiments"},
    )
