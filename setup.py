"""Where packages lie. Everything else stands in pyproject.toml.

The experiments are a folder of the clone; installed, they lie inside stabilitylab (see stabilitylab/laboratory.py), since a package
called ``experiments`` in site-packages would hide everybody else's.
"""

from setuptools import find_packages, setup

BUNDLED = "stabilitylab._bundled"

setup(
    packages=[
        *find_packages(include=["stabilitylab*", "glm*"]),
        *(f"{BUNDLED}.{name}" for name in find_packages(include=["experiments*"])),
    ],
    package_dir={f"{BUNDLED}.experiments": "experiments"},
)
