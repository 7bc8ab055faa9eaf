"""What a model's files hold or say and the opened model does not: refused where it would compute something else, else counted.

inside a block, or one more in a layer     refused: a bias that the model computes without, an adapter, a scale
heads, towers, further layers              a note, with their share of the files' numbers
rotary frequencies                         computed from the config; a note where the files' are others
code of its own, a class unknown           a note with the class that reads it
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from stabilitylab.errors import InputError
from stabilitylab.model_structure import stacks
from stabilitylab.models.dequantization import COMPANION, OF_ACTIVATIONS
from stabilitylab.models.weight_files import StoredTensor

# Tensors that models compute for themselves, and old files hold.
_COMPUTED = re.compile(
    r"(inv_freq|position_ids|masked_bias|rotary_emb\.(cos|sin)_cached|attn\.bias|attention\.bias)$"
)
_FREQUENCIES = "rotary_emb.inv_freq"
_APART = 0.01  # relative: old files hold frequencies in bf16


def left_aside(
    path: Path, module: Any, unexpected: Iterable[str], stored: Mapping[str, StoredTensor]
) -> tuple[str, ...]:
    """A note on what the files hold and the opened model does not.

    Raises:
        InputError: it belongs inside a block, or to a number format: then the opened model is not what the files mean.
    """
    unexpected = sorted(unexpected)
    inside = tuple(f"{block}." for stack in stacks(module) for block in stack.blocks)
    prefix = getattr(module, "base_model_prefix", "")
    layers = dict(module.named_modules())
    for name in unexpected:
        # A bare encoder is opened without the prefix that a checkpoint with heads has.
        bare = name if not prefix or hasattr(module, prefix) else name.removeprefix(f"{prefix}.")
        quantized = COMPANION.search(name) and not OF_ACTIVATIONS.search(name)
        owner, _, leaf = bare.rpartition(".")
        # A further parameter in a layer that is there: a bias, say, that the model computes without.
        beside = owner in layers and leaf not in layers[owner]._buffers and not layers[owner]._modules
        if quantized or beside or bare.startswith(inside):
            raise InputError(
                f"{path} holds {len(unexpected)} weights that transformers did not understand, among them {name}: "
                + (
                    "give the checkpoint in bf16, or dequantize it with the library that wrote it"
                    if quantized
                    else "its config and its weights do not belong together; give the whole, intact checkpoint"
                )
            )
    # transformers leaves some aside by rule and does not name them: layers that predict further tokens, towers of other senses.
    rules = [re.compile(rule) for rule in getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()]
    aside = {name for name in stored if any(rule.search(name) for rule in rules)} | (
        set(unexpected) & stored.keys()
    )
    left = sorted(name for name in aside if not _COMPUTED.search(name))
    if not left:
        return ()
    share = sum(stored[name].size for name in left) / sum(one.size for one in stored.values())
    return (
        f"{len(left)} weights of the files ({share:.1%} of their numbers), among them {left[0]}, are no part of the opened model",
    )


def other_frequencies(module: Any, stored: Mapping[str, StoredTensor]) -> tuple[str, ...]:
    """A note where the files hold rotary frequencies other than the opened model's."""
    own = [
        buffer.float()
        for name, buffer in module.named_buffers()
        if name.endswith("inv_freq") and not buffer.is_meta
    ]
    for name, one in sorted(stored.items()):
        if not name.endswith(_FREQUENCIES) or not any(one.shape == tuple(buffer.shape) for buffer in own):
            continue
        try:
            with safe_open(one.file, framework="pt") as file:
                found = file.get_tensor(name).float()
        except (OSError, SafetensorError):
            continue
        alike = (
            bool(((found - buffer).abs() <= _APART * buffer.abs()).all())
            for buffer in own
            if buffer.shape == found.shape
        )
        if not any(alike):
            return (
                f"the files hold other rotary frequencies ({name}) than its config gives, and the config's are used: see its rope "
                "parameters",
            )
    return ()


def own_code(module: Any) -> tuple[str, ...]:
    """A note where a model has code of its own, or a class that transformers lacks: neither is run."""
    import transformers

    named = getattr(module.config, "architectures", None) or ()
    kind = type(module).__name__
    unknown = [name for name in named if not hasattr(transformers, name)]
    if getattr(module.config, "auto_map", None):
        return (
            f"the code that comes with it (auto_map in its config) is not run: it is read as transformers' {kind}",
        )
    if unknown:
        return (f"its config calls it {unknown[0]}, which transformers has not: it is read as {kind}",)
    return ()
