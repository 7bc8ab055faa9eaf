"""What low-bit formats would cost the operands of every linear layer, followed over training.

Operands are a layer's input, its weight and the gradient of its output: the three that a product in a format takes. The probe
samples ``ROWS`` rows of each, from the middles of equal stretches (so not the first token, whose state is often massive; a scale
of the whole tensor takes it in anyway), and the largest magnitude of the whole tensor, which determines a tensor's scale. It takes
the first micro-batch of a step. It rounds copies only, and does not change training.

Family ``format``, site = module path with ``:input``, ``:weight`` or ``:gradient``:

| statistic | meaning | unit | source |
| --- | --- | --- | --- |
| int8-tensor_error | sqrt(sum (x^ - x)^2 / sum x^2), x^ in int8 with one scale a tensor | 1 | formats/what_if.py |
| int8-tensor_underflow | share of elements that are not 0 and round to 0 | 1 | formats/what_if.py |
| int8-tensor_overflow | share of elements beyond the format's largest number, or not finite | 1 | formats/what_if.py |
| int8-row_error | the same for int8 with one scale a token, or an output channel of a weight | 1 | formats/what_if.py |
| int8-row_underflow | likewise | 1 | formats/what_if.py |
| int8-row_overflow | likewise | 1 | formats/what_if.py |
| fp8-e4m3-tensor_error | the same for FP8 E4M3 with one scale a tensor | 1 | arXiv:2209.05433 |
| fp8-e4m3-tensor_underflow | likewise | 1 | arXiv:2209.05433 |
| fp8-e4m3-tensor_overflow | likewise | 1 | arXiv:2209.05433 |
| mxfp4_error | the same for E2M1 in groups of 32 with scales that are powers of two | 1 | OCP Microscaling 1.0 |
| mxfp4_underflow | likewise | 1 | OCP Microscaling 1.0 |
| mxfp4_overflow | likewise; the format cuts off up to a quarter of a group's largest magnitude | 1 | OCP Microscaling 1.0 |
| nvfp4_error | the same for E2M1 in groups of 16 with E4M3 scales and one scale a tensor | 1 | arXiv:2509.25149 |
| nvfp4_underflow | likewise | 1 | arXiv:2509.25149 |
| nvfp4_overflow | likewise | 1 | arXiv:2509.25149 |

You can ask for other formats: ``FormatProbe(("fp8-e5m2-tensor", "int4-tile32"))``. The probe is not among ``all_probes()``. It
measures gradients as a format would have to hold them, with the loss scale in them. ``stabilitylab forecast`` reads this family.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stabilitylab.compat import DisableTorchFunction
from stabilitylab.errors import InputError
from stabilitylab.formats import what_if_format, what_if_sums
from stabilitylab.model_structure import is_linear, named_modules
from stabilitylab.probes import activation_gradients, activations
from stabilitylab.probes.base import Found, KeyTable, Readings
from stabilitylab.probes.hooking import Function, HookingProbe
from stabilitylab.probes.sites import counts, tensor_in
from stabilitylab.statistics.buffer import Slots
from stabilitylab.statistics.gathering import Gathered
from stabilitylab.statistics.summary import measurable

FORMATS = ("int8-tensor", "int8-row", "fp8-e4m3-tensor", "mxfp4", "nvfp4")
ROWS = 8
_SHARED = 2  # numbers of a sample that all formats share: its size, and its sum of squares
_EACH = 3  # numbers per format: what_if_sums
_OPERANDS = (":input", ":weight", ":gradient")


class FormatProbe(HookingProbe):
    """Errors of formats; see the module's docstring.

    Args:
        formats: names of ``what_if_format``; no blocks of several rows (a sample of rows has none).
        rows: number of rows of each operand.

    Raises:
        InputError: there is no such format, its blocks span several rows, or ``rows`` is less than 1.
    """

    name = "formats"

    def __init__(self, formats: Sequence[str] = FORMATS, *, rows: int = ROWS) -> None:
        super().__init__()
        if not formats or rows < 1:
            raise InputError(
                f"the probe of formats takes a format and a row at least, got {formats!r}, {rows}"
            )
        self._formats = {name: what_if_format(name) for name in formats}
        for name, kind in self._formats.items():
            if kind.block[0] not in (None, 1):
                raise InputError(
                    f"blocks of {name} span {kind.block[0]} rows, and rows are sampled one by one: choose a format with a scale a "
                    "tensor, a row, or a part of a row"
                )
        self._rows = rows
        statistics = [f"{name}_{what}" for name in formats for what in ("error", "underflow", "overflow")]
        self._keys = KeyTable("format", statistics)
        self._layers: dict[str, nn.Module] = {}
        self._slots: dict[str, Slots] = {}
        # For each operand of this step: its rows, and its largest magnitude.
        self._taken: dict[str, tuple[Tensor, Tensor]] = {}

    def _find(self) -> None:
        context = self._context
        for path, module in named_modules(context.model):
            if is_linear(module) and any(context.wanted(f"{path}{end}") for end in ("", *_OPERANDS)):
                self._layers[path] = module

    def _begin(self, measured: bool) -> None:
        self._taken.clear()

    def _hook(self) -> None:
        for path, module in self._layers.items():
            forward, backward = self._taker(path, module, ":input"), self._taker(path, None, ":gradient")
            leave = activations.operators(self._state(self._guarded(forward)), None)
            eager = self._guarded(self._look(forward, self._guarded(backward)))
            self._after_forward(module, self._traceable(eager, leave), with_kwargs=True)
            if self._context.compiled:
                twin = activation_gradients.twin(self._state(self._guarded(backward)))
                self._after_forward(module, self._traceable(lambda *_: None, twin))

    def _look(self, forward: Callable[[Tensor], None], backward: Function) -> Function:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not self._armed:
                return
            with DisableTorchFunction():
                x, y = tensor_in(args) if args else tensor_in(kwargs), tensor_in(output)
                if x is not None and counts(module):
                    forward(x)
                # Under reentrant checkpointing gradients go only through the recomputed output.
                if y is not None and y.requires_grad and not y.is_leaf:
                    y.register_hook(backward)  # type: ignore[no-untyped-call]

        return hook

    def _taker(self, path: str, module: nn.Module | None, operand: str) -> Callable[[Tensor], None]:
        """A function that takes a layer's operand, and with ``module`` its weight."""

        @torch.no_grad()
        def take(x: Tensor) -> None:
            if not self._armed or f"{path}{operand}" in self._taken:
                return
            self._take(f"{path}{operand}", x)
            weight = _matrix(module, x.shape[-1]) if module is not None else None
            if weight is not None:
                self._take(f"{path}:weight", weight)

        return take

    def _take(self, site: str, x: Tensor) -> None:
        path = site.rpartition(":")[0]
        if not (self._context.wanted(path) or self._context.wanted(site)):
            return
        x = x.detach()
        # Subclasses (a shard of a weight, a weight stored as codes) have no rows to sample.
        if type(x) is not Tensor or not measurable(x) or not x.is_floating_point() or x.dim() < 2:
            return
        matrix = x.flatten(0, -2)
        stride = max(1, len(matrix) // self._rows)
        sample = matrix[stride // 2 :: stride][: self._rows].float().clone()
        # One pass without a copy: |x| and norms take fifteen times as long on a CPU.
        lowest, highest = torch.aminmax(matrix)
        largest = torch.maximum(-lowest, highest).float()
        own = sample.nan_to_num(0.0, 0.0, 0.0).abs().amax()
        self._taken[site] = sample, torch.where(largest.isfinite(), largest, own)

    @torch.no_grad()
    def collect(self) -> Found | None:
        """Round all samples of one shape at once."""
        if not self._taken:
            return None
        alike: dict[tuple[torch.Size, torch.device], list[str]] = {}
        for site, (sample, _) in self._taken.items():
            alike.setdefault((sample.shape, sample.device), []).append(site)
        for sites in alike.values():
            x_SRK = torch.stack([self._taken[site][0] for site in sites])
            largest_S = torch.stack([self._taken[site][1] for site in sites])
            finite = x_SRK.nan_to_num(0.0, 0.0, 0.0)
            squares_S = torch.linalg.vector_norm(finite, dim=(1, 2), dtype=torch.float64).square()
            count_S = torch.full_like(squares_S, x_SRK[0].numel())
            sums = [what_if_sums(x_SRK, kind, largest_S) for kind in self._formats.values()]
            for site, numbers in zip(
                sites, torch.cat([count_S[:, None], squares_S[:, None], *sums], dim=1), strict=True
            ):
                slots = self._slots.get(site)
                if slots is None or slots.device != numbers.device:
                    slots = self._context.buffer.reserve("sums", len(numbers), numbers.device)
                    self._slots[site] = slots
                self._context.buffer.put(slots, numbers)
        found = tuple(self._taken)
        self._taken.clear()
        return Found(sites=found, slots=[(self._slots[site],) for site in found])

    def finish(self, gathered: Gathered) -> Readings:
        """The table's statistics."""
        rows = np.asarray(gathered.rows(), dtype=np.float64)
        count, squares = rows[:, :1], rows[:, 1:_SHARED]
        sums = rows[:, _SHARED:].reshape(len(rows), -1, _EACH)
        with np.errstate(divide="ignore", invalid="ignore"):
            error = np.where(squares > 0, np.sqrt(sums[..., 0] / squares), 0.0)
            values = np.stack([error, sums[..., 1] / count, sums[..., 2] / count], axis=-1)
        return Readings(self._keys.keys(gathered.sites), values.ravel())

    def detach(self) -> None:
        """Remove the hooks, and their samples."""
        super().detach()
        self._taken.clear()


def _matrix(module: nn.Module, width: int) -> Tensor | None:
    """The weight as [out, in], with in = ``width``; None where it is no such matrix."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return None
    weight = (
        weight.detach() if isinstance(module, nn.Linear) or weight.shape[0] != width else weight.detach().T
    )
    return weight if weight.shape[1] == width else None
