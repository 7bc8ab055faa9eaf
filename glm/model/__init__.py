"""The model: embedding, attention, feed-forward layers, blocks and the vocabulary loss."""
