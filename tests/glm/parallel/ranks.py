"""What a process does once before it forks ranks, so that no rank does it again. Not a test itself.

A rank that a launcher starts imports, and reads the docstrings that its command line is made of, for some two seconds. Forked ones
find all that done. What they find is not walked through by the collector either: to look at an object is to copy its page.
"""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Sequence

import torch

from glm.commands import train

# Imported by a run on its way: by DeepSpeed 0.19 for every engine, and by the end of training.
LATER = (
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.moe.ep_count",
    "numpy.ctypeslib",
    "numpy.ma",
    "stabilitylab.models.freed_memory",
    "stabilitylab.spikes.explain",
)


def prepare(words: Sequence[str]) -> None:
    """Import what ranks need, and read the words of a ``glm train`` as they will."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    importlib.import_module("glm.parallel.engine")
    for name in LATER:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            # DeepSpeed of another version; anything else is a mistake here.
            if not str(error.name).startswith("deepspeed."):
                raise
    # What torch's optimizers import when the first is made: two seconds that every rank would spend.
    torch.optim.SGD([torch.zeros(1)], 0.1)
    train.parse_command(words[1:])
    gc.collect()
    gc.freeze()
