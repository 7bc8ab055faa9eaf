"""Speeds, one file a figure: ``python -m experiments.benchmarks NAME [--json]``.

A figure is a ratio beside a peer, measured in one run with the two interleaved, the median of several. Each module has
``main(arguments) -> int``, prints a table, and with ``--json`` one object instead.
"""
