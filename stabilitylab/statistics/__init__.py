"""Statistics of tensors, computed on their device in one pass, and the buffer that carries them to the host."""
