"""The loss over a vocabulary that two ranks share, on a machine that multiplies half numbers. Not a test itself."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from glm.parallel import vocabulary_loss as module
from tests.glm.model.test_vocabulary_loss import inputs

# Format, gap (each token but the target has probability e^-gap), z-loss, loss scale, lift.
CASES = {
    "lifted": (torch.float16, 19.0, 0.0, 2.0**16, module.LIFT),
    "not lifted": (torch.float16, 19.0, 0.0, 2.0**16, 1.0),
    "fp16": (torch.float16, 2.0, 0.1, 8.0, module.LIFT),
    "bf16": (torch.bfloat16, 2.0, 0.1, 8.0, module.LIFT),
}


def split_losses(folder: Path) -> None:
    """Loss, gradient of the hidden states and of the whole weight, of every case; written by the first rank."""
    found = {}
    rank, size = dist.get_rank(), dist.get_world_size()
    for name, (dtype, gap, z_loss, scale, lift) in CASES.items():
        hidden, weight, target = inputs(dtype, gap)
        part = weight.detach().chunk(size)[rank].clone().requires_grad_()
        # As on a machine with such units: the logits' gradient is an operand, hence half.
        with (
            mock.patch.object(module, "upcasts", return_value=False),
            mock.patch.object(module, "LIFT", lift),
        ):
            loss = module.split_vocabulary_loss(hidden, part, target, z_loss, dist.group.WORLD)
            (scale * loss).backward()
        parts = [torch.empty_like(part) for _ in range(size)]
        dist.all_gather(parts, part.grad)
        found[name] = {"loss": loss.detach(), "hidden": hidden.grad, "weight": torch.cat(parts)}
    if rank == 0:
        torch.save(found, folder / "split-losses.pt")
