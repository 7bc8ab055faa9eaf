"""Shared by all tests: one thread a process (two test processes share two cores), Agg figures, no network.

One process does once what every test needs before its first line. Python writes bytecode (some images turn that off; each of some
two hundred processes of a whole run would then compile the packages anew). Where several processes of pytest-xdist collect the
tests, every second one begins at the other end, so that each finds half of the modules compiled.
"""

import contextlib
import gc
import importlib
import os
import sys
from pathlib import Path

# Off until all tests are collected: what they import stays to the end, and the garbage collector would walk through it again and
# again meanwhile, for a third of that time.
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
    """One thread; where several processes collect tests, every second one first imports them from the other end."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is None and session.config.getoption("numprocesses", None):
        return
    import torch

    torch.set_num_threads(1)
    if worker and int(worker.removeprefix("gw")) % 2:
        for path in reversed(modules_to_collect(session.config.args)):
            # The collection itself reports what cannot be imported, or is skipped here.
            with contextlib.suppress(Exception, pytest.skip.Exception):
                importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))


def modules_to_collect(arguments: list[str]) -> list[Path]:
    """The test modules below the folders given to pytest, in its order; not the files and tests that are named."""
    folders = [Path(argument).resolve() for argument in arguments if Path(argument).is_dir()]
    return [
        path
        for folder in folders
        if folder.is_relative_to(ROOT)
        for path in sorted(folder.rglob("test_*.py"))
    ]


def pytest_collection_finish() -> None:
    """Keep the garbage collector from walking through what stays to the end: thousands of tests and all imports.

    It still walks through what tests themselves import; higher thresholds make it do so a fifth as often, which saves some 12 s of
    a whole run.
    """
    gc.freeze()
    gc.set_threshold(2_000, 10, 50)
    gc.enable()
