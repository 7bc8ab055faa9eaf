"""Logs of other trainers, read as streams of numbers."""
