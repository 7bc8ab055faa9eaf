"""Shared by all tests: one thread a process (two test processes share two cores), Agg figures, no network."""

import gc
import os

# Until all tests are collected: what they import stays to the end, and while it comes the collector of cycles would walk through it
# again and again, a third of that time.
gc.disable()

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Keep the collector from walking through what stays to the end: thousands of tests and all that is imported.

    What tests import themselves it walks through whenever it is as old; five times as seldom saves some 12 s of a whole run's.
    """
    gc.freeze()
    gc.set_threshold(2_000, 10, 50)
    gc.enable()
