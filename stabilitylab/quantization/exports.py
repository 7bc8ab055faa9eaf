"""Formats that other programs open: ``--apply OUT --format ...``. ``export_forms.py`` says what each can hold exactly.

    compressed-tensors    vLLM, transformers                    compressed_tensors.py
    gguf                  llama.cpp, transformers, gguf-py      gguf_export.py
    torchao               torchao, transformers                 torchao_export.py

``register_export`` makes others known.
"""

from __future__ import annotations

from pathlib import Path

from stabilitylab.errors import InputError
from stabilitylab.models import TextModel
from stabilitylab.quantization.export_forms import OWN, REGISTERED, formats, refuse_layers
from stabilitylab.quantization.plan import QuantizationPlan


def require_format(format: str) -> None:
    """Raises InputError where there is no such format."""
    if format not in formats():
        raise InputError(f"there is no --format {format}: give one of {', '.join(formats())}")


def require_form(format: str, model: TextModel) -> None:
    """Refuse before the plan is made what can be refused then.

    Raises:
        InputError: the package that writes the format is missing, or it has no form for a model of this kind.
    """
    if format == "gguf":
        from stabilitylab.quantization.gguf_export import require_gguf

        require_gguf(model)
    if format == "torchao":
        from stabilitylab.quantization.torchao_export import require_torchao

        require_torchao()
    if format != OWN and format not in REGISTERED:
        refuse_layers(model, format)


def save_as(format: str, model: TextModel, plan: QuantizationPlan, out: Path) -> int:
    """Write a model quantized by a plan in one of the formats; returns the bytes of its weights.

    Raises:
        InputError: ``out`` already exists, the plan is for another model, a scheme has no exact form there, or the package that
            writes it is missing.
    """
    from stabilitylab.quantization.compressed_tensors import save_compressed_tensors
    from stabilitylab.quantization.gguf_export import save_gguf
    from stabilitylab.quantization.serialization import save_quantized
    from stabilitylab.quantization.torchao_export import save_torchao

    if format in REGISTERED:
        return REGISTERED[format].save(model, plan, out)
    writers = {
        OWN: save_quantized,
        "compressed-tensors": save_compressed_tensors,
        "gguf": save_gguf,
        "torchao": save_torchao,
    }
    return writers[format](model, plan, out)
