"""Where a command computes: on what ``--device`` says, else on cuda where there is one, else on the CPU."""

from __future__ import annotations

import torch

from glm.errors import InputError


def chosen_device(name: str | None) -> torch.device:
    """The device of that name; None: cuda where there is one, else the CPU. Raises InputError where torch cannot use it."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from None
    return device
