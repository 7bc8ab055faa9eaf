#!/usr/bin/env bash
# AdaGC of pytorch-optimizer: a tensor whose gradient is zero for one step of the warm-up (an expert without a token, an adapter
# that starts at zero).
#
# Written down before running: nothing lasts. Its running norm falls a little and recovers with the next gradients.
# Seen with pytorch-optimizer 4.1.0, torch 2.13.0, Python 3.11 (2026-11-29): the running norm becomes the smallest of the warm-up,
# here 0, and grows after it only by what the clip at 1.05 of itself lets through, .1 % a step. In the 1,000 steps after the warm-up
# the tensor moves by .009, its twin without the zero by 1.25, 150 times as far. The loss of the rest looks well; only the size of
# that tensor's update shows it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 pytorch-optimizer==4.1.0
cat > "$work/zero.py" <<'PY'
import sys
from importlib.metadata import version

import torch
from pytorch_optimizer import AdaGC


def moved(with_zero: bool) -> float:
    """How far a tensor goes in the 1,000 steps after the warm-up, gradients of about 1, the fiftieth zero or not."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(64))
    optimizer = AdaGC([p], lr=1e-3, warmup_steps=100, weight_decay=0.0)
    for step in range(1100):
        p.grad = torch.zeros(64) if with_zero and step == 50 else 1 + torch.randn(64) / 10
        optimizer.step()
        if step == 99:
            start = p.detach().clone()
    return float((p.detach() - start).abs().mean())


zero, ordinary = moved(True), moved(False)
print("pytorch-optimizer", version("pytorch-optimizer"), f"moved after a zero: {zero:.2e}, without it: {ordinary:.2e}")
sys.exit(0 if zero < ordinary / 50 else 1)
PY
"$work/env/bin/python" "$work/zero.py" && echo "as recorded" || { echo "changed: look again"; exit 1; }
