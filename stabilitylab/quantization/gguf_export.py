"""A planned model of the llama family as a GGUF file, which llama.cpp 0.5.0, transformers and gguf-py open: ``--format gguf``.

    scheme                          type of the tensor    block
    int8-gG, int8-row               Q8_0                  fp16 scale, 32 int8                       34 bytes for 32 weights
    int4-gG, int4-row               Q4_0                  fp16 scale, 32 codes, each minus 8        18 bytes
    mxfp4                           MXFP4                 E8M0 exponent, 32 codes of E2M1           17 bytes
    16-bit                          F16, BF16 or F32      the shortest that changes no bit

A block of 32 repeats the scale of its larger group, so the numbers are the plan's, and the file is larger than the plan's sum by
the repeated scales. Codes j and j + 16 share a byte, j low. GGUF has no exact form for zero points: Q4_1 keeps the least weight in
fp16, which a product of scale and zero point need not fit. transformers has none for NVFP4, and llama.cpp's K-quants have scales of
6 bits, which ours are not. The export refuses all of these. A scale of bf16 fits fp16 from 2^-17 on; the export refuses one that
does not.

The export lays out rows of q and k as llama.cpp rotates them (neighbours instead of halves), for the architecture ``llama`` alone.

Source: gguf 0.19 (``quants.py``, ``constants.py``), with which the tests open the file; llama.cpp, ``convert_hf_to_gguf.py``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stabilitylab.errors import InputError
from stabilitylab.formats import pack_4bit
from stabilitylab.models import TextModel
from stabilitylab.models.weight_checks import narrowest
from stabilitylab.quantization.export_forms import card, holders, no_form, refuse_layers
from stabilitylab.quantization.format_scheme import FormatLinear
from stabilitylab.quantization.gguf_tokenizer import write_tokenizer
from stabilitylab.quantization.linear import QuantizedLinear
from stabilitylab.quantization.plan import QuantizationPlan
from stabilitylab.quantization.replacement import quantizable_layers, quantized
from stabilitylab.quantization.serialization import (
    copy_companions,
    matrices_of,
    new_folder,
    unquantized_tensors,
)

NAME, FILE = "gguf", "model.gguf"
BLOCK = 32
# transformers' model type -> GGUF's architecture.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# llama.cpp's number of a file whose tensors are mostly of that type.
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32, "MXFP4": 38}
Bytes = NDArray[np.uint8]


def save_gguf(model: TextModel, plan: QuantizationPlan, out: Path) -> int:
    """Write a model quantized by a plan; returns the bytes of its file.

    Args:
        model: the original, of transformers; unchanged.
        plan: made for this model.
        out: folder to make: ``model.gguf``, configuration and tokenizer, plan and card.

    Raises:
        InputError: gguf is missing, ``out`` already exists, the plan is for another model, or the model or a scheme has no form.
    """
    config, architecture = require_gguf(model)
    import gguf

    plan.require(model.fingerprint, model.name)
    refuse_layers(model, NAME)
    with new_folder(out) as partial:
        copy_companions(model, partial)
        writer = gguf.GGUFWriter(str(partial / FILE), architecture)
        try:
            _describe(writer, model, config)
            written = _write_tensors(gguf, writer, model, plan, config, architecture)
            counts = {kind: list(written.values()).count(kind) for kind in ("Q8_0", "Q4_0", "MXFP4")}
            writer.add_file_type(_file_type(written, counts))
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            tokenizer = write_tokenizer(writer, model, partial, config)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        size = (partial / FILE).stat().st_size
        plan.write(partial / "plan.json")
        told = ", ".join(f"{count} tensors {kind}" for kind, count in counts.items() if count)
        notes = (
            f'Open it: AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file="{FILE}"{_told(config, architecture)}), '
            f"or llama.cpp with {FILE}.",
            f"{told or 'no tensor is quantized'}; the file has {size:,} bytes. {tokenizer}",
        )
        (partial / "QUANTIZATION.md").write_text(card(plan, NAME, notes), encoding="utf-8")
    return size


def _told(config: Any, architecture: str) -> str:
    """The argument that transformers 5.23 needs: by itself it reads neither llama's biases nor the width of qwen3's heads from such
    a file; for a kind that is written as another (mistral) it takes no config."""
    return ", config=AutoConfig.from_pretrained(FOLDER)" if config.model_type == architecture else ""


def _file_type(written: Mapping[str, str], quantized: Mapping[str, int]) -> int:
    """The number of the most frequent quantized type; without quantized matrices, that of the widest type among them."""
    most = max(quantized, key=lambda kind: quantized[kind])
    if quantized[most]:
        return _FILE_TYPES[most]
    plain = {kind for name, kind in written.items() if "norm" not in name and not name.endswith(".bias")}
    return _FILE_TYPES[next((kind for kind in ("F32", "BF16", "F16") if kind in plain), "F32")]


def require_gguf(model: TextModel) -> tuple[Any, str]:
    """A model's config and GGUF's name of its architecture.

    Raises:
        InputError: gguf is missing, or the model has no form.
    """
    if importlib.util.find_spec("gguf") is None:
        raise InputError("--format gguf needs the package gguf: pip install 'stabilitylab[hf]'")
    config = getattr(model.module, "config", None)
    return config, _architecture(model, config)


def _architecture(model: TextModel, config: Any) -> str:
    kind = getattr(config, "model_type", None)
    if kind not in ARCHITECTURES:
        raise InputError(
            f"{model.name} is a {kind or 'model without a config'}: GGUF is written for {', '.join(ARCHITECTURES)}; choose "
            "--format compressed-tensors, torchao or stabilitylab"
        )
    rope = _rope(config)
    windows = getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None)
    if windows or rope.get("rope_type", "default") != "default":
        raise InputError(
            f"{model.name} scales its rotary positions or attends within a window, which is not written to GGUF here: choose "
            "--format compressed-tensors, torchao or stabilitylab"
        )
    return ARCHITECTURES[kind]


def _rope(config: Any) -> Mapping[str, Any]:
    """transformers 5 keeps base and kind in one mapping, 4 apart."""
    told = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return {"rope_theta": getattr(config, "rope_theta", 10_000.0), **told}


def _head_width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _describe(writer: Any, model: TextModel, config: Any) -> None:
    writer.add_name(model.name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(_rope(config)["rope_theta"]))
    writer.add_rope_dimension_count(_head_width(config))
    writer.add_key_length(_head_width(config))
    writer.add_value_length(_head_width(config))
    writer.add_vocab_size(config.vocab_size)


def _write_tensors(
    gguf: Any, writer: Any, model: TextModel, plan: QuantizationPlan, config: Any, architecture: str
) -> dict[str, str]:
    """Every tensor under GGUF's name; returns the type of each by its name in the model."""
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    types = gguf.GGMLQuantizationType
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}

    def laid_out(name: str, rows: Any) -> Any:
        count = next((n for part, n in heads.items() if f".{part}." in name), None)
        if architecture != "llama" or count is None:
            return rows
        order = np.arange(len(rows)).reshape(count, 2, -1).swapaxes(1, 2).reshape(-1)
        return np.ascontiguousarray(rows[order])

    def add(name: str, data: Any, kind: str) -> None:
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise InputError(
                f"{name} has no name in GGUF's {architecture}: choose --format compressed-tensors, torchao or stabilitylab"
            )
        writer.add_tensor(known, laid_out(name, data), raw_dtype=types[kind])
        written[name] = kind

    written: dict[str, str] = {}
    layers, matrices = quantizable_layers(model.module), matrices_of(model, plan)
    for path, scheme in plan.schemes.items():
        # An embedding's one matrix: readers multiply with it where a file holds no output.
        twin: Any = (
            scheme.layer(matrices[path].weight, name=path)
            if path in matrices
            else quantized(path, layers[path], scheme)
        )
        kind, data = blocks_of(path, twin, scheme.name)
        add(f"{path}.weight", data, kind)
        if twin.bias is not None:
            add(f"{path}.bias", twin.bias.float().numpy(), "F32")
    for name, tensor in unquantized_tensors(model.module, plan.schemes).items():
        if tensor.dim() < 2:
            add(name, tensor.float().numpy(), "F32")
            continue
        short = narrowest(tensor)
        kind = {torch.float16: "F16", torch.bfloat16: "BF16"}.get(short.dtype, "F32")
        data = short.view(torch.int16).numpy().view(np.uint8) if kind == "BF16" else short.numpy()
        add(name, data, kind)
    return written


def blocks_of(path: str, twin: Any, scheme: str) -> tuple[str, Bytes]:
    """GGUF's type of a quantized layer's weight, and its bytes, [N, bytes of a row]. ``scheme`` is what the plan calls it.

    Raises:
        InputError: there is no type that holds these numbers.
    """
    if NAME not in holders(twin):
        raise no_form(path, scheme, NAME, twin)
    if twin.in_features % BLOCK:
        why = f"{twin.in_features} columns are not whole blocks of {BLOCK}"
        raise no_form(path, scheme, NAME, twin, why)
    if isinstance(twin, FormatLinear):
        stored = twin.stored
        assert stored.scales is not None
        exponents = stored.scales.view(torch.uint8).numpy()[..., None]
        return "MXFP4", _rows(exponents, _halves(stored.codes))
    assert isinstance(twin, QuantizedLinear)
    weight = twin.stored
    groups = twin.in_features // BLOCK
    each = max(1, weight.group // BLOCK)
    scales = weight.scales.float().repeat_interleave(each, 1)[:, :groups]
    scales = scales.expand(twin.out_features, groups)
    half = scales.half()
    if not torch.equal(half.float(), scales):
        worst = scales[half.float() != scales].abs()
        raise no_form(path, scheme, NAME, twin, f"a scale of {float(worst[0]):.2g} does not fit its fp16")
    codes = weight.codes()
    d = half.contiguous().numpy().view(np.uint8).reshape(twin.out_features, groups, 2)
    if weight.bits == 8:
        signed = (codes.to(torch.int16) - 128).to(torch.int8).numpy().view(np.uint8)
        return "Q8_0", _rows(d, signed.reshape(twin.out_features, groups, BLOCK))
    return "Q4_0", _rows(d, _halves(codes))


def _halves(codes: Tensor) -> Bytes:
    """Codes [N, K] below 16 -> [N, K / 32, 16]: of each block, number j low and j + 16 high."""
    blocks = codes.view(codes.shape[0], -1, 2, BLOCK // 2)
    pairs = torch.stack((blocks[:, :, 0], blocks[:, :, 1]), dim=-1).flatten(2)
    packed: Bytes = pack_4bit(pairs.to(torch.uint8)).numpy()
    return packed


def _rows(head: Bytes, body: Bytes) -> Bytes:
    joined = np.concatenate([head, body], axis=-1)
    return np.ascontiguousarray(joined.reshape(joined.shape[0], -1))
