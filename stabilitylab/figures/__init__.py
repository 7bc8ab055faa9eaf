"""Figures: curves, maps of layers over steps, and their one look. Reports and sinks draw with them."""
