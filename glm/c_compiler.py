"""The builder of C sources, under the name that all of glm uses (``stabilitylab.c_compiler``)."""

from __future__ import annotations

from stabilitylab.c_compiler import SWITCH, built, switched_off

__all__ = ["SWITCH", "built", "switched_off"]
