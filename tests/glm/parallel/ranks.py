"""What a process does once before it forks ranks, so that no rank does it again. Not a test itself.

A rank that a launcher starts spends some two seconds on imports and on reading the docstrings that make its command line. Forked
ranks find all that done. The garbage collector does not walk through it either: to look at an object is to copy its page.
"""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Sequence

import torch

from glm.commands import train

# What a run imports later: DeepSpeed 0.19 for every engine, and the end of training.
LATER = (
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.moe.ep_count",
    "numpy.ctypeslib",
    "numpy.ma",
    "stabilitylab.models.freed_memory",
    "stabilitylab.spikes.explain",
)


def prepare(words: Sequence[str]) -> None:
    """Import what ranks need, and parse the words of a ``glm train`` as the ranks will."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    importlib.import_module("glm.parallel.engine")
    for name in LATER:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            # Another version of DeepSpeed lacks it; anything else is a mistake here.
            if not str(error.name).startswith("deepspeed."):
                raise
    # What torch's optimizers import when the first is made: two seconds that every rank would spend.
    torch.optim.SGD([torch.zeros(1)], 0.1)
    train.parse_command(words[1:])
    gc.collect()
    gc.freeze()
