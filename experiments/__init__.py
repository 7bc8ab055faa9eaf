"""Questions about stability: arms, seeds, statistics and verdicts."""
