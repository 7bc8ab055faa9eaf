"""Takes fused experts apart: a mixture's one three-dimensional parameter becomes a linear layer for each expert.

transformers 5 keeps the experts of a layer in parameters ``gate_up_proj`` [experts, 2 x inner, width] and ``down_proj`` [experts,
width, inner] (or ``up_proj`` where nothing gates), which no linear layer holds: whatever looks for linear layers misses the larger
part of such a model. Here each expert becomes two ``nn.Linear`` whose weights are views of the fused tensors, so nothing is copied,
and outliers, quantization and telemetry see them as they see any other layer:

    y_t = sum over the chosen experts e of  weight_te * down_e(gate(up_e(x_t)))

computed expert by expert, as the "eager" implementation of transformers does. The decorator ``use_experts_implementation`` tells
the layout by what it leaves on the module: ``has_bias``, ``is_transposed`` and ``_apply_gate`` in every release from 5.0 on;
``has_gate`` and ``has_post_expert_norm`` in later ones, before which all were gated and none was normalized. Llama 4's experts lack
the decorator and are known by their name: every expert gets every token, those of others as zeros. Experts of another layout
(DBRX's, JetMoE's) stay as they are, and a note says that nothing looks at them.

Source: Shazeer et al., arXiv:1701.06538, equation 1; the layouts are those of transformers 5.0 to 5.24, ``integrations/moe.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class _Layout:
    """How a fused module keeps its experts.

    Attributes:
        inward: name of the parameter that leads in.
        bias: whether both parameters have one.
        transposed: whether weights are [experts, in, out].
        norm: whether each expert's output is normalized.
        every: whether every expert gets a row for every token, one after another, and chooses nothing (Llama 4).
    """

    inward: str
    bias: bool
    transposed: bool
    norm: bool
    every: bool = False


def _layout(module: Any) -> _Layout | None:
    """What the decorator left on a module; None where it left nothing and the module's kind is not known."""
    if type(module).__name__ == "Llama4TextExperts":
        return _Layout(inward="gate_up_proj", bias=False, transposed=True, norm=False, every=True)
    if not (hasattr(module, "has_bias") and hasattr(module, "is_transposed")):
        return None
    return _Layout(
        inward="gate_up_proj" if getattr(module, "has_gate", True) else "up_proj",
        bias=bool(module.has_bias),
        transposed=bool(module.is_transposed),
        norm=bool(getattr(module, "has_post_expert_norm", False)),
    )


class SplitExperts(nn.Module):
    """The experts of one layer, each a linear layer up and one down.

    Takes what the fused module takes: hidden states [tokens, width], for each token the numbers of its experts and their weights,
    both [tokens, chosen]; returns [tokens, width]. Where every expert has a row for every token, it takes [experts x tokens, width]
    alone.
    """

    def __init__(self, fused: Any) -> None:
        super().__init__()
        layout = _layout(fused)
        assert layout is not None
        self.inward = layout.inward
        self.add_module(layout.inward, _linears(fused, layout.inward, layout.transposed))
        self.down_proj = _linears(fused, "down_proj", layout.transposed)
        # Bound to the fused module, which knows its activation and its limits; its weights are taken from it.
        self._between: Callable[[Tensor], Tensor] = _between(fused, layout)
        self._after: Callable[[Tensor], Tensor] | None = fused.post_expert_norm if layout.norm else None
        if self._after is not None:
            self.post_expert_norm = self._after
        for name in list(fused._parameters):
            fused._parameters[name] = None

    def forward(
        self, hidden_TC: Tensor, chosen_TK: Tensor | None = None, weight_TK: Tensor | None = None
    ) -> Tensor:
        inward = self.get_submodule(self.inward)
        assert isinstance(inward, nn.ModuleList)
        if chosen_TK is None or weight_TK is None:
            rows = hidden_TC.view(len(inward), -1, hidden_TC.shape[-1])
            made = [
                down(self._between(up(row_TC)))
                for row_TC, up, down in zip(rows, inward, self.down_proj, strict=True)
            ]
            return torch.cat(made)
        result_TC = torch.zeros_like(hidden_TC)
        for expert in torch.unique(chosen_TK).tolist():
            if not 0 <= expert < len(inward):  # masked tokens are sent to an expert beyond the last
                continue
            token_N, place_N = torch.where(chosen_TK == expert)
            out_NC = self.down_proj[expert](self._between(inward[expert](hidden_TC[token_N])))
            if self._after is not None:
                out_NC = self._after(out_NC)
            weighted_NC = out_NC * weight_TK[token_N, place_N, None]
            result_TC.index_add_(0, token_N, weighted_NC.to(result_TC.dtype))
        return result_TC


def split_experts(model: nn.Module) -> int:
    """Take every fused module of experts in a model apart, in place; returns how many there were.

    Modules of another layout stay as they are.
    """
    fused = [(path, module) for path, module in model.named_modules() if _is_fused(module) and path]
    for path, module in fused:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, SplitExperts(module))
    return len(fused)


def expert_groups(model: nn.Module) -> dict[str, str]:
    """Path of each expert's layer -> name of the fused parameter that it is a part of."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, SplitExperts):
            for name in (module.inward, "down_proj"):
                for expert in range(len(module.down_proj)):
                    found[f"{path}.{name}.{expert}"] = f"{path}.{name}"
    return found


def unsplit_experts(model: nn.Module) -> dict[str, str]:
    """Path -> type of modules that call themselves experts and still hold them in fused parameters, in a layout unknown here."""
    return {
        path: type(module).__name__
        for path, module in model.named_modules()
        if "Expert" in type(module).__name__
        and any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))
    }


def _between(fused: Any, layout: _Layout) -> Any:
    """What a fused module computes between its two products; None where it is not known."""
    if not layout.every:
        return getattr(fused, "_apply_gate" if layout.inward == "gate_up_proj" else "act_fn", None)

    def gated(both: Tensor) -> Tensor:
        gate, up = both.chunk(2, -1)
        product: Tensor = up * fused.act_fn(gate)
        return product

    return gated


def _is_fused(module: Any) -> bool:
    layout = _layout(module)
    if layout is None:
        return False
    names = [layout.inward, "down_proj"]
    names += [f"{name}_bias" for name in names] if layout.bias else []
    held = module._parameters
    weights = [held.get(name) for name in names]
    dims = [3, 3, 2, 2][: len(names)]
    fits = all(w is not None and w.dim() == dim for w, dim in zip(weights, dims, strict=True))
    # A further parameter takes part in a way that is not known here.
    return fits and set(held) == set(names) and _between(module, layout) is not None


def _linears(fused: nn.Module, name: str, transposed: bool) -> nn.ModuleList:
    """A linear layer for each expert of one fused parameter, without copying a number."""
    weight_EOI: Tensor = fused.get_parameter(name)
    weight_EOI = weight_EOI.transpose(1, 2) if transposed else weight_EOI
    bias_EO = fused._parameters.get(f"{name}_bias")
    layers = []
    for expert in range(weight_EOI.shape[0]):
        out, into = weight_EOI.shape[1:]
        layer = nn.Linear(into, out, bias=False, device="meta")
        layer.weight = nn.Parameter(weight_EOI[expert].detach(), requires_grad=False)
        if bias_EO is not None:
            layer.bias = nn.Parameter(bias_EO[expert].detach(), requires_grad=False)
        layers.append(layer)
    return nn.ModuleList(layers)
