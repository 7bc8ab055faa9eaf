"""Shared by all tests: one thread a process (two test processes share two cores), Agg figures, no network.

What a test needs before its first line is done once, and by one of the processes: bytecode is kept (some images of Python are told
not to; then each of some two hundred processes of a whole run compiles the packages anew), and where pytest-xdist has the tests
collected in several processes, every second one begins at the other end, so that each finds half of the modules compiled.
"""

import contextlib
import gc
import importlib
import os
import sys
from pathlib import Path

# Until all tests are collected: what they import stays to the end, and while it comes the collector of cycles would walk through it
# again and again, a third of that time.
gc.disable()

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

import pytest  # noqa: E402

ROOT = Path(__file__).parents[1]
STARTED = str(ROOT / "tests" / "started")
if STARTED not in (paths := os.environ.get("PYTHONPATH", "").split(os.pathsep)):
    os.environ["PYTHONPATH"] = os.pathsep.join([STARTED, *filter(None, paths)])


def pytest_sessionstart(session: pytest.Session) -> None:
    """One thread; where tests are collected by several processes, every second one imports them from the other end first."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None and session.config.getoption("numprocesses", None):
        return
    import torch

    torch.set_num_threads(1)
    if worker and int(worker.removeprefix("gw")) % 2:
        for path in reversed(modules_to_collect(session.config.args)):
            # What cannot be imported, or is not meant to be here, is told when it is collected.
            with contextlib.suppress(Exception, pytest.skip.Exception):
                importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))


def modules_to_collect(arguments: list[str]) -> list[Path]:
    """Those below folders that pytest was given, as it collects them; a file or a test that was named is left to it."""
    folders = [Path(argument).resolve() for argument in arguments if Path(argument).is_dir()]
    return [
        path
        for folder in folders
        if folder.is_relative_to(ROOT)
        for path in sorted(folder.rglob("test_*.py"))
    ]


def pytest_collection_finish() -> None:
    """Keep the collector from walking through what stays to the end: thousands of tests and all that is imported.

    What tests import themselves it walks through whenever it is as old; five times as seldom saves some 12 s of a whole run's.
    """
    gc.freeze()
    gc.set_threshold(2_000, 10, 50)
    gc.enable()
