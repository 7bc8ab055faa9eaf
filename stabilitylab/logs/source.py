"""The source of a log's bytes: a plain or compressed file, or standard input.

The first bytes, not the name, tell the compression: gzip, bzip2, xz, zstd, or a zip archive of one file. Text is UTF-8 unless it
opens with the byte order mark of UTF-16 (as a redirect in Windows PowerShell 5 writes). Standard input is copied to a temporary
file first, because a log is read more than once.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import shutil
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from stabilitylab.errors import InputError
from stabilitylab.logs.binary import NoLogError, one_in_zip

CHUNK_BYTES = 4 << 20
LONGEST_LINE = 16 << 20
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}


class LogFile:
    """One file that can be read again and again from its start.

    Attributes:
        path: its place.
        name: its name in messages.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.path = path
        self.name = name or str(path)
        with path.open("rb") as file:
            start = file.read(8)
        self.compression = next((kind for mark, kind in _COMPRESSED.items() if start.startswith(mark)), None)

    def open(self) -> BinaryIO:
        """The bytes, decompressed, and as UTF-8 where they were UTF-16."""
        raw = self._decompressed()
        marks = b"".join(self._guarded(raw, 2, once=True))
        raw.close()
        raw = self._decompressed()
        if marks in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return cast(BinaryIO, io.BufferedReader(_Utf8(raw)))
        return raw

    def head(self, size: int = 1 << 16) -> bytes:
        """The first bytes, up to any damage."""
        with self.open() as file:
            return b"".join(self._guarded(file, size, once=True))

    def chunks(self) -> Iterator[bytes]:
        """All bytes, in pieces that end with a line."""
        rest = b""
        with self.open() as file:
            for piece in self._guarded(file, CHUNK_BYTES):
                # A progress bar goes back with \r and may never write \n.
                end = max(piece.rfind(b"\n"), piece.rfind(b"\r")) + 1
                if not end and len(rest) < LONGEST_LINE:
                    rest += piece
                    continue
                yield rest + piece[:end]
                rest = piece[end:]
        if rest:
            yield rest

    def lines(self) -> Iterator[bytes]:
        """All lines, with their ends."""
        for chunk in self.chunks():
            yield from chunk.splitlines(keepends=True)

    def on_disk(self) -> Path:
        """A file that holds the bytes as they are, for readers that seek."""
        if self.compression is None:
            return self.path
        with self._decompressed() as file, tempfile.NamedTemporaryFile(delete=False) as copy:
            shutil.copyfileobj(file, copy)
        _temporary.append(Path(copy.name))
        return Path(copy.name)

    def _guarded(self, file: BinaryIO, size: int, *, once: bool = False) -> Iterator[bytes]:
        # read() would lose with EOFError what it has decompressed so far
        read = getattr(file, "read1", file.read)
        pieces: list[bytes] = []
        held = 0
        try:
            while piece := read(size - held):
                pieces.append(piece)
                held += len(piece)
                if held >= size:
                    yield b"".join(pieces)
                    pieces, held = [], 0
                    if once:
                        return
        except EOFError:  # a compressed file still being written, or cut short: read what is there
            pass
        except Exception as error:
            if isinstance(error, OSError | lzma.LZMAError | zipfile.BadZipFile | zlib.error) or type(
                error
            ).__module__.startswith("zstandard"):
                raise InputError(f"{self.name} cannot be decompressed: {error}") from None
            raise
        if held:
            yield b"".join(pieces)

    def _decompressed(self) -> BinaryIO:
        if self.compression == "gzip":
            return cast(BinaryIO, gzip.open(self.path))
        if self.compression == "bzip2":
            return cast(BinaryIO, bz2.open(self.path))
        if self.compression == "xz":
            return cast(BinaryIO, lzma.open(self.path))
        if self.compression == "zip":
            name, instead = one_in_zip(self.path)
            if name is None:
                damaged = instead.startswith("a damaged")  # or being written
                raise (InputError if damaged else NoLogError)(f"{self.name} is {instead}")
            return cast(BinaryIO, zipfile.ZipFile(self.path).open(name))
        if self.compression == "zstd":
            import zstandard

            reader = zstandard.ZstdDecompressor().stream_reader(
                self.path.open("rb"), read_across_frames=True, closefd=True
            )
            return cast(BinaryIO, io.BufferedReader(reader))
        return self.path.open("rb")


class WithoutHoles(LogFile):
    """A text without its NUL bytes: blocks that a crash left unwritten, or UTF-16 without its mark."""

    def head(self, size: int = 1 << 16) -> bytes:
        """The first bytes."""
        return super().head(size).replace(b"\0", b"")

    def chunks(self) -> Iterator[bytes]:
        """All bytes, in pieces that end with a line."""
        for chunk in super().chunks():
            yield chunk.replace(b"\0", b"")


class _Utf8(io.RawIOBase):
    """Gives UTF-16 bytes out as UTF-8."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._decoder = codecs.getincrementaldecoder("utf-16")("replace")
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        while not self._ready:
            piece = self._raw.read(CHUNK_BYTES)
            self._ready = self._decoder.decode(piece, final=not piece).encode()
            if not piece:
                break
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def close(self) -> None:
        self._raw.close()
        super().close()


_temporary: list[Path] = []


def standard_input() -> Path:
    """Standard input as a file, named as messages call it, which goes away with the process."""
    path = Path(tempfile.mkdtemp(prefix="stabilitylab-")) / "standard-input"
    _temporary.append(path.parent)
    with path.open("wb") as copy:
        shutil.copyfileobj(sys.stdin.buffer, copy)
    return path


def remove_temporary() -> None:
    """Delete the copies of standard input and of compressed files."""
    while _temporary:
        copy = _temporary.pop()
        shutil.rmtree(copy) if copy.is_dir() else copy.unlink(missing_ok=True)
