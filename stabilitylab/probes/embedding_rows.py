"""Which tokens carry the gradient: the rows of each embedding's gradient with the largest norms.

A spike of the embedding's gradient often sits in a few rows: rare tokens, or one that the batch repeats. The probe records the
``TOP`` rows with the largest norm of each ``nn.Embedding``, largest first, index = rank in that order. Where ZeRO spreads the
gradient over ranks in flat pieces no rank has whole rows of it, and the probe records none.

Family ``gradient``, site = path of the embedding's weight:

| statistic | meaning | unit | source |
| --- | --- | --- | --- |
| top_row | number of the row, which is the token's id | token | definition |
| top_row_l2 | Euclidean norm of that row's gradient | gradient | definition |
| top_rows_share | share of the squared norm of the embedding's gradient that these rows hold together | 1 | definition |
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from stabilitylab.compat import is_dtensor
from stabilitylab.model_structure import is_embedding, named_modules
from stabilitylab.probes.base import Context, Found, Readings
from stabilitylab.statistics.buffer import Slots
from stabilitylab.statistics.gathering import Gathered
from stabilitylab.telemetry import Key

TOP = 8
STATISTICS = ("top_row", "top_row_l2", "top_rows_share")


class EmbeddingRowProbe:
    """The heaviest rows of embeddings' gradients; see the module's docstring."""

    name = "embedding_rows"

    def __init__(self) -> None:
        self._slots: dict[str, Slots] = {}
        self._keys: dict[tuple[tuple[str, int], ...], tuple[Key, ...]] = {}
        self._scale: float | Slots = 1.0

    def attach(self, context: Context) -> None:
        """Find the embeddings among the parameters, by name, as a half-precision model's masters are other tensors."""
        self._context = context
        self.name_parameters()

    def name_parameters(self) -> None:
        """Find them again, as parameters have joined, perhaps with modules."""
        names = (
            f"{path}.weight" if path else "weight"
            for path, module in named_modules(self._context.model)
            if is_embedding(module)
        )
        self._weights = {name for name in names if self._context.wanted(name)}

    def arm(self, measured: bool) -> None:
        """Nothing to prepare."""

    def gradients(
        self, gradients: Mapping[str, Tensor], norms: Mapping[str, Tensor | float], scale: float | Slots
    ) -> None:
        """Find the heaviest rows of each embedding's gradient."""
        self._scale = scale
        buffer = self._context.buffer
        for name in self._weights & gradients.keys():
            gradient = gradients[name].detach()
            if gradient.dim() != 2 or not gradient.is_floating_point() or not gradient.numel():
                continue
            rows = None
            if gradient.is_sparse:
                gradient = gradient.coalesce()
                rows, gradient = gradient.indices()[0], gradient.values()
            norm = torch.linalg.vector_norm(
                gradient, dim=1, dtype=torch.promote_types(gradient.dtype, torch.float32)
            )
            if is_dtensor(norm):
                norm = norm.full_tensor()  # one number per row, gathered over the ranks that hold the rows
            top = norm.topk(min(TOP, len(norm)))
            slots = self._slots.get(name)
            if slots is None or slots.device != norm.device:
                slots = self._slots[name] = buffer.reserve("lists", 2 * TOP + 2, norm.device)
            slots.stamp = -1
            number = top.indices if rows is None else rows[top.indices]
            # Missing rows have norm -1.
            missing = TOP - len(number)
            number, height = (
                pad(number.double(), (0, missing)),
                pad(top.values.double(), (0, missing), value=-1.0),
            )
            whole = norm.double().square().sum()[None]
            all_rows = torch.full_like(whole, gradients[name].shape[0])
            buffer.put(slots, torch.cat([all_rows, whole, number, height]))

    def collect(self) -> Found | None:
        """Every embedding that had a gradient."""
        stamp = self._context.buffer.stamp
        seen = [(name, slots) for name, slots in self._slots.items() if slots.stamp == stamp]
        if not seen:
            return None
        return Found(
            sites=tuple(name for name, _ in seen), slots=[(slots,) for _, slots in seen], scale=self._scale
        )

    def finish(self, gathered: Gathered) -> Readings:
        """The table's statistics."""
        values, counts = [], []
        for i, (numbers,) in enumerate(gathered.numbers):
            assert numbers is not None
            # [shards, height, square of the norm, numbers of rows, norms of rows]
            shards = numbers.reshape(gathered.shards(i), -1)
            count = shards.shape[1] // 2 - 1
            before = np.cumsum(shards[:, :1], axis=0) - shards[:, :1]
            rows, norms = (before + shards[:, 2 : 2 + count]).ravel(), shards[:, 2 + count :].ravel()
            # NaN first, then the largest; places of missing rows last.
            order = np.where(norms < 0, np.inf, np.where(np.isnan(norms), -np.inf, -norms))
            top = np.argsort(order, kind="stable")[: min(count, int(np.sum(~(norms < 0))))]
            with np.errstate(divide="ignore", invalid="ignore"):
                share = np.sum(norms[top] ** 2) / np.sum(shards[:, 1])
            values += [rows[top], norms[top] / gathered.scale, np.array([share])]
            counts.append(len(top))
        shape = tuple(zip(gathered.sites, counts, strict=True))
        if shape not in self._keys:
            keys: list[Key] = []
            for name, count in shape:
                keys += [Key("gradient", name, "top_row", i) for i in range(count)]
                keys += [Key("gradient", name, "top_row_l2", i) for i in range(count)]
                keys.append(Key("gradient", name, "top_rows_share"))
            self._keys = {shape: tuple(keys)}
        return Readings(self._keys[shape], np.concatenate(values))

    def detach(self) -> None:
        """Nothing was attached."""
