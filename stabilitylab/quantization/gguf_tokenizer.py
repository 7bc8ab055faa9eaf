"""The tokenizer of a GGUF file: pieces, merges, what they mean, and how text is cut into words before merging.

llama.cpp knows pre-tokenizers by name (``tokenizer.ggml.pre``) and takes ids that a file omits from GPT-2 (11 for begin and end).
So the export writes everything that llama.cpp would guess: the name where ``tokenizer.json`` cuts as one of the table below, ids of
special tokens, whether a text begins or ends with one, the chat template. Added pieces that are not special are matched before the
text is cut; GGUF calls them user-defined. A model that came from a GGUF file keeps that file's own fields.

Source: tokenizers 0.22 (``tokenizer.json``); llama.cpp 0.5.0 (``llama-vocab.cpp``), which read these files in
``experiments/RESULTS.md``, "llama.cpp opens the exports".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stabilitylab.models import TextModel
from stabilitylab.models.description import location

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_BYTES_ALONE, _GPT2_WORDS = ("ByteLevel", False), ("ByteLevel", True)
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Steps before merging, and whether whole words are looked up first -> llama.cpp's name of them.
_CUTS: dict[tuple[tuple[tuple[Any, ...], ...], bool], str] = {
    ((_GPT2_WORDS,), False): "gpt-2",
    ((("Digits", True), _GPT2_WORDS), False): "smollm",
    ((("Split", _CONTRACTIONS + r"\p{N}" + _REST), _BYTES_ALONE), False): "qwen2",
    ((("Split", _CONTRACTIONS + r"\p{N}{1,3}" + _REST), _BYTES_ALONE), True): "llama-bpe",
}
_NONE = "No tokenizer is in the file: use tokenizer.json beside it."


def write_tokenizer(writer: Any, model: TextModel, folder: Path, config: Any) -> str:
    """Write the tokenizer, where it is one of bytes and merges or came from a GGUF file.

    Args:
        writer: gguf's.
        model: the original.
        folder: the folder with its tokenizer.json and tokenizer_config.json.
        config: the model's.

    Returns:
        A sentence for the card.
    """
    if _copied(writer, model, config):
        return "The tokenizer in the file is the one of the file it was made from."
    file = folder / "tokenizer.json"
    held = _json(file)
    inner = held.get("model") or {}
    steps = json.dumps([held.get("pre_tokenizer"), held.get("decoder")])
    if inner.get("type") != "BPE" or "ByteLevel" not in steps:
        # llama.cpp opens no file without this field.
        writer.add_tokenizer_model("no_vocab")
        return _NONE
    cut = _cut(held)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut or "default")
    ids = _write_pieces(writer, held, int(config.vocab_size))
    _write_special(writer, held, ids, folder, config)
    if cut:
        return "The tokenizer is in the file."
    return (
        "The tokenizer is in the file, but not how it cuts text into words, of which llama.cpp takes its default: where that "
        "differs, use tokenizer.json."
    )


def _copied(writer: Any, model: TextModel, config: Any) -> bool:
    """Whether the model came from a GGUF file with a tokenizer; if so, writes the fields as they stand there."""
    if model.path.is_dir() and (model.path / "config.json").is_file():
        return False
    folder, where = location(model.path)
    name = where.get("gguf_file")
    if name is None:
        return False
    import gguf

    fields = gguf.GGUFReader(str(Path(folder) / name)).fields
    pieces = fields.get("tokenizer.ggml.tokens")
    if pieces is None or len(pieces.data) != config.vocab_size:
        return False
    for key, field in fields.items():
        if not key.startswith("tokenizer."):
            continue
        kind, *inner = field.types
        writer.add_key_value(key, field.contents(), kind, *inner[:1])
    return True


def _cut(held: Mapping[str, Any]) -> str | None:
    """llama.cpp's name of how a tokenizer cuts text into words; None where the table has none."""
    told = held.get("pre_tokenizer") or {}
    steps = []
    for step in told.get("pretokenizers") or [told]:
        kind = step.get("type")
        if kind == "ByteLevel" and not step.get("add_prefix_space"):
            steps.append((kind, step.get("use_regex", True)))
        elif kind == "Digits":
            steps.append((kind, step.get("individual_digits")))
        elif kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            steps.append((kind, (step.get("pattern") or {}).get("Regex")))
        else:
            return None
    return _CUTS.get((tuple(steps), bool(held["model"].get("ignore_merges"))))


def _write_pieces(writer: Any, held: Mapping[str, Any], count: int) -> dict[str, int]:
    """As many pieces as the embedding has rows, and the merges; returns the id of each piece."""
    inner = held["model"]
    added = {
        one["content"]: (one["id"], _CONTROL if one.get("special") else _USER_DEFINED)
        for one in held.get("added_tokens", [])
    }
    known = {**{piece: (number, _NORMAL) for piece, number in inner["vocab"].items()}, **added}
    pieces, kinds = [f"[PAD{i}]" for i in range(count)], [_UNUSED] * count
    for piece, (number, kind) in known.items():
        if number < count:
            pieces[number], kinds[number] = piece, kind
    writer.add_token_list(pieces)
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in inner["merges"]])
    return {piece: number for piece, (number, _) in known.items() if number < count}


def _write_special(
    writer: Any, held: Mapping[str, Any], ids: Mapping[str, int], folder: Path, config: Any
) -> None:
    told = _json(folder / "tokenizer_config.json")
    for name in ("bos", "eos", "unk", "pad"):
        piece = told.get(f"{name}_token")
        piece = piece.get("content") if isinstance(piece, dict) else piece
        # A model may end at several tokens; the first is the one that its tokenizer would name.
        number: Any = ids.get(str(piece), getattr(config, f"{name}_token_id", None))
        number = number[0] if isinstance(number, Sequence) and number else number
        if isinstance(number, int):
            getattr(writer, f"add_{name}_token_id")(number)
    first, last = _around(held)
    writer.add_add_bos_token(first)
    writer.add_add_eos_token(last)
    template = folder / "chat_template.jinja"
    text = template.read_text(encoding="utf-8") if template.is_file() else told.get("chat_template")
    if text:
        writer.add_chat_template(text)


def _around(held: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether the tokenizer puts a token before a text, and one after it."""
    told = held.get("post_processor") or {}
    for step in told.get("processors") or [told]:
        single = step.get("single")
        if single:
            return "SpecialToken" in single[0], "SpecialToken" in single[-1]
    return False, False


def _json(file: Path) -> dict[str, Any]:
    held = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return held if isinstance(held, dict) else {}
