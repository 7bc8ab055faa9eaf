"""Emulate low-bit number formats on any machine, bit for bit: codes, scales, and what they cost a tensor.

``quantize`` and ``dequantize`` are pure functions of tensors; a format such as ``scaled_format("nvfp4")`` says which numbers share
a scale and how the scale is stored; ``reference`` is the float64 oracle.
"""

from stabilitylab.formats.block_scaled import (
    SCALED_FORMATS,
    Quantized,
    ScaledFormat,
    dequantize,
    fake_quantize,
    quantize,
    scaled_format,
)
from stabilitylab.formats.chunked_rounding import quantize_rows, row_parts, some_rows
from stabilitylab.formats.format_watch import FormatWatch
from stabilitylab.formats.hadamard import rotate, rotation_signs, unrotate
from stabilitylab.formats.number_format import (
    BF16,
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    FP16,
    NUMBER_FORMATS,
    NumberFormat,
    decode,
    encode,
    number_format,
    pack_4bit,
    round_to,
    unpack_4bit,
)
from stabilitylab.formats.scale_search import quantize_searched
from stabilitylab.formats.what_if import FormatError, gaussian_error, what_if, what_if_format, what_if_sums

__all__ = [
    "BF16",
    "E2M1",
    "E2M3",
    "E3M2",
    "E4M3",
    "E5M2",
    "FP16",
    "NUMBER_FORMATS",
    "SCALED_FORMATS",
    "FormatError",
    "FormatWatch",
    "NumberFormat",
    "Quantized",
    "ScaledFormat",
    "decode",
    "dequantize",
    "encode",
    "fake_quantize",
    "gaussian_error",
    "number_format",
    "pack_4bit",
    "quantize",
    "quantize_rows",
    "quantize_searched",
    "rotate",
    "rotation_signs",
    "round_to",
    "row_parts",
    "scaled_format",
    "some_rows",
    "unpack_4bit",
    "unrotate",
    "what_if",
    "what_if_format",
    "what_if_sums",
]
