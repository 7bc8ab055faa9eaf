"""Builds C source with the system's compiler at first use, and loads the result from then on.

A library lies in the user's cache folder under a name made of the source, the compiler, the flags and the processor, so a home
shared by several machines holds one for each. Callers have a twin in torch operations for machines without a compiler.

The libraries use torch's own OpenMP pool: its runtime is already loaded with global visibility, and they link with none, so that
they find it and start no second pool.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

SWITCH = "STABILITYLAB_NATIVE"
_ALWAYS = ("-O3", "-march=native", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
# The packages' folder: a file includes a header that several share by its path from here, all others from beside it.
_PACKAGES = Path(__file__).parents[1]


def switched_off() -> bool:
    """Whether the user has switched compiling off."""
    return os.environ.get(SWITCH, "1") == "0"


def built(source: Path, *flags: Sequence[str]) -> Path:
    """The shared library of a C file.

    Args:
        source: the file.
        flags: sets of compiler flags beside optimization; if the compiler refuses the first, it gets the next.

    Raises:
        OSError, subprocess.SubprocessError: the library cannot be built here.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise OSError("no C compiler")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=20).stdout
    words = " ".join([*_ALWAYS, *(word for some in flags for word in some)])
    key = hashlib.sha256(b"\0".join([*_text(source), version, words.encode(), _processor()])).hexdigest()
    folder = _cache()
    target = folder / f"{source.stem}-{key[:24]}.so"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        library = Path(scratch) / "library.so"
        for some in flags:
            # Compile and link apart: with -fopenmp the linker would add its own OpenMP runtime.
            unlinked = Path(scratch) / "unlinked.o"
            compiled = subprocess.run(
                [
                    compiler,
                    *_ALWAYS,
                    *some,
                    "-iquote",
                    str(_PACKAGES),
                    "-c",
                    str(source),
                    "-o",
                    str(unlinked),
                ],
                capture_output=True,
                timeout=120,
            )
            if compiled.returncode == 0:
                subprocess.run(
                    [compiler, "-shared", str(unlinked), "-lm", "-o", str(library)],
                    capture_output=True,
                    check=True,
                    timeout=120,
                )
                break
        else:
            raise OSError(f"{compiler} does not compile {source.name}")
        library.replace(target)
    return target


def _text(source: Path) -> list[bytes]:
    """A file's text, and that of our headers that it includes, directly or not."""
    text = source.read_bytes()
    named = re.findall(rb'^#include "([^"]+)"', text, re.MULTILINE)
    places = ((source.parent / name.decode(), _PACKAGES / name.decode()) for name in named)
    return [
        text,
        *(part for beside, shared in places for part in _text(beside if beside.exists() else shared)),
    ]


def _cache() -> Path:
    """A folder that only this user can write to, as we load what lies in it."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "stabilitylab"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError):
        return Path(tempfile.mkdtemp(prefix="stabilitylab-"))
    status = folder.stat()
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o022):
        return Path(tempfile.mkdtemp(prefix="stabilitylab-"))
    return folder


def _processor() -> bytes:
    """The processor's features, on which ``-march=native`` depends."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor().encode()
    return "\n".join(
        dict.fromkeys(line for line in lines if line.startswith(("flags", "Features", "model name")))
    ).encode()
