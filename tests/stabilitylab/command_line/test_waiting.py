"""Threads that wait for each other: the settings that GNU's OpenMP runtime itself reports."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

LOADING = """
import os
os.cpu_count, os.getloadavg = lambda: 4, lambda: ({load}, 0.0, 0.0)
from stabilitylab.command_line import sleep_while_waiting
sleep_while_waiting()
import torch
"""
OURS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def told(load: float = 4.0, **set_by_the_user: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in OURS}
    environment |= {"OMP_DISPLAY_ENV": "verbose", **set_by_the_user}
    shown = subprocess.run(
        [sys.executable, "-c", LOADING.format(load=load)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    if "GOMP_SPINCOUNT" not in shown:
        pytest.skip("torch's OpenMP runtime is not GNU's")
    return shown


def test_waiting_threads_sleep_soon_on_busy_cores_alone() -> None:
    assert "GOMP_SPINCOUNT = '1000'" in told()
    assert "GOMP_SPINCOUNT = '1000'" not in told(load=3.9)


def test_what_the_user_has_set_stands() -> None:
    assert "GOMP_SPINCOUNT = '77'" in told(GOMP_SPINCOUNT="77")
    # Of an active wait GNU's runtime makes thirty billion looks.
    assert "GOMP_SPINCOUNT = '30000000000'" in told(OMP_WAIT_POLICY="active")
