"""Training on many devices: how a topology divides the ranks and cuts the model, and the engine that trains on it."""
