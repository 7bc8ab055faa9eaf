"""What a fork goes without: one thing, at some steps.

| kind | what is withheld | sites |
| --- | --- | --- |
| updates | the updates of these parameters: weights, moments and decay stand still | parameters |
| other updates | the updates of all others | parameters |
| rows of updates | the updates of some rows of a table | one parameter, rows |
| batch | one batch: the next one takes its place | rows: its index |
| data | the batches from an index on: earlier ones take their place | rows: the index |
| batch rows | some rows of one batch | rows: the index, then the rows |
| outside weights | what changed weights between two updates | parameters; of one, rows |
| outside moments | what changed the optimizer's state between two updates | parameters |
| settings | what changed the optimizer's settings: rate, betas, decay | |
| rate | half of the learning rate | |
| norm | what of the gradient's norm exceeds 1 (Pascanu et al., 1211.5063) | |
| tensor norms | what of each tensor's exceeds 1.05 times its usual one (AdaGC, 2502.11034) | parameters |
| stale moments | what of an update exceeds Adam's own scale: / max(1, RMS_t) (StableAdamW, 2304.13013) | |
| past of moments | the second moments' past: they start afresh | |
| past of momentum | the first moments' past: they start afresh | |
| embedding gradient | nine tenths of the embedding's gradient (GLM-130B, 2210.02414) | parameters |
| rounding | half precision inside these modules: they compute in fp32 | modules |
| outputs | what of a module's output exceeds twice its usual RMS | modules |
| output gradients | the same of the gradient with respect to it | modules |
| scores | what of an attention score exceeds twice its usual maximum: queries are shrunk, as by QK-clip (2507.20534) | modules |

"Usual" is the control's value in its first steps, before anything happened.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

# kind -> what a fork went without, for a table; and how a sentence begins that says what did not come, unless by "Without ...".
_WORDS: dict[str, tuple[str, str | None]] = {
    "updates": ("updates of {0.where}", None),
    "other updates": ("all updates but those of {0.where}", None),
    "rows of updates": ("updates of {0.place}", None),
    "batch": ("batch {0.rows[0]}", None),
    "data": ("the batches from {0.rows[0]} on (earlier ones instead)", None),
    "batch rows": ("{0.rows_of_batch} of batch {0.rows[0]}", None),
    "outside weights": ("changes of {0.place} between updates", None),
    "outside moments": ("changes of the optimizer's state of {0.where} between updates", None),
    "settings": ("changes of the optimizer's settings", None),
    "rate": ("half of the learning rate", "At half the learning rate"),
    "norm": ("gradient norm beyond 1 (clipping)", "With the gradient's norm clipped at 1"),
    "tensor norms": (
        "gradient norm of {0.where} beyond its usual",
        "With the gradient norm of {0.where} kept at its usual",
    ),
    "stale moments": (
        "updates beyond Adam's scale (StableAdamW)",
        "With updates bounded by Adam's own scale (StableAdamW)",
    ),
    "past of moments": ("the second moments' past (reset)", "With the second moments reset"),
    "past of momentum": ("the first moments' past (reset)", "With the first moments reset"),
    "embedding gradient": (
        "nine tenths of the embedding's gradient",
        "With a tenth of the embedding's gradient",
    ),
    "rounding": ("half precision in {0.where} (fp32)", "With {0.where} in fp32"),
    "outputs": (
        "output of {0.where} beyond twice its usual",
        "With the output of {0.where} kept at its usual size",
    ),
    "output gradients": (
        "gradient at the output of {0.where} beyond twice its usual",
        "With the gradient at the output of {0.where} kept at its usual size",
    ),
    "scores": (
        "attention scores of {0.where} beyond twice their usual (QK-clip)",
        "With the attention scores of {0.where} kept at their usual size (QK-clip)",
    ),
}
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Without:
    """One thing that a fork goes without; ``kind`` "" is the control.

    Attributes:
        kind: a word of the table.
        sites: parameters or modules.
        rows: see the table.
        first, last: steps at which it acts, [first, last); None: from the fork's first, to its end.
        label: a common name of the sites, where they have one.
    """

    kind: str = ""
    sites: tuple[str, ...] = ()
    rows: tuple[int, ...] = ()
    first: int | None = None
    last: int | None = None
    label: str = ""

    def acts_at(self, step: int) -> bool:
        """Whether it acts in that step."""
        return (
            bool(self.kind)
            and (self.first is None or step >= self.first)
            and (self.last is None or step < self.last)
        )

    @property
    def key(self) -> str:
        """A key that is the same for the same fork, whatever its label."""
        return repr((self.kind, tuple(sorted(self.sites)), self.rows, self.first, self.last))

    @property
    def where(self) -> str:
        """The sites in a few words."""
        if self.label:
            return self.label
        shown = ", ".join(self.sites[:_SHOWN])
        return shown + (f" and {len(self.sites) - _SHOWN} more" if len(self.sites) > _SHOWN else "")

    @property
    def place(self) -> str:
        """The sites, and the rows of a table."""
        if self.kind not in ("outside weights", "rows of updates") or not self.rows:
            return self.where
        return f"{self.where} {_few(self.rows)}"

    @property
    def rows_of_batch(self) -> str:
        """The rows withheld from a batch."""
        return _few(self.rows[1:])

    @property
    def words(self) -> str:
        """What the fork went without, for a table."""
        if not self.kind:
            return "nothing (control)"
        return _WORDS[self.kind][0].format(self) + self._when()

    @property
    def opening(self) -> str:
        """The beginning of a sentence that says what did not come."""
        opening = _WORDS[self.kind][1] if self.kind else None
        return f"Without {self.words}" if opening is None else opening.format(self) + self._when()

    def _when(self) -> str:
        if self.first is None:
            return "" if self.last is None else f" before step {self.last}"
        if self.last is None:
            return f" from step {self.first} on"
        return (
            f" at step {self.first}"
            if self.last == self.first + 1
            else f" at steps {self.first} to {self.last - 1}"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Without:
        """Restore what ``to_json`` gave."""
        return cls(**{**data, "sites": tuple(data["sites"]), "rows": tuple(data["rows"])})


def _few(rows: tuple[int, ...]) -> str:
    return f"row{'s' * (len(rows) > 1)} " + ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
