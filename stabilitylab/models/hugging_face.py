"""Models of transformers: a folder with ``config.json``, weights and tokenizer, or a GGUF file.

Nothing from the folder is executed: code that it brings along is not trusted, safetensors are read as numbers, and pickled
weights only where torch's weights-only loading takes them. Nothing is fetched. Decoders are opened with their language-model
head, everything else as the bare encoder, whose output is the last hidden states.

Nothing is read wrongly in silence. Codes with scales beside them become numbers first (``dequantized.py``) or are refused; a
weight that the loader did not understand inside a block is an error; what lies outside the opened model (heads, towers, layers
that predict further tokens) is counted in a note. Fused experts are taken apart into linear layers (``fused_experts.py``).

Limits: encoder-decoder models need a second text and are refused. A GGUF file's weights are dequantized, so they lie on their
file's grid: fair for studying activations, biased for judging another quantization of the weights.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import pickle
import struct
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from stabilitylab.errors import InputError
from stabilitylab.models import gguf_config, gguf_file, held
from stabilitylab.models.dequantized import plain_folder
from stabilitylab.models.fused_experts import split_experts
from stabilitylab.models.left_aside import left_aside, other_frequencies, own_code
from stabilitylab.models.room import require_room, surely_fits
from stabilitylab.models.text import TokenWindows
from stabilitylab.models.text_model import TextModel
from stabilitylab.models.weight_files import FLOATS, StoredTensor, pickled_tensors, require_weights

# What transformers raises over files that it cannot read; anything else is a defect.
_UNREADABLE = (
    AttributeError,
    EOFError,
    ImportError,
    IndexError,
    KeyError,
    OSError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
    SafetensorError,
    pickle.UnpicklingError,
    struct.error,
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


def open_folder(path: Path, dtype: torch.dtype, *, hold: bool = False) -> TextModel:
    """Open what ``recognises`` found.

    Args:
        path: it.
        dtype: format of weights and activations.
        hold: keep weights in the file's 16 bits while the model computes in fp32 (``held.py``), where that can be done.

    Raises:
        InputError: transformers is missing, or cannot read the files.
    """
    folder = path if path.is_dir() and (path / "config.json").is_file() else None
    if folder and (folder / "adapter_config.json").is_file():
        raise InputError(
            f"{path} holds an adapter (adapter_config.json), which is not applied here: merge it first (peft's merge_and_unload), "
            "or take the adapter's files away to read the model without it"
        )
    plain_or_given: contextlib.AbstractContextManager[
        tuple[Path, Mapping[str, StoredTensor], tuple[str, ...]]
    ] = plain_folder(folder) if folder else contextlib.nullcontext((path, {}, ()))
    with plain_or_given as (plain, stored, said), gguf_file.opened_once(dtype):
        described = describe(path, plain)
        # A copy in a temporary folder is gone before the model is: its pages cannot be kept.
        narrow = held.format_of(stored) if hold and dtype is torch.float32 and plain == path else None
        if folder and not stored:
            require_weights(folder)
            stored = pickled_tensors(folder)
        _check_room(path, described, narrow or dtype)
        tokenizer = None
        if described.where:
            # While nothing else is there: what a file says of its words takes as much as a small model.
            with quiet():
                tokenizer = described.tokenizer()
            gguf_file.forget_words(Path(described.folder) / described.where["gguf_file"])
        with quiet():
            try:
                module, info = described.weights(narrow or dtype)
            except InputError:
                if (found := _mismatched(described, stored)) is None:
                    raise
                raise InputError(
                    f"{path}: {found}: they do not belong together; give the whole, intact checkpoint"
                ) from None
            if narrow is not None:
                module = described.held(module) or described.weights(dtype)[0]
            tokenizer = tokenizer or described.tokenizer()
        _check_complete(path, module, info)
        _check_floats(path, module, stored)
        if described.where:
            gguf_config.mend_module(module, Path(described.folder) / described.where["gguf_file"])
        notes = (
            *said,
            *left_aside(path, module, info["unexpected_keys"], stored),
            *other_frequencies(module, stored),
            *own_code(module),
        )
    prepare(module)
    _check_reads_text(path, module, described.predicts)
    return TextModel.of(
        module,
        path=path,
        predicts=described.predicts,
        longest=longest(module, tokenizer),
        cut=windows(tokenizer, described.predicts, _words(module), path),
        notes=notes,
    )


def _check_reads_text(path: Path, module: Any, predicts: bool) -> None:
    """Encoders of pictures or sound, and those that need them beside a text, are refused."""
    if predicts:
        return
    try:
        with quiet(), torch.no_grad():
            module(input_ids=torch.tensor([[0, 0]]))
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"{path} is a {module.config.model_type}, which does not read text alone ({_first_line(error)}): give an encoder or a "
            "decoder of text"
        ) from None


def _check_room(path: Path, described: Described, dtype: torch.dtype) -> None:
    files = (
        [path] if path.is_file() else [*path.glob("*.safetensors"), *path.glob("*.gguf"), *path.glob("*.bin")]
    )
    if surely_fits(sum(file.stat().st_size for file in files), dtype):
        return
    with quiet(), torch.device("meta"):
        built = described.loader.from_config(described.config)
    require_room(path, sum(parameter.numel() for parameter in built.parameters()), dtype)


def _unpacked(where: Mapping[str, Any]) -> dict[str, Any]:
    """Asks for plain weights of a GGUF file: from 5.23 on transformers leaves them in blocks where it has kernels for them."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": config(dequantize=True)} if where and config is not None else {}


def kept_wide(module: Any, dtype: torch.dtype) -> frozenset[str]:
    """Parameters and buffers that transformers leaves in fp32 when it opens a model in 16 bits: the class names their parts.

    Source: ``PreTrainedModel._get_dtype_plan``, transformers 5.
    """
    parts = set(getattr(module, "_keep_in_fp32_modules_strict", None) or ()) if dtype.itemsize == 2 else set()
    if dtype is torch.float16:
        parts |= set(getattr(module, "_keep_in_fp32_modules", None) or ())
    names = (name for found in (module.named_parameters(), module.named_buffers()) for name, _ in found)
    return frozenset(name for name in names if any(f".{part}." in f".{name}." for part in parts))


def prepare(module: Any) -> None:
    """Make a model as transformers builds it ready for reading windows, in place."""
    # Keys and values of past tokens are of no use to windows that are read at once.
    for config in (module.config, module.config.get_text_config()):
        config.use_cache = False
    split_experts(module)


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

    def weights(self, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
        """The model in a format, and what transformers says of its loading."""
        module, info = self.read(
            "weights",
            self.loader,
            config=self.config,
            dtype=dtype,
            weights_only=True,
            output_loading_info=True,
            **_unpacked(self.where),
        )
        return module, info

    def built(self, dtype: torch.dtype) -> Any:
        """The model without its parameters, its buffers as they are computed in a format."""
        with held.without_parameters():
            return self.loader.from_config(self.config, dtype=dtype)

    def held(self, narrow: Any) -> Any:
        """A model that was read in 16 bits as one that computes in fp32 and holds its weights as they are; None where it cannot."""
        module = self.built(torch.float32).eval()
        if not held.transplant(narrow, module):
            return None
        prepare(module)
        held.hold(module)
        return module if held.computes_wide(module) else None

    def tokenizer(self) -> Any:
        import transformers

        tokenizer = self.read("tokenizer", transformers.AutoTokenizer)
        # Of files that are not there, transformers 5.0 makes one that knows its special tokens only.
        if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
            raise InputError(
                f"{self.path}: transformers cannot read its tokenizer (it knows no word of text): add the tokenizer's files"
            )
        return tokenizer


def describe(path: Path, plain: Path | None = None) -> Described:
    """Read the configuration of what ``recognises`` found.

    Args:
        path: as it was given, for what is said.
        plain: where its plain copy is, if that is elsewhere.

    Raises:
        InputError: transformers is missing or cannot read it, or it is an encoder-decoder model.
    """
    folder, where = location(plain or path)
    try:
        with quiet():
            import transformers
    except ImportError:
        raise InputError(f"{path} needs transformers to be read: pip install 'stabilitylab[hf]'") from None
    if int(transformers.__version__.split(".")[0]) < 5:
        # 4.57 ties a head that the files hold apart, without a word, and reads no rotary scaling from GGUF.
        raise InputError(
            f"{path} needs transformers 5 to be read, and {transformers.__version__} is here: pip install 'transformers>=5.0'"
        )
    with quiet():
        config = _read(path, "config", transformers.AutoConfig, folder, **where)
        if where:
            gguf_config.mend_config(config, Path(folder) / where["gguf_file"])
        else:
            _read_as_floats(config)
        named = getattr(config, "architectures", None) or ()
        # T5's encoder on its own, say: AutoModel would look for the decoder too.
        encodes = any(name.endswith("EncoderModel") for name in named) and (
            type(config) in transformers.AutoModelForTextEncoding._model_mapping
        )
        if getattr(config, "is_encoder_decoder", False) and not encodes:
            raise InputError(
                f"{path} is an encoder-decoder model, which needs two texts: give an encoder or a decoder"
            )
        predicts = _predicts(config, transformers)
        sees = predicts and type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        loader = (
            transformers.AutoModelForImageTextToText
            if sees
            else transformers.AutoModelForCausalLM
            if predicts
            else transformers.AutoModelForTextEncoding
            if encodes
            else transformers.AutoModel
        )
    return Described(path=path, folder=folder, where=where, config=config, predicts=predicts, loader=loader)


def _read_as_floats(config: Any) -> None:
    """What is read is floats by now, whatever a config says: transformers would go by it."""
    for part in (config, getattr(config, "text_config", None)):
        if part is not None and hasattr(part, "quantization_config"):
            del part.quantization_config


def location(path: Path) -> tuple[str, dict[str, Any]]:
    """The folder, and the name of the GGUF file in it where it is one."""
    if path.is_file():
        return str(path.resolve().parent), {"gguf_file": gguf_file.whole_file(path).name}
    file = None if (path / "config.json").is_file() else gguf_file.only_file(path)
    return str(path), {} if file is None else {"gguf_file": file.name}


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
    said = str(error)
    if isinstance(error, KeyError) and error.args:
        # A name that is not in a table, or a sentence.
        said = str(error.args[0])
        said = (
            said
            if " " in said
            else f"{said!r} is missing or unknown: mend the config, or install a newer transformers"
        )
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    first = " ".join(lines[: 1 + lines[0].endswith(":")]) if lines else type(error).__name__
    return first[:300]


def _mismatched(described: Described, stored: Mapping[str, StoredTensor]) -> str | None:
    """Which weight of the files has another shape than the config says, in words; None where none is found by its name."""
    try:
        with quiet(), torch.device("meta"):
            built = described.loader.from_config(described.config)
    except _UNREADABLE:
        return None
    for name, parameter in built.named_parameters():
        one = stored.get(name)
        if one is not None and one.shape != tuple(parameter.shape):
            return f"{name} is {one.shape} in the files and {tuple(parameter.shape)} by its config"
    return None


def _predicts(config: Any, transformers: Any) -> bool:
    """Whether to open a language-model head: the architectures say so, or there is no other way for this model type."""
    named = getattr(config, "architectures", None) or ()
    kind = type(config)
    if any(name.endswith("ForConditionalGeneration") for name in named):
        # Of a model of vision and language, the language part reads text; its towers stay unreached.
        return kind in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if named:
        return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in named)
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


def _check_floats(path: Path, module: Any, stored: Mapping[str, StoredTensor]) -> None:
    """Whole or logical numbers that a loader casts to floats are codes, whose meaning is lost."""
    prefix = getattr(module, "base_model_prefix", "")
    for name, parameter in module.named_parameters():
        one = (
            stored.get(name) or stored.get(f"{prefix}.{name}") or stored.get(name.removeprefix(f"{prefix}."))
        )
        if one is not None and one.dtype not in FLOATS and parameter.is_floating_point():
            raise InputError(
                f"{path} stores {one.name} as {one.dtype}, which is no number format of weights without a scale: give the "
                "checkpoint in bf16, or dequantize it with the library that wrote it"
            )


def longest(module: Any, tokenizer: Any) -> int | None:
    """The most tokens that the position embedding and the tokenizer allow."""
    limits = [limit for limit in (tokenizer.model_max_length,) if limit < _NO_LIMIT]
    positions = getattr(module.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        offset = 0
        for name, layer in module.named_modules():
            # RoBERTa and its kin count positions from the padding's number + 1.
            if name.endswith("position_embeddings") and isinstance(layer, nn.Embedding):
                offset = 0 if layer.padding_idx is None else layer.padding_idx + 1
        limits.append(positions - offset)
    return min(limits, default=None)


def _words(module: Any) -> int | None:
    """Rows of the token embedding; None where there is none by that name."""
    try:
        return len(module.get_input_embeddings().weight)
    except (AttributeError, NotImplementedError, TypeError):
        return None


def windows(
    tokenizer: Any, predicts: bool, words: int | None = None, path: Path | None = None
) -> TokenWindows:
    """How this tokenizer cuts text, and what it puts around it.

    Args:
        tokenizer: of the model.
        predicts: the model is a decoder.
        words: that the model has; a text with others is refused.
        path: of the model, for what is said.
    """

    def encode(text: str) -> list[int]:
        # verbose=False: texts longer than the model takes are what we cut.
        tokens: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if words is not None and (beyond := max(tokens, default=0)) >= words:
            raise InputError(
                f"{path}: its tokenizer gives token {beyond}, and the model has {words:,} words: they do not belong together; put "
                "the model's own tokenizer there"
            )
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
