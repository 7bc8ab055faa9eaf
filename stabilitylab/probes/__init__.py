"""Where numbers come from: gradients, activations, attention scores, updates, weights, precision and formats."""
