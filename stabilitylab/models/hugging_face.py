"""Models of transformers: a folder with ``config.json``, weights and tokenizer, or a GGUF file.

Nothing from the folder is executed: code that it brings along is not trusted, safetensors are read as numbers, and pickled
weights only where torch's weights-only loading takes them. Nothing is fetched. Decoders are opened with their language-model
head, everything else as the bare encoder, whose output is the last hidden states.

Limits: encoder-decoder models need a second text and are refused. A GGUF file's weights are dequantized, so they lie on their
file's grid: fair for studying activations, biased for judging another quantization of the weights.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import pickle
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from stabilitylab.errors import InputError
from stabilitylab.models.text import TokenWindows
from stabilitylab.models.text_model import TextModel

# What transformers raises over files that it cannot read; anything else is a defect.
_UNREADABLE = (
    AttributeError,
    ImportError,
    KeyError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    SafetensorError,
    pickle.UnpicklingError,
)
# A tokenizer without a limit of its own says 1e30.
_NO_LIMIT = 10**9


def recognises(path: Path) -> bool:
    """Whether a path is for transformers to read: a GGUF file, a folder with one, or a folder whose config has a model type."""
    if path.is_file():
        return path.suffix == ".gguf"
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return bool(list(path.glob("*.gguf")))
    return isinstance(config, dict) and ("model_type" in config or "architectures" in config)


def open_folder(path: Path, dtype: torch.dtype) -> TextModel:
    """Open what ``recognises`` found.

    Raises:
        InputError: transformers is missing, or cannot read the files.
    """
    described = describe(path)
    with quiet():
        module, notes = described.read(
            "weights",
            described.loader,
            config=described.config,
            dtype=dtype,
            weights_only=True,
            output_loading_info=True,
        )
        tokenizer = described.tokenizer()
    _check_complete(path, module, notes)
    # Keys and values of past tokens are of no use to windows that are read at once.
    module.config.use_cache = False
    return TextModel.of(
        module,
        path=path,
        predicts=described.predicts,
        longest=longest(module, tokenizer),
        cut=windows(tokenizer, described.predicts),
    )


@dataclass(frozen=True, kw_only=True)
class Described:
    """What files say of their model before a weight is read.

    Attributes:
        path: as it was given.
        folder, where: what transformers is told of it.
        config: of the model, as transformers has it.
        predicts: it has a language-model head.
        loader: the class that builds it.
    """

    path: Path
    folder: str
    where: Mapping[str, Any]
    config: Any
    predicts: bool
    loader: Any

    def read(self, what: str, loader: Any, **options: Any) -> Any:
        """A part of it, by what reads it. Raises InputError with what is wrong with the files."""
        return _read(self.path, what, loader, self.folder, **options, **self.where)

    def tokenizer(self) -> Any:
        import transformers

        return self.read("tokenizer", transformers.AutoTokenizer)


def describe(path: Path) -> Described:
    """Read the configuration of what ``recognises`` found.

    Raises:
        InputError: transformers is missing or cannot read it, or it is an encoder-decoder model.
    """
    folder, where = location(path)
    try:
        with quiet():
            import transformers
    except ImportError:
        raise InputError(f"{path} needs transformers to be read: pip install 'stabilitylab[hf]'") from None
    with quiet():
        config = _read(path, "config", transformers.AutoConfig, folder, **where)
        if getattr(config, "is_encoder_decoder", False):
            raise InputError(
                f"{path} is an encoder-decoder model, which needs two texts: give an encoder or a decoder"
            )
        predicts = _predicts(config, transformers)
        loader = transformers.AutoModelForCausalLM if predicts else transformers.AutoModel
    return Described(path=path, folder=folder, where=where, config=config, predicts=predicts, loader=loader)


def location(path: Path) -> tuple[str, dict[str, Any]]:
    """The folder, and the name of the GGUF file in it where it is one."""
    if path.is_file():
        return str(path.resolve().parent), {"gguf_file": path.name}
    files = sorted(path.glob("*.gguf"))
    if not files or (path / "config.json").is_file():
        return str(path), {}
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:4])
        raise InputError(f"{path} holds {len(files)} GGUF files ({names}): give one of them")
    return str(path), {"gguf_file": files[0].name}


def _read(path: Path, what: str, loader: Any, folder: str, **options: Any) -> Any:
    try:
        return loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    except pickle.UnpicklingError:
        raise InputError(
            f"{path}: its pickled weights hold more than numbers, so they are not loaded; save them as safetensors"
        ) from None
    except _UNREADABLE as error:
        raise InputError(f"{path}: transformers cannot read its {what} ({_first_line(error)})") from None


def _first_line(error: BaseException) -> str:
    said = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def _predicts(config: Any, transformers: Any) -> bool:
    """Whether to open a language-model head: the architectures say so, or there is no other way for this model type."""
    named = getattr(config, "architectures", None) or ()
    if named:
        return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in named)
    kind = type(config)
    return (
        kind in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        and kind not in transformers.MODEL_FOR_MASKED_LM_MAPPING
    )


def _check_complete(path: Path, module: Any, notes: dict[str, Any]) -> None:
    """Weights that the files lack would be random numbers. A pooler may be missing: it is taken off, no output needs it."""
    missing = sorted(notes["missing_keys"])
    if missing and all(name.startswith("pooler.") for name in missing):
        module.pooler = None
        missing = []
    if missing:
        raise InputError(
            f"{path} lacks {len(missing)} weights, among them {missing[0]}: give the whole checkpoint"
        )


def longest(module: Any, tokenizer: Any) -> int | None:
    """The most tokens that the position embedding and the tokenizer allow."""
    limits = [limit for limit in (tokenizer.model_max_length,) if limit < _NO_LIMIT]
    positions = getattr(module.config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        offset = 0
        for name, layer in module.named_modules():
            # RoBERTa and its kin count positions from the padding's number + 1.
            if name.endswith("position_embeddings") and isinstance(layer, nn.Embedding):
                offset = 0 if layer.padding_idx is None else layer.padding_idx + 1
        limits.append(positions - offset)
    return min(limits, default=None)


def windows(tokenizer: Any, predicts: bool) -> TokenWindows:
    """How this tokenizer cuts text, and what it puts around it."""

    def encode(text: str) -> list[int]:
        # verbose=False: texts longer than the model takes are what we cut.
        tokens: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return tokens

    bare = encode("a")
    framed: list[int] = tokenizer("a")["input_ids"]
    start = next((i for i in range(len(framed)) if framed[i : i + len(bare)] == bare), 0)
    # A decoder's window is cut out of a text: what ends a text does not belong behind it.
    after = () if predicts else tuple(framed[start + len(bare) :])
    return TokenWindows(encode=encode, before=tuple(framed[:start]), after=after, predicts=predicts)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' progress bars, notes and warnings: what is wrong becomes an InputError."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
