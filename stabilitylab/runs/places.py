"""Where in a model a site is: in which stack and block, whether it is the embedding, and when a step comes to it.

A run that was monitored says so itself, in ``model_structure.json``: what ``stabilitylab.model_structure`` told of the model, and
``order``, the sites in the order in which the first measured forward pass came to them. Of sites that are not in it, and of runs
without one, paths are read by conventions: the outermost number in a path is the block's (``layers.3``, ``transformer.h.3``), the
token embedding is called so (``embedding.weight``, ``model.embed_tokens.weight``, ``transformer.wte.weight``, ``shared.weight``). A
model that follows none of them keeps every parameter as a row of its own, and has no embedding share to show.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_INSIDE = re.compile(r"^((?:.*?\.)??\d+)(?:\.|$)")
_EMBEDDING = re.compile(r"(?:embed\w*|wte|^shared)\.(?:.*\.)?weight$|embed\w*$", re.IGNORECASE)
_OTHER = re.compile(r"pos|wpe|norm|type|segment|relative|rotary", re.IGNORECASE)


class Places:
    """What a run's sites are in its model.

    Args:
        structure: ``model_structure.describe`` with ``order``, as it stands in the run; empty where it is not known.
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
        """``layers.3`` for what lies in it (``layers.3.attention.query.weight``) and itself; a site in no block is its own."""
        module = site.removesuffix(":input")
        if self._number:
            parts = module.split(".")
            for end in range(len(parts), 0, -1):
                path, above = ".".join(parts[:end]), ".".join(parts[: end - 1])
                # A rank that holds some blocks of a stack tells only of those.
                if path in self._number or (above in self._stacks and parts[end - 1].isdigit()):
                    return path
            return site
        match = _INSIDE.match(module)
        return match[1] if match else site

    def block_number(self, site: str) -> int | None:
        """3 for ``layers.3``, whose output is the residual stream; None for what is no block."""
        if site in self._number:
            return self._number[site]
        if site.endswith(":input") or self.block_of(site) != site:
            return None
        last = site.rpartition(".")[2]
        return int(last) if last.isdigit() else None

    def stack_of(self, site: str) -> str:
        """The stack in which a site lies (``encoder.block``); empty outside all, and where a model has but one."""
        block = self.block_of(site)
        stack = self._stack.get(block, block.rpartition(".")[0] if block != site else "")
        return stack if len(self._stacks) > 1 else ""

    def is_embedding(self, site: str) -> bool:
        """Whether a parameter is the token embedding's."""
        if self._is_told:
            return site in self._embeddings
        return bool(_EMBEDDING.search(site)) and not _OTHER.search(site)
