"""``stabilitylab rotate``: an equivalent model with the rotation in its weights, as an ordinary folder of transformers.

The command writes nothing that it has not compared: in float64 the rotated model's logits are the original's within what rounding
explains, and the written folder, opened anew, gives the logits of what was to be written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from torch import Tensor

from stabilitylab.errors import InputError
from stabilitylab.models import TextModel, open_text_model
from stabilitylab.models.description import describe, quiet
from stabilitylab.models.fused_experts import SplitExperts
from stabilitylab.models.half_storage import format_of
from stabilitylab.models.weight_files import stored_tensors
from stabilitylab.quantization import folded_rotation
from stabilitylab.quantization.serialization import copy_companions, new_folder

Format = Literal["fp32", "bf16", "fp16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def rotate(
    model: Annotated[Path, tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    *,
    dtype: Format | None = None,
    seed: int = 0,
) -> int:
    """Write an equivalent model with a rotation folded into its weights, which spreads steady outlier channels.

    Args:
        model: a HuggingFace folder or a GGUF file of llama, mistral, qwen2, qwen3, mixtral, qwen3_moe or gemma.
        out: folder to make, which transformers and every command here opens as any other.
        dtype: format of its weights; by default the model's own 16-bit format, else fp32.
        seed: seed of the rotation's random signs.
    """
    if out.exists():
        raise InputError(f"{out} exists already: give another place, or remove it")
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed {seed} is not a seed: give a whole number from 0 to 4294967295")
    opened = open_text_model(model)
    chosen = _DTYPES[dtype] if dtype is not None else _stored_in(model)
    bound, apart, rounded = write_rotated(opened, out, chosen, seed)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    console = Console()
    console.print(
        f"logits in float64: {apart:.1e} of the largest apart from the original's (rounding explains {bound:.1e}); "
        f"with weights rounded to {_name(chosen)}: {rounded:.1e}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(
        f"written: {out} ({size / 1e6:.1f} MB of weights in {_name(chosen)})",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return 0


def write_rotated(
    model: TextModel, out: Path, dtype: torch.dtype, seed: int = 0
) -> tuple[float, float, float]:
    """Rotate an opened model and write it.

    Args:
        model: in fp32; it is used up: its module is rotated, in float64.
        out: folder to make.
        dtype: of its weights there.
        seed: of the random signs.

    Returns:
        The largest differences of logits, as shares of the largest logit: the bound, the rotated model's in float64, and its with
        rounded weights.

    Raises:
        InputError: ``out`` already exists, the model cannot be rotated, or the rotated one is not equivalent.
    """
    module: Any = model.module
    folded_rotation.require_rotatable(module)
    module.double()
    before = folded_rotation.exact_logits(module)
    bound = folded_rotation.rounding_bound(module)
    folded_rotation.rotate(module, seed)
    apart = _apart(folded_rotation.exact_logits(module), before)
    if not apart <= bound:
        raise InputError(
            f"{model.name}: rotated, its logits are {apart:.1e} of the largest apart and rounding explains {bound:.1e}: nothing "
            "is written; schemes with -had rotate each layer in every call"
        )
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.to(dtype))
    meant = folded_rotation.exact_logits(module)
    if not bool(torch.isfinite(meant).all()):
        raise InputError(f"{model.name} does not fit {_name(dtype)} when rotated: give --dtype bf16 or fp32")
    with new_folder(out) as partial:
        copy_companions(model, partial)
        _save(model, dtype, partial)
        module.to("meta")  # its memory is needed for the other
        reopened: Any = open_text_model(partial).module.double()
        if not (found := _apart(folded_rotation.exact_logits(reopened), meant)) <= bound:
            raise InputError(
                f"{model.name}: the written folder's logits are {found:.1e} of the largest apart from what was to be written: "
                "it is taken away again; another release of transformers may write this kind"
            )
    return bound, apart, _apart(meant, before)


def _save(model: TextModel, dtype: torch.dtype, out: Path) -> None:
    """Writes the folder as transformers itself writes a model of its class, since it knows how each kind lies on disk."""
    state = {name: tensor.to(dtype).contiguous() for name, tensor in _fused(model.module).items()}
    described = describe(model.path)
    config = described.config
    config.tie_word_embeddings = False
    if hasattr(config, "quantization_config"):  # the codes in its files became numbers
        del config.quantization_config
    with quiet():
        written = described.built(dtype)
        written.load_state_dict(state, strict=False, assign=True)
        lacking = [name for name, parameter in written.named_parameters() if parameter.is_meta]
        if lacking:
            raise InputError(f"{model.name}: {lacking[0]} has no place in the rotated model")
        written.save_pretrained(out)


def _fused(module: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters by the names that transformers has for them: experts that were taken apart are one tensor again."""
    tensors: dict[str, Tensor] = {name: parameter.detach() for name, parameter in module.named_parameters()}
    for path, experts in module.named_modules():
        if isinstance(experts, SplitExperts):
            for name in (experts.inward, "down_proj"):
                count = len(experts.down_proj)
                parts = [tensors.pop(f"{path}.{name}.{expert}.weight") for expert in range(count)]
                tensors[f"{path}.{name}"] = torch.stack(parts)
    return tensors


def _apart(found: Tensor, meant: Tensor) -> float:
    return float((found - meant).abs().max() / meant.abs().max())


def _stored_in(path: Path) -> torch.dtype:
    stored = stored_tensors(path) if path.is_dir() else {}
    return format_of(stored) or torch.float32


def _name(dtype: torch.dtype) -> str:
    return next(name for name, one in _DTYPES.items() if one is dtype)
