"""The commands of ``glm``, above everything that they command."""
