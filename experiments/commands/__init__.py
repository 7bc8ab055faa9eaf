"""The commands of ``python -m experiments``, a file each, or one for those on suites."""
