"""What DeepSpeed's processes import later: the server that forks them imports it once. Not a test itself.

torch's optimizers import its compiler, and DeepSpeed compiles a function while it is imported. The garbage collector, which
DeepSpeed runs for every engine of ZeRO-3, leaves alone what exists at the fork.
"""

import contextlib
import gc

import torch

with contextlib.suppress(ImportError):  # not in every version
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

torch.optim.AdamW([torch.zeros(1)])
gc.collect()
gc.freeze()
