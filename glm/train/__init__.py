"""Training: configuration, loop, engine, optimizers, checkpoints, replay and attribution."""
