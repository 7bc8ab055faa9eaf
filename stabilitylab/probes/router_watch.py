"""How evenly a mixture of experts uses its experts, in any model whose routers return the experts that they chose, as HuggingFace's
do.

    with RouterWatch(model) as watch:
        model(**batch)
    monitor.step(step, **watch.readings())

A router is a module with a matrix ``weight`` of one row per expert, whose output has a tensor of whole numbers [..., chosen]: the
experts of each token. The experts themselves may be fused into one parameter or stored apart. Readings are
``experts/SITE/STATISTIC``, summed over all calls while entered:

    load_max        largest load over an even one           load_entropy   of the loads, over that of even ones
    dead            share of experts that nothing chose     router_l2      norm of the router's weight

(Load as in Switch Transformers, 2101.03961, section 2.2.) The watch does not count dropped tokens: such models drop none, and a
trainer that drops some reports them itself. Only ``readings`` waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stabilitylab.compat import in_backward
from stabilitylab.forward_watch import ForwardHook, ForwardWatch


def loads(chosen: Tensor, experts: int) -> Tensor:
    """The number of choices of each expert, [experts]. (``bincount`` waits for the device, to learn the largest number.)"""
    flat = chosen.flatten()
    return torch.zeros(experts, dtype=torch.int64, device=flat.device).scatter_add_(
        0, flat, torch.ones_like(flat)
    )


class RouterWatch(ForwardWatch):
    """Counts while entered; keeps its counts.

    Args:
        model: has the routers.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._loads: dict[str, Tensor] = {}
        self._norms: dict[str, Tensor] = {}

    def _hooks(self) -> Iterator[tuple[nn.Module, ForwardHook]]:
        for path, module in self._model.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.dim() == 2:
                yield module, partial(self._count, path)

    def _count(self, path: str, module: nn.Module, given: tuple[Any, ...], out: Any) -> None:
        if in_backward():  # recomputation: these choices are already counted
            return
        parts = out if isinstance(out, (tuple, list)) else (out,)
        chosen = [part for part in parts if isinstance(part, Tensor) and part.dtype == torch.int64]
        if not chosen:
            return
        weight = module.weight
        assert isinstance(weight, Tensor)
        load_E = loads(chosen[0].detach(), weight.shape[0])
        self._loads[path] = self._loads[path] + load_E if path in self._loads else load_E
        self._norms[path] = torch.linalg.vector_norm(weight.detach().float())

    def readings(self) -> dict[str, float]:
        """Telemetry name -> reading; empty where no router was called."""
        found: dict[str, float] = {}
        for path, load_E in self._loads.items():
            share_E = load_E.double() / load_E.sum().clamp_min(1)
            entropy = torch.special.entr(share_E).sum() / math.log(max(2, len(share_E)))
            values = {
                "load_max": share_E.amax() * len(share_E),
                "load_entropy": entropy,
                "dead": (load_E == 0).double().mean(),
                "router_l2": self._norms[path],
            }
            found |= {f"experts/{path}/{name}": float(value) for name, value in values.items()}
        return found
