"""C source built by the system's compiler at first use, and loaded from there ever after.

What is built lies in the user's cache folder under a name made of the source, the compiler, the flags and the processor, so a home
that several machines share holds one for each. Who calls has a twin in torch operations for where there is no compiler.

The threads of what is built are torch's own OpenMP pool: its runtime is already loaded with global visibility, and nothing is
linked with one, so that it is found and no second pool is started.
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
# Where the packages lie: a header that several share is included by its path from there, all others from beside the file.
_PACKAGES = Path(__file__).parents[1]


def switched_off() -> bool:
    """Whether the user wants nothing compiled."""
    return os.environ.get(SWITCH, "1") == "0"


def built(source: Path, *flags: Sequence[str]) -> Path:
    """The shared library of a C file.

    Args:
        source: the file.
        flags: what the compiler is given beside optimization; where it does not take the first of them, the next are tried.

    Raises:
        OSError, subprocess.SubprocessError: it cannot be built here.
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
            # Compiled and linked apart: with -fopenmp the linker would bring in an OpenMP runtime of its own.
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
    """A file's, and that of the headers of ours that it includes, and they."""
    text = source.read_bytes()
    named = re.findall(rb'^#include "([^"]+)"', text, re.MULTILINE)
    places = ((source.parent / name.decode(), _PACKAGES / name.decode()) for name in named)
    return [
        text,
        *(part for beside, shared in places for part in _text(beside if beside.exists() else shared)),
    ]


def _cache() -> Path:
    """A folder of this user's that nobody else can write to: what lies in it will be loaded."""
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
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor().encode()
    return "\n".join(
        dict.fromkeys(line for line in lines if line.startswith(("flags", "Features", "model name")))
    ).encode()
