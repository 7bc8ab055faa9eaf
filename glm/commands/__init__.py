"""The commands of ``glm``. They stand above the rooms that they import."""
