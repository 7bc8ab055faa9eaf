"""A plan: the scheme of every layer, why, and the numbers behind it, as JSON.

    {"format": "stabilitylab-quantization-plan", "version": 1, "model": ..., "fingerprint": ..., "layers": {...}, ...}

The file holds everything that was measured, so you can question a decision without measuring again. A plan belongs to the model
with its fingerprint: layers of another model have other sensitivities, and SmoothQuant's factors would be wrong.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stabilitylab.command_line.whole_file import whole_file
from stabilitylab.errors import InputError
from stabilitylab.quantization.latency import KEPT
from stabilitylab.quantization.rounded_weights import RoundedWeights
from stabilitylab.quantization.schemes import LinearScheme, scheme_of

_FORMAT = "stabilitylab-quantization-plan"
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a plan may spend.

    Attributes:
        kind: "loss": nats of loss increase per token (relative output error for encoders), bytes are minimised;
            "memory": bytes as a share of the layers' 16-bit bytes, harm is minimised;
            "latency": time as a share of the unquantized layers' at ``batch`` rows, harm is minimised.
        value: how much.
        batch: rows for latencies.
    """

    kind: Literal["loss", "memory", "latency"]
    value: float
    batch: int = 1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.value) and self.value >= 0):
            raise InputError(f"a budget of {self.value} for {self.kind} must be a number of at least 0")

    def allows(self, outcome: PlanFigures, kept: PlanFigures) -> bool:
        """Whether an outcome keeps to the budget, given that of the model as it is."""
        if self.kind == "loss":
            return outcome.loss <= self.value
        if self.kind == "memory":
            return outcome.bytes <= self.value * kept.bytes
        return outcome.seconds[self.batch] <= self.value * kept.seconds[self.batch] * (1 + 1e-9)

    @property
    def text(self) -> str:
        """In words."""
        if self.kind == "loss":
            return f"loss increase of at most {self.value:g}"
        if self.kind == "memory":
            return f"{self.value:g} of the 16-bit bytes"
        return f"{self.value:g} of the unquantized layers' time at batch {self.batch}"


@dataclass(frozen=True, kw_only=True)
class PlanFigures:
    """A whole model's figures.

    Attributes:
        bytes: of all planned layers.
        seconds: batch -> of one call of every planned layer.
        loss: loss increase in nats, or relative output error.
        schemes: how many layers have which scheme.
        verified: whether the loss was measured with all layers quantized; else it is the sum of the layers' harms.
    """

    bytes: int
    seconds: Mapping[int, float]
    loss: float
    schemes: Mapping[str, int]
    verified: bool = True


@dataclass(frozen=True, kw_only=True)
class PlannedLayer:
    """One layer's decision.

    Attributes:
        scheme: its name; None leaves the layer as it is.
        reason: one line, from numbers.
        smooth: max|x| of each input channel, which SmoothQuant needs again when the plan is applied; else None.
    """

    scheme: str | None
    reason: str
    smooth: Sequence[float] | None = None


@dataclass(frozen=True, kw_only=True)
class QuantizationPlan:
    """See the head of the module.

    Attributes:
        model: name.
        fingerprint: of the model.
        criterion: "loss" or "output error".
        loss: the unchanged model's on the verification text; None for encoders.
        budget: asked for.
        tokens: of the text that sensitivities were measured on, and of the one that plans were chosen by.
        told_tokens: of the third text, on which outcomes and loss are reported; 0 in plans from before there was one.
        machine: where times were measured.
        layers: path -> decision.
        kept: path -> why a linear layer is not part of the plan.
        planned: outcome of this plan.
        singles: scheme's name -> outcome with that scheme in every layer; ``KEPT`` is the model as it is.
        notes: what the search had to correct.
        sensitivity: path -> {"shape", "range", "effects": scheme -> {"error", "harm", "loss", "bytes"}}.
        latency: "NxK" -> scheme -> batch -> seconds.
        rounded: folder of weights that were rounded for their inputs (rounded_weights.py); in the file its name beside the plan.
            None where no layer was.
        cache: keys and values of past tokens (``kv_cache.cache_plan``); None where they were not measured.
        tokenizer: mark of how text became tokens (``text_checks.tokenizer_mark``).
    """

    model: str
    fingerprint: str
    criterion: Literal["loss", "output error"]
    loss: float | None
    budget: Budget
    tokens: tuple[int, int]
    machine: str
    layers: Mapping[str, PlannedLayer]
    kept: Mapping[str, str]
    planned: PlanFigures
    singles: Mapping[str, PlanFigures]
    notes: Sequence[str]
    sensitivity: Mapping[str, Any]
    latency: Mapping[str, Any]
    told_tokens: int = 0
    rounded: str | None = None
    cache: Mapping[str, Any] | None = None
    tokenizer: str | None = None

    @property
    def schemes(self) -> dict[str, LinearScheme]:
        """path -> scheme of the layers to be quantized."""
        found = {
            path: scheme_of(layer.scheme) for path, layer in self.layers.items() if layer.scheme is not None
        }
        if self.rounded is None:
            return found
        weights = RoundedWeights(Path(self.rounded))
        return {path: weights.scheme(path, scheme) for path, scheme in found.items()}

    @property
    def best_single(self) -> tuple[str, PlanFigures] | None:
        """The single scheme of least loss that takes no more bytes than the plan and keeps the budget; None if there is none."""
        within = {
            name: outcome
            for name, outcome in self.singles.items()
            if outcome.bytes <= self.planned.bytes
            and name != KEPT
            and self.budget.allows(outcome, self.singles[KEPT])
        }
        if not within:
            return None
        within = {name: outcome for name, outcome in within.items() if outcome.verified} or within
        name = min(within, key=lambda candidate: within[candidate].loss)
        return name, within[name]

    def require(self, fingerprint: str, name: str, tokenizer: str | None = None) -> None:
        """Refuse another model, or the same with another tokenizer.

        Raises:
            InputError: the plan was made for another.
        """
        if fingerprint != self.fingerprint:
            raise InputError(
                f"the plan was made for {self.model} (fingerprint {self.fingerprint}), not for {name} ({fingerprint}): "
                f"make one with stabilitylab quantize"
            )
        if self.tokenizer is not None and tokenizer is not None and tokenizer != self.tokenizer:
            raise InputError(
                f"the plan was made for {self.model} with another tokenizer than {name} has now: its text became other tokens, so "
                "what was measured is not this model's; make the plan again"
            )

    def write(self, path: Path) -> None:
        """Write the plan as JSON, whole or not at all."""
        data = dataclasses.asdict(self)
        data["rounded"] = None if self.rounded is None else Path(self.rounded).name
        text = json.dumps({"format": _FORMAT, "version": _VERSION, **data}, indent=1)
        with whole_file(path) as file:
            file.write_text(text + "\n", encoding="utf-8")


def load_plan(path: Path) -> QuantizationPlan:
    """Read a plan.

    Raises:
        InputError: there is none, or it is not one of ours.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the plan {path}: {error.strerror}") from None
    except ValueError:
        data = None
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        raise InputError(f"{path} is not a plan: make one with stabilitylab quantize")
    if data.get("version") != _VERSION:
        raise InputError(f"{path} is a plan of version {data.get('version')}, this release reads {_VERSION}")
    fields = {field.name for field in dataclasses.fields(QuantizationPlan)}
    try:
        values = {name: value for name, value in data.items() if name in fields}
        values["budget"] = Budget(**values["budget"])
        values["tokens"] = tuple(values["tokens"])
        values["layers"] = {name: PlannedLayer(**layer) for name, layer in values["layers"].items()}
        values["planned"] = _outcome(values["planned"])
        values["singles"] = {name: _outcome(outcome) for name, outcome in values["singles"].items()}
        if values.get("rounded") is not None:
            # A name, so that no file can point out of its folder.
            values["rounded"] = str(path.parent / Path(values["rounded"]).name)
        plan = QuantizationPlan(**values)
        for layer in plan.layers.values():
            if layer.scheme is not None:
                scheme_of(layer.scheme)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is a plan with a field missing or broken ({error}): make it again"
        ) from None
    return plan


def _outcome(data: dict[str, Any]) -> PlanFigures:
    seconds = {int(batch): value for batch, value in data["seconds"].items()}
    return PlanFigures(
        bytes=data["bytes"],
        seconds=seconds,
        loss=data["loss"],
        schemes=data["schemes"],
        verified=data.get("verified", True),
    )
