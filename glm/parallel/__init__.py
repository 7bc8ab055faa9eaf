"""Many devices: what a topology costs on paper, how a world is laid out, and training on it."""
