"""The compiled one-pass kernel (kernel.c), built once per machine by the system's C compiler.

``stabilitylab.c_compiler`` builds and loads it. Without a compiler, or with ``STABILITYLAB_NATIVE=0``, the torch twin in
``summary.py`` runs instead: same results up to rounding, several times slower, with one warning.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import subprocess
from pathlib import Path

import torch

from stabilitylab.c_compiler import SWITCH, built, switched_off

_log = logging.getLogger("stabilitylab")
_SOURCE = Path(__file__).with_name("kernel.c")
_FLAGS = [
    *("-std=c11", "-fno-strict-aliasing"),
    # The compiler may reorder sums (vector registers do); NaN and infinity keep their meaning.
    *("-fno-signed-zeros", "-fassociative-math"),
]
# Several partial sums side by side, so that one addition need not wait for the last. GCC's names.
_UNROLL = [
    *("-funroll-loops", "-fvariable-expansion-in-unroller"),
    *("--param", "max-variable-expansions-in-unroller=4"),
]

_SLOWER = "torch operations measure on this processor, and measured steps take longer, up to twice as long"

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class TensorJob(ctypes.Structure):
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


class UpdateJob(ctypes.Structure):
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


class AttentionJob(ctypes.Structure):
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
    """The loaded kernel; None where it cannot be built."""
    if switched_off():
        _log.warning("%s=0: %s", SWITCH, _SLOWER)
        return None
    try:
        library = ctypes.CDLL(str(built(_SOURCE, [*_FLAGS, *_UNROLL], _FLAGS)))
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
