"""Where in a model a site is, told from its path alone: which block, in which block, whether it is the embedding.

Paths are the model's own, so this is reading conventions: blocks are numbered (``layers.3``, ``transformer.h.3``), the token
embedding is called so (``embedding.weight``, ``model.embed_tokens.weight``, ``transformer.wte.weight``). A model that follows
none of them keeps every parameter as a row of its own, and has no embedding share to show.
"""

from __future__ import annotations

import re

_BLOCK = re.compile(r"^(?:.*\.)?(\d+)$")
_INSIDE = re.compile(r"^(.*?\.\d+)\.")
_EMBEDDING = re.compile(r"embed|wte")
_OTHER = re.compile(r"pos|wpe|norm")


def block_number(site: str) -> int | None:
    """3 for ``layers.3``, whose output is the residual stream; None for what is no block."""
    match = _BLOCK.match(site)
    return int(match[1]) if match else None


def block_of(site: str) -> str:
    """``layers.3`` for what lies in it (``layers.3.attention.query.weight``); a site in no block is its own."""
    match = _INSIDE.match(site)
    return match[1] if match else site


def is_embedding(site: str) -> bool:
    """Whether a parameter is the token embedding's."""
    return bool(_EMBEDDING.search(site)) and not _OTHER.search(site)
