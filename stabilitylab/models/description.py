"""What files say of their model before a weight is read, and how transformers then builds it.

The config says which class builds it: its architectures where it names some, else the class for its model type. No code of the
folder's own runs, nothing is fetched, and what transformers cannot read is reported as the files' fault.
"""

from __future__ import annotations

import contextlib
import io
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

from stabilitylab.errors import InputError
from stabilitylab.models import gguf_config, gguf_file, half_storage
from stabilitylab.models.fused_experts import split_experts

# What transformers raises over files that it cannot read; anything else is a defect.
UNREADABLE = (
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
    """Make a model, as transformers builds it, ready for reading windows, in place."""
    # Windows that are read at once have no use for keys and values of past tokens.
    for config in (module.config, module.config.get_text_config()):
        config.use_cache = False
    split_experts(module)


@dataclass(frozen=True, kw_only=True)
class Described:
    """What files say of their model before a weight is read.

    Attributes:
        path: as it was given.
        folder, where: how transformers finds it.
        config: transformers' config of the model.
        predicts: whether it has a language-model head.
        loader: the class that builds it.
    """

    path: Path
    folder: str
    where: Mapping[str, Any]
    config: Any
    predicts: bool
    loader: Any

    def read(self, what: str, loader: Any, **options: Any) -> Any:
        """Read a part of the model with its loader. Raises InputError with what is wrong with the files."""
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
        """The model without its parameters, its buffers computed for a format."""
        with half_storage.without_parameters():
            return self.loader.from_config(self.config, dtype=dtype)

    def held(self, narrow: Any) -> Any:
        """Turns a model read in 16 bits into one that computes in fp32 and holds its weights as they are; None where that fails."""
        module = self.built(torch.float32).eval()
        if not half_storage.transplant(narrow, module):
            return None
        prepare(module)
        half_storage.hold(module)
        return module if half_storage.computes_wide(module) else None

    def tokenizer(self) -> Any:
        import transformers

        tokenizer = self.read("tokenizer", transformers.AutoTokenizer)
        # Where the files have no tokenizer, transformers 5.0 makes one that knows its special tokens only.
        if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
            raise InputError(
                f"{self.path}: transformers cannot read its tokenizer (it knows no word of text): add the tokenizer's files"
            )
        return tokenizer


def describe(path: Path, plain: Path | None = None) -> Described:
    """Read the configuration of what ``recognises`` found.

    Args:
        path: as it was given, for messages.
        plain: where its plain copy is, if elsewhere.

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
    """Drops what a config says of quantization: what is read is floats by now, and transformers would go by the config."""
    for part in (config, getattr(config, "text_config", None)):
        if part is not None and hasattr(part, "quantization_config"):
            del part.quantization_config


def location(path: Path) -> tuple[str, dict[str, Any]]:
    """The folder, and the name of the GGUF file in it where the model is one."""
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
    except UNREADABLE as error:
        raise InputError(f"{path}: transformers cannot read its {what} ({first_line(error)})") from None


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line."""
    said = str(error)
    if isinstance(error, KeyError) and error.args:
        # A name that is not in a table, or a sentence.
        said = str(error.args[0])
        said = (
            said
            if " " in said
            else f"{said!r} is missing or unknown: fix the config, or install a newer transformers"
        )
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    first = " ".join(lines[: 1 + lines[0].endswith(":")]) if lines else type(error).__name__
    return first[:300]


def _predicts(config: Any, transformers: Any) -> bool:
    """Whether to open a language-model head: the architectures say so, or there is no other way for this model type."""
    named = getattr(config, "architectures", None) or ()
    kind = type(config)
    if any(name.endswith("ForConditionalGeneration") for name in named):
        # In a model of vision and language, the language part reads text; its towers stay unreached.
        return kind in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if named:
        return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in named)
    return (
        kind in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        and kind not in transformers.MODEL_FOR_MASKED_LM_MAPPING
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences the libraries' progress bars, notes and warnings: what is wrong becomes an InputError."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
