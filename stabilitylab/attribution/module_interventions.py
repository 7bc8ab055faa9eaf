"""Interventions that keep modules from exceeding their usual outputs, gradients or scores, or from computing in half precision.

A bound scales the whole tensor, so directions stay; NaNs and infinities become 0. The control scales nothing, and a fork scales
nothing until a tensor passes its bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from stabilitylab.attribution.interventions import Act
from stabilitylab.attribution.loop import Subject

LOOSE = 2.0
_SDPA = torch.nn.functional.scaled_dot_product_attention


class BoundOutputs(Act):
    """Bounds the RMS of each module's output by twice its usual one."""

    def __init__(self, modules: Iterable[str], usual: Mapping[str, float]) -> None:
        super().__init__()
        self._bounds = {path: LOOSE * usual[path] for path in modules if path in usual}

    def install(self, subject: Subject) -> None:
        for path, bound in self._bounds.items():
            module = subject.model.get_submodule(path)
            self.handles.append(module.register_forward_hook(self._hook(subject, bound)))

    def _hook(self, subject: Subject, bound: float) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            del module, args
            return replaced(output, lambda x: bounded(x, bound)) if subject.acts else None

        return hook


class BoundOutputGradients(BoundOutputs):
    """Bounds the RMS of the gradient with respect to each module's output."""

    def _hook(self, subject: Subject, bound: float) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            del module, args
            tensor = first_tensor(output)
            if subject.acts and tensor is not None and tensor.requires_grad:
                tensor.register_hook(lambda gradient: bounded(gradient, bound))  # type: ignore[no-untyped-call]

        return hook


class FullPrecision(Act):
    """Makes modules compute in fp32, whatever the format around them: widens weights and inputs, and rounds outputs back."""

    def __init__(self, modules: Iterable[str]) -> None:
        super().__init__()
        self._paths = tuple(modules)
        self._originals: list[tuple[nn.Module, Any]] = []

    def install(self, subject: Subject) -> None:
        for path in self._paths:
            module = subject.model.get_submodule(path)
            self._originals.append((module, module.__dict__.get("forward")))
            module.forward = self._wide(module, module.forward, subject)

    def _wide(self, module: nn.Module, forward: Callable[..., Any], subject: Subject) -> Callable[..., Any]:
        itself = _Itself(module, forward)

        def call(*args: Any, **kwargs: Any) -> Any:
            if not subject.acts:
                return forward(*args, **kwargs)
            given = first_tensor((args, kwargs))
            device = "cpu" if given is None else given.device.type
            narrow: list[torch.dtype] = []
            with torch.autocast(device, enabled=False):
                wide = {
                    f"module.{name}": p.float()
                    for name, p in [*module.named_parameters(), *module.named_buffers()]
                    if p.is_floating_point()
                }
                output = functional_call(
                    itself,
                    wide,
                    _each(args, lambda x: _widened(x, narrow)),
                    _each(kwargs, lambda x: _widened(x, narrow)),
                )
            own = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
            back = narrow[0] if narrow else own
            if back == torch.float32:
                return output
            most = torch.finfo(back).max
            return _each(output, lambda x: x.clamp(-most, most).to(back) if x.dtype == torch.float32 else x)

        return call

    def remove(self) -> None:
        for module, forward in self._originals:
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.forward = forward
        self._originals.clear()
        super().remove()


class _Itself(nn.Module):
    """A module without its hooks, which have run before its forward does."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self._forward = module, forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)


class BoundScores(Act):
    """Shrinks the queries of heads whose largest score exceeds twice its usual one, down to that bound.

    Args:
        usual: the usual maximum by head of each call of attention in a forward pass, in order.
        calls: which calls; None: all.
    """

    def __init__(self, usual: Mapping[int, Tensor], calls: Iterable[int] | None = None) -> None:
        super().__init__()
        self._usual, self._calls = usual, None if calls is None else frozenset(calls)
        self._mode = AttentionCalls(self._shrink)
        self._subject: Subject | None = None

    def install(self, subject: Subject) -> None:
        self._subject = subject

    def start(self, subject: Subject) -> None:
        self._mode.count = 0

    @property
    def mode(self) -> AttentionCalls:
        return self._mode

    def _shrink(self, number: int, q: Tensor, k: Tensor, scale: float) -> Tensor:
        usual = self._usual.get(number)
        chosen = self._calls is None or number in self._calls
        if usual is None or not chosen or self._subject is None or not self._subject.acts:
            return q
        most = largest_scores(q, k, scale)
        bound = LOOSE * usual
        return q * torch.where(most > bound, bound / most, 1.0).to(q.dtype)[None, :, None, None]


class AttentionCalls(TorchFunctionMode):
    """Sees each call of ``scaled_dot_product_attention``, by its place in the step, and may replace its queries."""

    def __init__(self, seen: Callable[[int, Tensor, Tensor, float], Tensor]) -> None:
        super().__init__()
        self._seen, self.count = seen, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not _SDPA:
            return func(*args, **kwargs)
        q = args[0] if args else kwargs.pop("query")
        k = args[1] if len(args) > 1 else kwargs["key"]
        scale = kwargs.get("scale") or q.shape[-1] ** -0.5
        number, self.count = self.count, self.count + 1
        if q.dim() == 4:
            q = self._seen(number, q, k, scale)
        return func(q, *args[1:], **kwargs)


@torch.no_grad()
def largest_scores(q_BHTD: Tensor, k_BHSD: Tensor, scale: float) -> Tensor:
    """The largest magnitude of a score of each head, with masked ones: [H]."""
    if k_BHSD.shape[1] != q_BHTD.shape[1]:
        k_BHSD = k_BHSD.repeat_interleave(q_BHTD.shape[1] // k_BHSD.shape[1], dim=1)
    scores = q_BHTD.float() @ k_BHSD.float().transpose(-2, -1)
    return scores.abs().amax(dim=(0, 2, 3)) * abs(scale)


def bounded(x: Tensor, bound: float) -> Tensor:
    """``x`` with an RMS of at most ``bound``."""
    with torch.no_grad():
        clean = bool(torch.isfinite(x).all())
        rms = rms_of(x if clean else x.nan_to_num(0.0, 0.0, 0.0))
    if not clean:
        x = x.nan_to_num(0.0, 0.0, 0.0)
    return x * (bound / rms) if rms > bound else x


def rms_of(x: Tensor) -> float:
    """Root of the mean square; not finite where an element is not."""
    rms = float(x.detach().float().square().mean().sqrt())
    # The square of a float32 may exceed float32.
    return rms if math.isfinite(rms) else float(x.detach().double().square().mean().sqrt())


def first_tensor(value: Any) -> Tensor | None:
    """The first floating tensor inside sequences and mappings."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() and value.numel() else None
    parts = (
        value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    )
    return next((found for part in parts if (found := first_tensor(part)) is not None), None)


def replaced(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with its first floating tensor changed."""
    if isinstance(value, Tensor):
        return change(value) if value.is_floating_point() and value.numel() else value
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        for i, part in enumerate(value):
            if first_tensor(part) is not None:
                return type(value)([*value[:i], replaced(part, change), *value[i + 1 :]])
    return value


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _each(part, change) for key, part in value.items()}
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(_each(part, change) for part in value)
    return value


def _widened(x: Tensor, narrow: list[torch.dtype]) -> Tensor:
    if x.dtype in (torch.float16, torch.bfloat16):
        narrow.append(x.dtype)
        return x.float()
    return x
