"""The data types of telemetry: a metric's name, the samples of a flush, and events.

A metric is ``family/site/statistic``. The *family* says what is measured (gradient, attention, activation, update, precision,
train); the *site* says where, as the model's own module or parameter path, or ``-`` for the run as a whole; the *statistic* says
how it is summarised:

    gradient/layers.3.attention.query_key_value.weight/l2
    attention/layers.3.attention/score_max                  one value per head; the index is the head
    activation/layers.3.feed_forward.down/kurtosis
    precision/-/loss_scale
    train/-/loss

A ``Key`` is a metric and an index (-1 for a scalar). Samples are tidy columns (step, key, value); an ``Event`` is one line of
``events.jsonl``. ``stabilitylab.runs.folder`` handles the folder that holds them.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stabilitylab.errors import InputError

RUN_SITE = "-"
SCALAR = -1

# A run's own signals, which the detector judges and readers of logs look for.
LOSS = "train/-/loss"
GRADIENT_NORM = "train/-/gradient_norm"
LEARNING_RATE = "train/-/learning_rate"
BATCH_SIZE = "train/-/batch_size"
DATA_PHASE = "train/-/data_phase"
SKIPPED = "train/-/skipped"
LOSS_SCALES = ("precision/-/loss_scale", "train/-/loss_scale")

# Kinds of event around which the monitor watches a run closely, and which it tells people at once.
ALARMS = frozenset({"spike", "divergence", "non-finite", "loss-scale-collapse", "dead", "frozen"})
# Kinds about one site or the optimizer, whatever the loss does: recorded closely and told, never acted on.
DEPARTURES = frozenset({"site-departure", "parameter-changed", "moments-changed", "optimizer-changed"})


@dataclass(frozen=True, slots=True, order=True)
class Key:
    """The name of one number: ``family/site/statistic`` and, for vectors, the index in it (-1 for a scalar)."""

    family: str
    site: str
    statistic: str
    index: int = SCALAR

    @property
    def metric(self) -> str:
        """``family/site/statistic``, without the index."""
        return f"{self.family}/{self.site}/{self.statistic}"

    @classmethod
    def parse(cls, metric: str, index: int = SCALAR) -> Key:
        """Split ``family/site/statistic``. Sites may hold slashes; family and statistic may not.

        The site is empty where the model itself is the site: a module's path within itself.
        """
        family, _, rest = metric.partition("/")
        site, slash, statistic = rest.rpartition("/")
        if not (family and slash and statistic):
            raise InputError(f"metric {metric!r} is not of the form family/site/statistic")
        return cls(family, site, statistic, index)


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """The numbers of one flush, as tidy columns of equal length: ``value[i]`` was seen for ``keys[key[i]]`` at ``step[i]``.

    ``keys`` stays the same tuple object from flush to flush while the set of metrics is unchanged, so a sink can cache by its
    identity. Values are float64 and may be NaN or infinite, as seen.
    """

    keys: tuple[Key, ...]
    step: NDArray[np.int64]
    key: NDArray[np.int32]
    value: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.value)

    def __iter__(self) -> Iterator[tuple[int, Key, float]]:
        """The rows one by one, for tests and small sinks; large ones read the columns."""
        for step, key, value in zip(self.step.tolist(), self.key.tolist(), self.value.tolist(), strict=True):
            yield step, self.keys[key], value

    @classmethod
    def of(cls, rows: Iterable[tuple[int, Key, float]]) -> Samples:
        """Build from rows ``(step, key, value)``."""
        rows = list(rows)
        keys = tuple(dict.fromkeys(key for _, key, _ in rows))
        number = {key: i for i, key in enumerate(keys)}
        return cls(
            keys,
            np.array([step for step, _, _ in rows], dtype=np.int64),
            np.array([number[key] for _, key, _ in rows], dtype=np.int32),
            np.array([value for _, _, value in rows], dtype=np.float64),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened at a step: a spike, a response, a checkpoint, a rewind.

    Kinds that the project writes: ``run-start``, ``run-end``, ``interrupted``, ``checkpoint``, ``rewind``, the detector's
    ``hard-batch``, ``spike``, ``divergence``, ``non-finite``, ``loss-scale-collapse``, ``dead``, ``frozen``, their ``diagnosis``,
    the responder's ``response`` and the result of it or of a replay (``outcome``), ``recovered`` (the run passed over a damaged
    checkpoint), ``parameters-joined`` (an optimizer got more of them), ``DEPARTURES`` (a site far out of its baseline; weights,
    moments or settings that no update moved), ``gradients-changed`` (a loop clips by hand, so gradients are recorded after it),
    ``empty-steps`` (an optimizer steps without gradients), ``attribution`` (what forks proved), ``at-risk`` (the rate's margin is
    used up; only where asked for), and ``checkpoint-lost`` and ``telemetry-lost`` (one could not be written; training went on).
    """

    step: int
    kind: str
    data: Mapping[str, Any] = field(default_factory=dict)
    time: float = field(default_factory=time.time)

    @property
    def is_alarm(self) -> bool:
        """Whether it tells that an alarm begins, or turns into another kind."""
        return self.kind in ALARMS and self.data.get("phase") != "end"

    def to_json(self) -> str:
        """One line of strict JSON. Non-finite numbers become the strings "nan", "inf", "-inf"."""
        body = {"step": self.step, "kind": self.kind, "time": self.time, "data": _plain(self.data)}
        return json.dumps(body, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Event:
        body = json.loads(line)
        return cls(step=body["step"], kind=body["kind"], time=body["time"], data=body["data"])


def _plain(value: Any) -> Any:
    """Numbers, strings, lists and dictionaries that strict JSON can hold."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(v) for v in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, Path):
        return str(value)
    return value
