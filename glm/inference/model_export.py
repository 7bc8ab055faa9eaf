"""``glm export`` writes what a model's user needs and no more: its configuration, its tokenizer, its weights as safetensors.

    config.json          of the run
    tokenizer.model      of its data
    model.safetensors    the weights under the model's own names; in its header, which data they were trained on

In fp32 the weights are those of the checkpoint, bit for bit; in half precision each is rounded once, except the buffers that the
model keeps beside them (a router's bias, singular vectors). A weight beyond fp16's range is an error, not an infinity.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from glm.errors import InputError
from glm.inference.loading import CONFIG, TOKENIZER, WEIGHTS, find_files, open_model, trained_on
from glm.precision.policy import DTYPES, Precision


def export_model(source: Path, out: Path, precision: Precision = "fp32") -> int:
    """Write a run, a checkpoint or another export to ``out``; returns the number of weights.

    Raises:
        InputError: the model does not open, ``out`` exists already, or a weight does not fit the format.
    """
    if out.exists():
        raise InputError(f"{out} exists already: give another --out, or remove it")
    model, _, _ = open_model(source)
    remembered = dict(model.named_buffers())
    tensors = {}
    for name, tensor in model.state_dict().items():
        dtype = tensor.dtype if name in remembered else DTYPES[precision]
        tensors[name] = tensor.detach().to(dtype).contiguous()
        if not tensors[name].isfinite().all():
            raise InputError(
                f"{name} has weights of up to {float(tensor.abs().max()):,.0f}, beyond fp16's range: export as bf16 or fp32"
            )
    # The export is written beside its place and renamed into it: a kill leaves no half export.
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        files = find_files(source)
        shutil.copyfile(files.config, partial / CONFIG)
        shutil.copyfile(files.tokenizer, partial / TOKENIZER)
        save_file(tensors, partial / WEIGHTS, metadata={"data": trained_on(source) or ""})
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return sum(map(torch.Tensor.numel, tensors.values()))
