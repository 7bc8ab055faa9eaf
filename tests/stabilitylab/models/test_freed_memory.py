"""Freed pages of a mapped file come back as they were; pages that were written to, or never belonged to a file, stay."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import safe_open, save_file

from stabilitylab.models.freed_memory import let_go_of_pages

MIB = 1 << 20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are asked of Linux")


def of_files():
    """Bytes of files' pages that count as this process's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssFile:"):
            return 1024 * int(line.split()[1])
    return 0


def mapped(file, numbers):
    save_file({"w": numbers}, file)
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor("w")


def test_pages_of_a_file_are_let_go_and_come_back(tmp_path):
    own = torch.randn(8 * MIB).view(2, -1)
    tensor = mapped(tmp_path / "file", own)
    assert torch.equal(tensor, own)
    before = of_files()
    let_go_of_pages([tensor])
    # 32 MiB were read; libraries' pages may come or go by a few.
    assert before - of_files() > 28 * MIB
    assert torch.equal(tensor, own)


def test_what_was_written_to_is_not_lost(tmp_path):
    own = torch.randn(MIB)
    tensor = mapped(tmp_path / "file", own)
    tensor[12345] = 7.0
    let_go_of_pages([tensor])
    own[12345] = 7.0
    assert torch.equal(tensor, own)


def test_memory_that_is_no_file_stays():
    tensor = torch.randn(MIB)
    copy = tensor.clone()
    let_go_of_pages([tensor, tensor[1:], tensor.view(2, -1).T])
    assert torch.equal(tensor, copy)
