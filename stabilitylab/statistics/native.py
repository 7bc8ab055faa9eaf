"""The compiled one-pass kernel (kernel.c), built once per machine by the system's C compiler.

Built at first use into the user's cache folder, under a name made of the source, the compiler and the
processor, and loaded from there ever after. Without a compiler, or with ``STABILITYLAB_NATIVE=0``, the torch
twin in ``summary.py`` runs instead: same results up to rounding, several times slower, which is said once.

The kernel's threads are torch's own OpenMP pool: its runtime is already loaded with global visibility, and
the kernel is linked without one so that it finds that and starts no second pool.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

_log = logging.getLogger("stabilitylab")
_SOURCE = Path(__file__).with_name("kernel.c")
_FLAGS = [
    *("-O3", "-march=native", "-std=c11", "-fPIC", "-fopenmp", "-fno-strict-aliasing"),
    # Sums may be reordered (that is what vector registers do); NaN and infinity keep their meaning.
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math"),
]
# Several partial sums side by side, so that one addition need not wait for the last. GCC's names.
_UNROLL = [
    *("-funroll-loops", "-fvariable-expansion-in-unroller"),
    *("--param", "max-variable-expansions-in-unroller=4"),
]

_SLOWER = "torch operations measure on this processor, and measured steps take longer, up to twice as long"

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Job(ctypes.Structure):
    """One tensor for the kernel; the fields are explained in kernel.c."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("fresh", ctypes.c_int32),
        ("row", ctypes.c_void_p),
        ("channel_max", ctypes.c_void_p),
        ("channel_square", ctypes.c_void_p),
        ("tail", ctypes.c_void_p),
        ("tail_from", ctypes.c_float),
        ("unused", ctypes.c_float),
    )


class Update(ctypes.Structure):
    """One parameter's update for the kernel; the fields are explained in kernel.c."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("before", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("sampled", ctypes.c_int64),
        ("gradient", ctypes.c_void_p),
        ("first", ctypes.c_void_p),
        ("second", ctypes.c_void_p),
        ("correction", ctypes.c_float),
        ("epsilon2", ctypes.c_float),
        ("out", ctypes.c_void_p),
    )


class Attention(ctypes.Structure):
    """One attention call for the kernel; the fields are explained in kernel.c."""

    _fields_ = (
        ("query", ctypes.c_void_p),
        ("key", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "key_heads", "queries", "keys", "width")),
        ("query_stride", ctypes.c_int64 * 3),
        ("key_stride", ctypes.c_int64 * 3),
        ("lse", ctypes.c_void_p),
        ("lse_stride", ctypes.c_int64 * 3),
        ("mask", ctypes.c_void_p),
        ("mask_stride", ctypes.c_int64 * 4),
        *((name, ctypes.c_int32) for name in ("mask_is_bool", "dtype", "causal", "rows")),
        ("scale", ctypes.c_float),
        ("masked", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("largest", "sampled", "negated_smallest", "entropy")),
    )


@functools.cache
def kernel() -> ctypes.CDLL | None:
    """The loaded kernel; None where it cannot be had."""
    if os.environ.get("STABILITYLAB_NATIVE", "1") == "0":
        _log.warning("STABILITYLAB_NATIVE=0: %s", _SLOWER)
        return None
    try:
        library = ctypes.CDLL(str(_built()))
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        for name, arguments in {
            "stabilitylab_summarise": (pointer, integer, ctypes.c_int),
            "stabilitylab_scores": (
                *(pointer, ctypes.c_int32, integer, integer, integer, integer),
                *(ctypes.c_float, pointer, pointer),
            ),
            "stabilitylab_before": (pointer, integer),
            "stabilitylab_after": (pointer, integer, ctypes.c_int),
            "stabilitylab_attention": (pointer,),
        }.items():
            function = getattr(library, name)
            function.argtypes = arguments
            function.restype = ctypes.c_int if name == "stabilitylab_attention" else None
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        _log.warning(
            "no compiled statistics kernel (%s): %s; a C compiler (cc, gcc or clang) on the path, or named by CC, "
            "is all that it takes",
            " ".join(str(error).split()),
            _SLOWER,
        )
        return None
    return library


def _built() -> Path:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise OSError("no C compiler")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=20).stdout
    key = hashlib.sha256(
        b"\0".join([_SOURCE.read_bytes(), version, " ".join(_FLAGS + _UNROLL).encode(), _processor()])
    ).hexdigest()
    folder = _cache()
    target = folder / f"kernel-{key[:24]}.so"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        built = Path(scratch) / "kernel.so"
        for flags in ([*_FLAGS, *_UNROLL], _FLAGS):
            # Compiled and linked apart: with -fopenmp the linker would bring in an OpenMP runtime of its own.
            unlinked = Path(scratch) / "kernel.o"
            compiled = subprocess.run(
                [compiler, *flags, "-c", str(_SOURCE), "-o", str(unlinked)], capture_output=True, timeout=120
            )
            if compiled.returncode == 0:
                subprocess.run(
                    [compiler, "-shared", str(unlinked), "-lm", "-o", str(built)],
                    capture_output=True,
                    check=True,
                    timeout=120,
                )
                break
        else:
            raise OSError(f"{compiler} does not compile {_SOURCE.name}")
        built.replace(target)
    return target


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
