"""A site's place in a model: its stack and block, whether it is the embedding, and when a step reaches it.

A monitored run records it in ``model_structure.json``: the structure from ``stabilitylab.model_structure``, and ``order``, the
sites in the order of the first measured forward pass. For sites not in it, and for runs without one, ``Places`` reads paths by
convention: the outermost number in a path is the block's (``layers.3``, ``transformer.h.3``), and the token embedding has a usual
name (``embedding.weight``, ``model.embed_tokens.weight``, ``transformer.wte.weight``, ``shared.weight``). In a model that follows
none of these conventions every parameter remains its own row, and there is no embedding share.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_INSIDE = re.compile(r"^((?:.*?\.)??\d+)(?:\.|$)")
_EMBEDDING = re.compile(r"(?:embed\w*|wte|^shared)\.(?:.*\.)?weight$|embed\w*$", re.IGNORECASE)
_OTHER = re.compile(r"pos|wpe|norm|type|segment|relative|rotary", re.IGNORECASE)


class Places:
    """The places of a run's sites in its model.

    Args:
        structure: ``model_structure.describe`` with ``order``, as the run holds it; empty where unknown.
    """

    def __init__(self, structure: Mapping[str, Any] | None = None) -> None:
        known = structure or {}
        self._stacks: dict[str, list[str]] = {str(s): list(b) for s, b in known.get("stacks", {}).items()}
        self._number = {block: i for of in self._stacks.values() for i, block in enumerate(of)}
        self._stack = {block: stack for stack, of in self._stacks.items() for block in of}
        self._embeddings = frozenset(known.get("embeddings", ()))
        self._is_told = bool(known)
        self.order: list[str] = list(known.get("order", ()))

    def block_of(self, site: str) -> str:
        """``layers.3`` for itself and any site in it (``layers.3.attention.query.weight``); a site outside all blocks is returned
        unchanged."""
        module = site.removesuffix(":input")
        if self._number:
            parts = module.split(".")
            for end in range(len(parts), 0, -1):
                path, above = ".".join(parts[:end]), ".".join(parts[: end - 1])
                # A rank that holds only some blocks of a stack records only those.
                if path in self._number or (above in self._stacks and parts[end - 1].isdigit()):
                    return path
            return site
        match = _INSIDE.match(module)
        return match[1] if match else site

    def block_number(self, site: str) -> int | None:
        """3 for ``layers.3``, whose output is the residual stream; None for a site that is no block."""
        if site in self._number:
            return self._number[site]
        if site.endswith(":input") or self.block_of(site) != site:
            return None
        last = site.rpartition(".")[2]
        return int(last) if last.isdigit() else None

    def stack_of(self, site: str) -> str:
        """A site's stack (``encoder.block``); empty outside all stacks, and where a model has only one."""
        block = self.block_of(site)
        stack = self._stack.get(block, block.rpartition(".")[0] if block != site else "")
        return stack if len(self._stacks) > 1 else ""

    def is_embedding(self, site: str) -> bool:
        """Whether a parameter is the token embedding's."""
        if self._is_told:
            return site in self._embeddings
        return bool(_EMBEDDING.search(site)) and not _OTHER.search(site)
