"""Launch the processes of one run, bring them together and let them agree. Knows torch and nothing of models."""
