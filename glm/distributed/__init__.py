"""Brings the processes of one run together and lets them agree. Knows torch and nothing of models."""
