"""Names, in one line with the way out, the kind of a file that stabilitylab does not read. It executes nothing of the file."""

from __future__ import annotations

import zipfile
from pathlib import Path

from stabilitylab.errors import InputError

_UNKNOWN = "a binary file of a kind that is not read here"
_STARTS = (
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"%PDF", "a PDF document"),
    (b"\x7fELF", "a program"),
    (b"GGUF", "a model (GGUF)"),
    (b"ARROW1", "an Arrow file"),
    (b"\xd0\xcf\x11\xe0", "an old Excel or Word document"),
)


_CONTROLS = bytes({*range(1, 32)} - {*b"\t\n\r\b\f\x1b"})


class NoLogError(InputError):
    """A file of a known kind that is no log, and that will not become one."""


def binary_error(name: str, head: bytes) -> InputError:
    """The error for a file with these first bytes."""
    kind = binary_kind(head)
    if ":" in kind:  # the kind itself says what to do
        return NoLogError(f"{name} is {kind}")
    said = f"{name} is {kind}: export the run as CSV or JSON lines"
    return InputError(said) if kind == _UNKNOWN else NoLogError(said)


def binary_kind(head: bytes) -> str:
    """The kind of file that begins with these bytes, with its article."""
    for start, kind in _STARTS:
        if head.startswith(start):
            return kind
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        return "a pickle, which is not opened because that could run what is in it"
    if head[8:10] == b'{"' and b'"data_offsets"' in head[:4096]:
        return "a model (safetensors)"
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it, and give the log in it"
    return _UNKNOWN


def has_holes(head: bytes) -> bool:
    """Whether it is text but for NUL bytes, such as a crash of the machine leaves in a file."""
    text = head.replace(b"\0", b"")
    odd = len(text) - len(text.translate(None, _CONTROLS))
    return binary_kind(head) == _UNKNOWN and b"\n" in text and odd * 500 <= len(text)


def one_in_zip(path: Path) -> tuple[str | None, str]:
    """The one file in a zip archive, or None and the kind of the archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [info.filename for info in archive.infolist() if not info.is_dir()]
    except (zipfile.BadZipFile, OSError) as error:
        return None, f"a damaged zip archive ({error})"
    if "[Content_Types].xml" in names:
        return None, "an Excel or Word document: save the sheet as CSV"
    if any(name.endswith("data.pkl") for name in names):
        return None, "a checkpoint of PyTorch, which is not opened because that could run what is in it"
    if names and all(name.endswith(".npy") for name in names):
        return None, "an archive of NumPy arrays"
    names = [n for n in names if not n.startswith("__MACOSX/") and not Path(n).name.startswith(".")]
    if len(names) == 1:
        return names[0], ""
    return (
        None,
        f"a zip archive of {len(names)} files ({', '.join(names[:4])}): unpack it, and give the log in it",
    )
