"""What DeepSpeed's processes import on their way, once in the server that they are forked from. Not a test itself.

With torch's optimizers comes its compiler, and DeepSpeed compiles a function while it is imported. The collector, which DeepSpeed
calls for every engine of ZeRO-3, leaves alone what is there then.
"""

import contextlib
import gc

import torch

with contextlib.suppress(ImportError):  # not in every version
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

torch.optim.AdamW([torch.zeros(1)])
gc.collect()
gc.freeze()
