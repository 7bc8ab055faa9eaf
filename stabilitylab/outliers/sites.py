"""Where activations are looked at: the input of every linear layer, and the residual stream after every block.

A linear layer's input is what a scheme of quantization has to represent; the residual stream (residual stream) is where LLM.int8()
and the study of massive activations found their outliers. Sites are called as in telemetry: ``<module path>:input``, and the
block's own path. Blocks are the members of the longest ``ModuleList`` that lies in no other.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from stabilitylab.models.layers import linear_layers

RESIDUAL_STREAM = "residual stream"


@dataclass(frozen=True, kw_only=True)
class Site:
    """A place in the forward pass.

    Attributes:
        path: its name; ``:input`` at the end for a module's input.
        layer: the block's number; None outside blocks.
        role: its path inside the block (``mlp.down_proj``), ``residual stream``, or its whole path outside blocks.
    """

    path: str
    layer: int | None
    role: str

    @property
    def is_input(self) -> bool:
        """Whether it is the input of a linear layer."""
        return self.path.endswith(":input")


def blocks(module: nn.Module) -> dict[str, nn.Module]:
    """Path -> block; empty where the model has no stack of two or more."""
    longest: dict[str, nn.Module] = {}
    inside: list[str] = []
    for path, child in module.named_modules():
        if not isinstance(child, nn.ModuleList) or any(path.startswith(outer + ".") for outer in inside):
            continue
        inside.append(path)
        if len(child) > max(1, len(longest)):
            longest = {
                f"{path}.{number}" if path else str(number): block for number, block in enumerate(child)
            }
    return longest


def sites_of(module: nn.Module) -> list[tuple[Site, nn.Module]]:
    """Every site and the module that it belongs to, in the model's order."""
    stack = blocks(module)
    number = {path: layer for layer, path in enumerate(stack)}
    linear = linear_layers(module)
    found: list[tuple[Site, nn.Module]] = []
    for path, child in module.named_modules():
        if path in linear:
            block = next((outer for outer in number if path.startswith(outer + ".")), None)
            layer = None if block is None else number[block]
            role = path if block is None else path.removeprefix(block + ".")
            found.append((Site(path=f"{path}:input", layer=layer, role=role), child))
        if path in number:
            found.append((Site(path=path, layer=number[path], role=RESIDUAL_STREAM), child))
    return found
