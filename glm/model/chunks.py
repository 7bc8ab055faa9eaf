"""How many logits exist at once: those of one chunk of positions, for the loss and for the planner that counts its bytes."""

# About 16 MB in fp32, which stays near the caches and is small beside the model.
CHUNK_ELEMENTS = 1 << 22
