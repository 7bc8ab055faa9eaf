"""The text of glm's tests."""

from tests.glm.conftest import data_folder, text_files

__all__ = ["data_folder", "text_files"]
