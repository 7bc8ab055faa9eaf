#!/usr/bin/env bash
# CAME (came-pytorch) on weights in bf16, resumed from its own state_dict.
#
# One would expect the resumed run to go on as if nobody had stopped it. CAME keeps its second moments in fp32 for such weights.
# Written down before running: torch's load_state_dict casts them to the weights' bf16, where v times .999 rounds back to v. They
# can grow but never fall again; steps stay too small for good where gradients have shrunk.
# Seen with came-pytorch 0.1.3, torch 2.13.0, Python 3.11 (2026-11-30): gradients a twentieth as large from step 300 on. Without a
# stop the second moment falls from .259 to .080 by step 1,500; resumed at step 300 it is .259 to the end, in bf16, and the
# momentum, which is the step over the learning rate, .023 instead of .040. Nothing warns. torch's page on Optimizer.load_state_dict
# does not name the cast; any optimizer with wider states than its weights meets it, unless it casts them back (transformers'
# Adafactor does).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/env"
"$work/env/bin/pip" install --quiet --no-cache-dir torch==2.13.0 numpy==2.4.6 came-pytorch==0.1.3
cat > "$work/resume.py" <<'PY'
import copy
import sys
from importlib.metadata import version

import torch
from came_pytorch import CAME

STOP, STEPS = 300, 1500


def run(resumed: bool) -> tuple[float, float, torch.dtype]:
    """Mean of the rows' second moments and RMS of the momentum at the end, and the moments' type."""
    random = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter((0.02 * torch.randn(64, 128, generator=random)).bfloat16())
    optimizer = CAME([weight], lr=1e-3)
    for step in range(STEPS):
        if resumed and step == STOP:
            state = copy.deepcopy(optimizer.state_dict())
            weight = torch.nn.Parameter(weight.detach().clone())
            optimizer = CAME([weight], lr=1e-3)
            optimizer.load_state_dict(state)
        size = 1.0 if step < STOP else 0.05
        weight.grad = (size * torch.randn(64, 128, generator=random)).bfloat16()
        optimizer.step()
        if step == STOP - 1:
            print(f"    step {step}: second moment {float(optimizer.state[weight]['exp_avg_sq_row'].float().mean()):.4f}")
    second, first = optimizer.state[weight]["exp_avg_sq_row"], optimizer.state[weight]["exp_avg"]
    return float(second.float().mean()), float(first.float().square().mean().sqrt()), second.dtype


print("came-pytorch", version("came-pytorch"), "torch", torch.__version__)
whole, resumed = run(False), run(True)
for name, (second, momentum, dtype) in (("never stopped", whole), (f"resumed at {STOP}", resumed)):
    print(f"{name}: second moment {second:.4f} in {dtype}, momentum {momentum:.4f} after {STEPS} steps")
sys.exit(0 if resumed[0] > 2 * whole[0] and resumed[1] < 0.7 * whole[1] else 1)
PY
"$work/env/bin/python" "$work/resume.py" && echo "as recorded" || { echo "changed: look again"; exit 1; }
