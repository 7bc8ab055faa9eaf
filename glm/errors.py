"""The error that users see, under the name that all of glm uses: what was given, where, and what to do."""

from __future__ import annotations

from stabilitylab.errors import InputError

__all__ = ["InputError"]
