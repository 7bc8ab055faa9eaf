"""Processes of one run: launched, gathered, agreeing. Knows torch and nothing of models."""
