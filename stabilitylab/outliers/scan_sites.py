"""Where the scan looks at activations: the input of every linear layer, and the residual stream after every block.

A linear layer's input is what a quantization scheme has to represent; the residual stream is where LLM.int8() and the study of
massive activations found their outliers. Sites are called as in telemetry: ``<module path>:input``, and the block's own path;
``stabilitylab.model_structure`` says what a block is.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from stabilitylab.model_structure import linear_layers, stacks

RESIDUAL_STREAM = "residual stream"


@dataclass(frozen=True, kw_only=True)
class Site:
    """A place in the forward pass.

    Attributes:
        path: its name; ``:input`` at the end for a module's input.
        layer: the block's number in its stack; None outside blocks.
        role: its path inside the block (``mlp.down_proj``), ``residual stream``, or its whole path outside blocks. In a model
            of several stacks with the stack before it, ``encoder.block: residual stream``.
    """

    path: str
    layer: int | None
    role: str

    @property
    def is_residual_stream(self) -> bool:
        """Whether it is a block's output."""
        return self.role.endswith(RESIDUAL_STREAM)

    @property
    def is_input(self) -> bool:
        """Whether it is the input of a linear layer."""
        return self.path.endswith(":input")


def sites_of(module: nn.Module) -> list[tuple[Site, nn.Module]]:
    """Every site and the module that it belongs to, in the model's order."""
    several = stacks(module)
    number = {path: layer for stack in several for layer, path in enumerate(stack.blocks)}
    name = {path: f"{stack.path}: " for stack in several for path in stack.blocks} if len(several) > 1 else {}
    linear = linear_layers(module)
    found: list[tuple[Site, nn.Module]] = []
    for path, child in module.named_modules():
        if path in linear:
            block = next((outer for outer in number if path.startswith(outer + ".")), None)
            layer = None if block is None else number[block]
            role = path if block is None else name.get(block, "") + path.removeprefix(block + ".")
            found.append((Site(path=f"{path}:input", layer=layer, role=role), child))
        if path in number:
            found.append(
                (Site(path=path, layer=number[path], role=name.get(path, "") + RESIDUAL_STREAM), child)
            )
    return found
