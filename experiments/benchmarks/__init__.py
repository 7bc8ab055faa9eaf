"""Benchmarks, one file per figure: ``python -m experiments.benchmarks NAME [--json]``.

A figure is a ratio to a peer, the median of several, measured in one run with the two interleaved. Each module has
``main(arguments) -> int``, which prints a table, or with ``--json`` one object.
"""
