"""Files that a crash, a full disk or a copy cut short left damaged: what is there is read, what is not is said."""

import gzip
import lzma
import random

import pytest

from stabilitylab.errors import InputError
from stabilitylab.logs.recognise import open_logs
from tests.stabilitylab.logs.told import losses, many

LINES = many("step {k} | loss {x:.4f} | lr 1e-4", 40)


@pytest.mark.parametrize("at", [0, 11, 20, 40])
def test_blocks_of_nul_bytes_in_a_text(tmp_path, at):
    """A file system writes them in the place of blocks that it lost with the machine's power."""
    lines = LINES.splitlines(keepends=True)
    text = ("".join(lines[:at]) + "\0" * 4096 + "".join(lines[at:])).encode()
    (path := tmp_path / "a.log").write_bytes(text)
    assert losses(path)[1:] == (list(range(1, 41)), pytest.approx([9 - k / 10 for k in range(1, 41)]))


def test_bytes_of_every_kind_are_no_text_with_holes(tmp_path):
    (path := tmp_path / "a.bin").write_bytes(bytes(range(256)) * 40)
    with pytest.raises(InputError, match="is a binary file"):
        open_logs([path])


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress])
def test_a_compressed_file_cut_short_is_read_to_its_end(tmp_path, pack):
    draw = random.Random(0)
    text = "".join(f"step {k} loss {9 - k / 1000:.4f} noise {draw.random()}\n" for k in range(1, 2001))
    packed = pack(text.encode())
    (path := tmp_path / "a").write_bytes(packed[: len(packed) * 3 // 4])
    _, steps, _ = losses(path)
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > 1000


def test_a_damaged_compressed_file_is_said(tmp_path):
    draw = random.Random(0)
    packed = bytearray(
        gzip.compress("".join(f"step {k} loss {draw.random()}\n" for k in range(9999)).encode())
    )
    packed[1000:1200] = bytes(200)
    (path := tmp_path / "a.log.gz").write_bytes(packed)
    with pytest.raises(InputError, match="cannot be decompressed"):
        losses(path)


def test_the_first_damaged_row_of_a_table_below_prose_is_shown(tmp_path):
    rows = [f"{k}  {'oops' if k % 3 == 0 else 9 - k / 10}  0.1" for k in range(1, 31)]
    (path := tmp_path / "a.log").write_text("It begins.\n\nstep  loss  lr\n" + "\n".join(rows) + "\n")
    with pytest.raises(InputError, match=r"column 'loss', row 3: 'oops' is not a number, and 9 more of 40"):
        losses(path)
