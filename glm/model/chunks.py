"""How many logits are there at once: of a chunk of positions, in the loss and in the planner that counts its bytes."""

# About 16 MB in fp32, which stays near the caches and is small beside the model.
CHUNK_ELEMENTS = 1 << 22
