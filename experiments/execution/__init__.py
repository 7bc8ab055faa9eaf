"""Making runs: where they compute, in which order, and how many at once."""
