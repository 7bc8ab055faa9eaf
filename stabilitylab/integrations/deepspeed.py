"""The monitor on a DeepSpeed engine.

    from stabilitylab.integrations.deepspeed import watch

    monitor = watch(engine, out="runs/mine", every=10)
    ...                                  # engine.backward(loss), engine.step(), as usual
    monitor.close()

``watch`` replaces ``engine.step`` by a method that reads the gradients before an update and tells the monitor afterwards, and
``engine.backward`` by one that keeps the loss: this rank's mean over the micro-batches of a step. The step's number is the engine's
``global_steps`` before it counts up. Gradients are reduced, not clipped, with the loss scale divided out. Under ZeRO each rank
reads its optimizer's part of a gradient, of the fp32 weights and of the moments (``deepspeed_fragments``), and the monitor's one
collective adds the sums; no rank gathers tensors for it. All ranks must call ``watch``; rank 0 writes.

Limits. ZeRO-0 to -3 without pipeline or tensor parallelism, and without an optimizer swapped out to disk. Each rank samples a large
parameter's update from its own part, so the sample differs from that without ZeRO. The monitor sees no embedding rows where a rank
holds parts of them. An optimizer that keeps neither the model's parameters nor ZeRO's flat ones, such as half precision's without
ZeRO, has no statistics of updates.
"""

from __future__ import annotations

import glob
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stabilitylab.errors import InputError
from stabilitylab.integrations.deepspeed_fragments import FragmentedOptimizer, optimizer_parts, own_length
from stabilitylab.monitoring.monitor import Monitor


def watch(engine: Any, **options: Any) -> Monitor:
    """Attach a monitor to an engine from ``deepspeed.initialize``, for as long as the monitor is open.

    Args:
        engine: a ``DeepSpeedEngine``.
        options: those of ``Monitor``, without model, optimizer, parameters and sharded.

    Raises:
        InputError: ``engine`` is no DeepSpeedEngine.
    """
    if not all(hasattr(engine, name) for name in ("module", "backward", "global_steps")):
        raise InputError(
            f"engine is a {type(engine).__name__}: give the first of what deepspeed.initialize returns"
        )
    return _EngineMonitor(engine, options)


class _EngineMonitor(Monitor):
    """A monitor driven by the engine's own calls."""

    def __init__(self, engine: Any, options: dict[str, Any]) -> None:
        self._engine = engine
        self._named = dict(engine.module.named_parameters())
        # Names count as they are, not as patterns.
        scattered = [glob.escape(name) for name, p in self._named.items() if _is_partitioned(p)]
        optimizer, self._fragments = _own_optimizer(engine), None
        parts = optimizer_parts(self._named) if scattered else {}
        if parts and isinstance(inner := getattr(engine, "basic_optimizer", None), torch.optim.Optimizer):
            optimizer = self._fragments = FragmentedOptimizer(inner, parts)
            options = {"parameters": self._fragments.parts, **options}
        super().__init__(engine.module, optimizer, scattered=scattered, **options)
        self._losses: list[Tensor] = []
        self._step: Callable[..., Any] = engine.step
        self._backward: Callable[..., Any] = engine.backward
        engine.step, engine.backward = self._step_and_tell, self._keep_loss
        self.start_step(engine.global_steps)

    def close(self) -> None:
        """Restore the engine's own methods, and write the rest."""
        for name, ours in (("step", self._step_and_tell), ("backward", self._keep_loss)):
            if self._engine.__dict__.get(name) == ours:
                delattr(self._engine, name)
        super().close()

    def _keep_loss(self, loss: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._losses.append(loss.detach().mean())
        return self._backward(loss, *args, **kwargs)

    def _step_and_tell(self, *args: Any, **kwargs: Any) -> Any:
        engine, step = self._engine, self._engine.global_steps
        # Read before the step: afterwards the scheduler has set the next rate.
        scale, rate = _loss_scale(engine), engine.get_lr()[0]
        if engine.is_gradient_accumulation_boundary():
            self.gradients_ready(gradients=self._gradients(), scale=scale)
        result = self._step(*args, **kwargs)
        if self._fragments is not None:
            self._fragments.forget_gradients()
        if engine.global_steps == step:
            return result
        values: dict[str, Any] = {"learning_rate": rate}
        if self._losses:
            values["loss"] = torch.stack(self._losses).mean()
        norm = engine.get_global_grad_norm()
        # DeepSpeed gives -1 for a norm that is not finite.
        values["gradient_norm"] = norm if norm is None or norm >= 0 else float("nan")
        if engine.fp16_enabled():
            values |= {"loss_scale": scale, "skipped": not engine.was_step_applied()}
        self._losses.clear()
        self.step(step, **values)
        return result

    def _gradients(self) -> dict[str, Tensor]:
        found = {}
        for name, parameter in self._named.items():
            gradient = _fragment(parameter) if _is_partitioned(parameter) else parameter.grad
            if gradient is not None:
                found[name] = gradient
        return found


def _fragment(parameter: Any) -> Tensor | None:
    """This rank's optimizer's part of a parameter's gradient; None if it has none."""
    if hasattr(parameter, "ds_id"):
        if not parameter.requires_grad:
            return None
        part: Tensor = parameter._z3_optimizer.get_local_fp32_grad_for_param(parameter)
        return part.detach().narrow(0, 0, own_length(parameter))
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    try:
        gradient: Tensor | None = mapping.get_lp_grad_fragment(parameter._index_in_param_group)
    except (ValueError, IndexError):
        gradient = parameter.grad
    if gradient is None:
        return None
    gradient, address = gradient.detach().reshape(-1), mapping.lp_fragment_address
    if gradient.numel() == parameter.numel() != address.numel:
        gradient = gradient.narrow(0, address.start, address.numel)
    return gradient


def _is_partitioned(parameter: Any) -> bool:
    """Whether each rank's optimizer updates only a part of it: ZeRO-1 and -2, or ZeRO-3."""
    return hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id")


def _own_optimizer(engine: Any) -> Any:
    """The optimizer, if it updates the parameters themselves."""
    optimizer = getattr(engine, "basic_optimizer", None)
    if not isinstance(optimizer, torch.optim.Optimizer):
        return None
    own = {id(p) for p in engine.module.parameters()}
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    return optimizer if stepped and all(id(p) in own for p in stepped) else None


def _loss_scale(engine: Any) -> float:
    """The factor still in the gradients."""
    return float(getattr(engine.optimizer, "loss_scale", 1.0)) if engine.fp16_enabled() else 1.0
