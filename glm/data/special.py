"""GLM's special tokens, and the numbers they have in every tokenizer made here.

[PAD] fills rows;  [EOS] ends a document;  [MASK] stands for a short span, [gMASK] for everything that follows;
<sop> starts, <eop> ends what is generated.
"""

from __future__ import annotations

from dataclasses import dataclass

PAD, EOS, UNKNOWN, MASK, GMASK, SOP, EOP = "[PAD]", "[EOS]", "[UNK]", "[MASK]", "[gMASK]", "<sop>", "<eop>"


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialTokens:
    """Token numbers. The defaults are those of ``glm tokenizer``."""

    pad: int = 0
    eos: int = 1
    unknown: int = 2
    mask: int = 3
    gmask: int = 4
    sop: int = 5
    eop: int = 6
